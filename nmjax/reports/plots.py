"""Plots: histories of metrics as PNG, PDF or SVG pictures.

A panel shows one metric: its totals, which are the keys that are the metric's name
or end in ``_<name>`` (``loss``, ``eval_loss``), and its layers, whose keys are
``<name>/<path>``. Needs matplotlib; no window is opened and no global state of
matplotlib is touched.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nmjax.reports.history import History
from nmjax.reports.optional import require
from nmjax.reports.series import (
    TITLES,
    choose_panels,
    constant_layers,
    layers_of,
    series,
    short_names,
    stack_seeds,
    thin,
    total_keys,
)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The palette of Okabe and Ito, which colour-blind readers can tell apart."""

DASHES = ("-", "--", ":", "-.")
"""Line styles of the totals in one panel, in order of appearance."""

FROM_ZERO = ("density", "itop", "active_neurons", "fan_in_max")
"""Metrics whose axis begins at 0, as shares and counts are read."""

MAX_LEGEND = 24
"""With more layers than this, a colour bar replaces the legend."""


def plot_history(
    history: History,
    path: str | os.PathLike[str],
    *,
    panels: Sequence[str] | None = None,
    x: str = "step",
    title: str | None = None,
) -> Path:
    """Draw one run: loss, flip rate, density per layer and kept magnitude.

    Totals are thick lines, layers thin ones, coloured from the first to the last.
    Densities that never change are drawn as one bar per layer. The axis of a loss
    or a flip rate is logarithmic where its positive values span more than a factor
    of 20. Points that are NaN or infinite cannot be drawn: the panel says how many
    there are and where they begin.

    Args:
      history: the rows of one run.
      path: the picture; its ending names the format, its folder is made if missing.
      panels: metrics to draw, in order. Default: those of `PANELS` that the
        history has.
      x: the key of the horizontal axis.
      title: a line above the panels.

    Returns:
      The path of the picture.

    Raises:
      ValueError: no row has a metric that was asked for, or `x`.
      ImportError: matplotlib is not installed.

    Example:
      >>> import pathlib, tempfile
      >>> from nmjax import reports
      >>> history = [{"step": i, "loss": 1 / (1 + i)} for i in range(10)]
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> reports.plot_history(history, folder / "run.png").name
      'run.png'
    """
    module = require("matplotlib.figure", "plot_history")
    names = choose_panels([history], panels, x)
    layers = layers_of(history, names)
    colours = layer_colours(layers)
    figure, axes = grid(module, len(names), title)
    for axis, name in zip(axes, names, strict=False):
        totals = total_keys([history], name)
        bars = constant_layers(history, name)
        if bars:
            _draw_bars(axis, name, bars, colours, history[-1].get(name))
            continue
        drawn = []
        for layer in layers:
            steps, values = series(history, f"{name}/{layer}", x)
            if not steps.size:
                continue
            style = {"color": colours[layer], "linewidth": 0.9, "alpha": 0.85}
            axis.plot(*thin(steps, values), **style)
            drawn.append((steps, values))
        with_layers = bool(drawn)
        for i, key in enumerate(totals):
            steps, values = series(history, key, x)
            colour = "black" if with_layers else COLOURS[i % len(COLOURS)]
            label = "total" if key == name and with_layers else key
            _draw_line(axis, steps, values, colour, DASHES[i % 4], label)
            drawn.append((steps, values))
        _finish(axis, name, x, drawn)
        if len(totals) == 1 and totals[0] != name:
            axis.set_title(totals[0].replace("_", " "))
        if len(totals) > 1 or with_layers:
            axis.legend(frameon=False, fontsize="small")
    _layer_legend(figure, axes, len(names), colours)
    return save(figure, path)


