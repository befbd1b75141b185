"""Sweeps: results of finished runs against a setting, such as sparsity."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nmjax.reports.optional import require
from nmjax.reports.plots import COLOURS, grid, legend_below, save

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
"""Marks of the groups, in order of appearance."""


def plot_sweep(
    rows: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    x: str,
    panels: Mapping[str, str],
    *,
    group: str = "method",
    title: str | None = None,
) -> Path:
    """Draw results against a setting, a line per group, seeds as a band.

    The settings are placed at equal distances, since those of a sweep of sparsity
    crowd towards 1. The line is the mean over seeds, the bar goes from the lowest seed
    to the highest. A group whose rows have None for the setting, such as a dense
    baseline, is a horizontal line.

    Args:
      rows: one per run, with the keys `x`, `group` and those of `panels`.
      path: the picture; its ending names the format, its folder is made if missing.
      x: key of the setting.
      panels: key of a result -> label of its axis.
      group: key of what gets a line of its own.
      title: a line above the panels.

    Returns:
      The path of the picture.

    Raises:
      ValueError: a row lacks a key, or no row has a setting.
      ImportError: matplotlib is not installed.

    Example:
      >>> import pathlib, tempfile
      >>> from nmjax import reports
      >>> rows = [{"method": "dense", "sparsity": None, "accuracy": 95.0}]
      >>> rows += [
      ...     {"method": "rigl", "sparsity": s, "accuracy": 95.0 - s / 50}
      ...     for s in (80, 90, 95)
      ... ]
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "sweep.png"
      >>> reports.plot_sweep(rows, path, "sparsity", {"accuracy": "accuracy, %"}).name
      'sweep.png'
    """
    module = require("matplotlib.figure", "plot_sweep")
    for row in rows:
        for key in (x, group, *panels):
            if key not in row:
                raise ValueError(f"a row has no {key!r}; it has {', '.join(row)}")
    settings = sorted({row[x] for row in rows if row[x] is not None})
    if not settings:
        raise ValueError(f"no row has a value for {x!r}")
    figure, axes = grid(module, len(panels), title)
    lines: dict[str, Any] = {}
    names = list(dict.fromkeys(str(row[group]) for row in rows))
    for axis, (key, label) in zip(axes, panels.items(), strict=False):
        for i, name in enumerate(names):
            style = {"color": COLOURS[i % len(COLOURS)], "linewidth": 1.4}
            own = [row for row in rows if str(row[group]) == name]
            if baseline := [row[key] for row in own if row[x] is None]:
                lines[name] = axis.axhline(np.mean(baseline), linestyle="--", **style)
                continue
            seeds = {s: [row[key] for row in own if row[x] == s] for s in settings}
            places = [place for place, s in enumerate(settings) if seeds[s]]
            found = [seeds[settings[place]] for place in places]
            mean, low, high = (
                np.array([f(values) for values in found]) for f in (np.mean, min, max)
            )
            marks = {"marker": MARKERS[i % len(MARKERS)], "markersize": 4, "capsize": 2}
            lines[name] = axis.errorbar(
                places, mean, [mean - low, high - mean], **marks, **style
            )
        axis.set_xticks(range(len(settings)), [f"{s:g}" for s in settings])
        axis.set_xlabel(x.replace("_", " "))
        axis.set_title(label)
        axis.grid(alpha=0.3)
    legend_below(figure, lines, 4)
    return save(figure, path)