def plot_comparison(
    runs: Mapping[str, History | Sequence[History]],
    path: str | os.PathLike[str],
    *,
    panels: Sequence[str] | None = None,
    x: str = "step",
    title: str | None = None,
) -> Path:
    """Draw methods side by side: the mean of their seeds and its spread.

    The line is the mean over seeds, at every step that all seeds of the method have;
    the band goes from the lowest seed to the highest. Only totals are drawn.

    Args:
      runs: method -> one history, or a list of histories, one per seed.
      path: the picture; its ending names the format, its folder is made if missing.
      panels: metrics to draw, in order. Default: those of `PANELS` that a history
        has as a total.
      x: the key of the horizontal axis.
      title: a line above the panels.

    Returns:
      The path of the picture.

    Raises:
      ValueError: `runs` is empty, a method has no history, or no row has a metric
        that was asked for, or `x`.
      ImportError: matplotlib is not installed.

    Example:
      >>> import pathlib, tempfile
      >>> from nmjax import reports
      >>> def run(scale, seed):
      ...     return [{"step": i, "loss": scale / (1 + i + seed)} for i in range(9)]
      >>> runs = {"dense": [run(1.0, s) for s in range(3)], "srste": run(1.2, 0)}
      >>> folder = pathlib.Path(tempfile.mkdtemp())
      >>> reports.plot_comparison(runs, folder / "methods.svg").name
      'methods.svg'
    """
    module = require("matplotlib.figure", "plot_comparison")
    seeds = {method: _as_seeds(method, histories) for method, histories in runs.items()}
    everything = [history for histories in seeds.values() for history in histories]
    names = choose_panels(everything, panels, x, totals_only=True)
    figure, axes = grid(module, len(names), title)
    lines: dict[str, Any] = {}
    for axis, name in zip(axes, names, strict=False):
        drawn = []
        keys = total_keys(everything, name)
        for i, (method, histories) in enumerate(seeds.items()):
            label = method
            if len(histories) > 1:
                label += f" (mean and range of {len(histories)} seeds)"
            for key, dashes in zip(keys, DASHES, strict=False):
                steps, values = stack_seeds(histories, key, x)
                if not steps.size:
                    continue
                colour = COLOURS[i % len(COLOURS)]
                line = _draw_line(axis, steps, values.mean(0), colour, dashes, key)
                low, high = (thin(steps, f(values, axis=0)) for f in (np.min, np.max))
                axis.fill_between(*low, high[1], color=colour, alpha=0.18, linewidth=0)
                lines.setdefault(label, line)
                drawn.extend((steps, one) for one in values)
        _finish(axis, name, x, drawn)
        if len(keys) == 1 and keys[0] != name:
            axis.set_title(keys[0].replace("_", " "))
        if len(keys) > 1:
            shown = {line.get_label(): line for line in reversed(axis.lines)}
            handles = [shown[key] for key in keys if key in shown]
            legend = axis.legend(handles=handles, frameon=False, fontsize="small")
            for handle in legend.legend_handles:
                handle.set_color("0.3")
    legend_below(figure, lines, 3)
    return save(figure, path)


def layer_colours(layers: Sequence[str]) -> dict[str, Any]:
    """Give every layer a colour: from dark, the first, to light, the last."""
    if not layers:
        return {}
    colormap = require("matplotlib", "plot_history").colormaps["viridis"]
    return dict(zip(layers, colormap(np.linspace(0.0, 0.9, len(layers))), strict=True))


def _as_seeds(method: str, histories: Any) -> list[History]:
    """Wrap a single history into a list of seeds."""
    if histories and isinstance(histories[0], Mapping):
        histories = [histories]
    if not histories or not all(histories):
        raise ValueError(f"method {method!r} has no history, or an empty one")
    return list(histories)


def grid(module: Any, panels: int, title: str | None) -> tuple[Any, list[Any]]:
    """Make a figure with that many axes."""
    columns = panels if panels < 4 else math.ceil(panels / 2)
    rows = math.ceil(panels / columns)
    size = (4.6 * columns, 3.3 * rows + 0.3)
    figure = module.Figure(figsize=size, dpi=150, layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axis in axes[panels:]:
        axis.axis("off")
    if title:
        figure.suptitle(title)
    return figure, axes


def _draw_line(
    axis: Any,
    steps: np.ndarray,
    values: np.ndarray,
    colour: Any,
    dashes: str,
    label: str,
) -> Any:
    """Draw a total, with markers where its points are few."""
    marker = "o" if len(steps) <= 25 else ""
    style = {"color": colour, "linestyle": dashes, "label": label, "zorder": 3}
    (line,) = axis.plot(
        *thin(steps, values), linewidth=1.8, marker=marker, markersize=3.5, **style
    )
    return line


def _draw_bars(
    axis: Any, name: str, values: Mapping[str, float], colours: Any, total: Any
) -> None:
    """Draw the layers' constant values as bars, the first layer at the top."""
    places = np.arange(len(values))
    axis.barh(places, list(values.values()), color=[colours[k] for k in values])
    every = math.ceil(len(values) / 30)
    labels = short_names(list(values))[::every]
    axis.set_yticks(places[::every], labels, fontsize=9 if len(values) < 9 else 6)
    axis.set_ylim(len(values) - 0.5, -0.5)
    axis.set_xlim(0, 1)
    if total is not None:
        axis.axvline(total, color="black", linestyle="--", linewidth=1.2)
        axis.set_xlabel(f"kept fraction (all together, dashed: {total:.4g})")
    else:
        axis.set_xlabel("kept fraction")
    axis.set_title(f"{name.replace('_', ' ')} per layer")
    axis.spines[["top", "right"]].set_visible(False)


def _finish(axis: Any, name: str, x: str, drawn: Sequence[Any]) -> None:
    """Set title, scale and grid, and tell of points that cannot be drawn."""
    axis.set_title(TITLES.get(name, name.replace("_", " ")))
    axis.set_xlabel(x)
    axis.grid(color="0.9", linewidth=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    steps, values = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    if (steps == np.round(steps)).all():
        axis.xaxis.get_major_locator().set_params(integer=True)
    finite = np.isfinite(values)
    if not finite.all():
        text = f"{(~finite).sum()} points not finite, from {x} {steps[~finite].min():g}"
        axis.text(0.02, 0.03, text, transform=axis.transAxes, color="#C00000", size=8)
        axis.axvline(steps[~finite].min(), color="#C00000", linestyle=":", linewidth=1)
    positive = values[finite & (values > 0)]
    span = positive.max() / positive.min() if positive.size else 1.0
    if name in FROM_ZERO and positive.size:
        axis.set_ylim(0.0, 1.1 * positive.max())
    if not name.endswith(("loss", "flip_rate")) or span <= 20:
        return
    if (values[finite] <= 0).any():
        axis.set_yscale("symlog", linthresh=positive.min(), linscale=0.7)
        return
    axis.set_yscale("log")
    if span < 200:
        ticker = require("matplotlib.ticker", "a plot")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(ticker.FuncFormatter(lambda v, _: f"{v:g}"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())


def _layer_legend(figure: Any, axes: Sequence[Any], panels: int, colours: Any) -> None:
    """Name the layers: in a spare cell or beside the panels, as a bar if many."""
    if not colours:
        return
    labels = short_names(list(colours))
    if len(labels) <= MAX_LEGEND:
        lines = require("matplotlib.lines", "plot_history")
        handles = [lines.Line2D([], [], color=c, linewidth=3) for c in colours.values()]
        style = {"frameon": False, "fontsize": "small", "title": "layer"}
        if len(axes) > panels:
            axes[-1].legend(handles, labels, loc="upper left", **style)
        else:
            figure.legend(handles, labels, loc="outside right upper", **style)
        return
    colors = require("matplotlib.colors", "plot_history")
    cm = require("matplotlib.cm", "plot_history")
    colormap = colors.ListedColormap(list(colours.values()))
    norm = colors.Normalize(-0.5, len(labels) - 0.5)
    bar = figure.colorbar(cm.ScalarMappable(norm, colormap), ax=axes, fraction=0.03)
    shown = np.unique(np.linspace(0, len(labels) - 1, 12).round().astype(int))
    bar.set_ticks(shown, labels=[labels[i] for i in shown], fontsize="small")
    bar.ax.invert_yaxis()
    bar.set_label("layer, first to last")


def legend_below(figure: Any, lines: Mapping[str, Any], columns: int) -> None:
    """Name the lines of all axes once, below them."""
    figure.legend(
        lines.values(),
        lines.keys(),
        loc="outside lower center",
        ncols=min(len(lines), columns),
        frameon=False,
    )


def save(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Write the picture and give its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
