"""Series: what a plot draws, taken from the rows of a history."""

from collections.abc import Sequence

import numpy as np

from nmjax.reports.history import History

PANELS = (
    "loss",
    "accuracy",
    "flip_rate",
    "density",
    "kept_magnitude",
    "itop",
    "active_neurons",
)
"""The panels that are drawn, where the history has them, unless told otherwise."""

TITLES = {
    "itop": "positions explored (ITOP)",
    "active_neurons": "share of active neurons",
    "fan_in_max": "largest fan-in",
}
"""What stands above a panel, where it is not the metric's own name."""

MAX_POINTS = 400
"""A longer line is drawn as this many means of consecutive points."""


def total_keys(histories: Sequence[History], name: str) -> list[str]:
    """List the totals of a metric: its name, or a key that ends in ``_<name>``."""
    keys = dict.fromkeys(key for rows in histories for row in rows for key in row)
    return [key for key in keys if key == name or key.endswith(f"_{name}")]


def layers_of(history: History, names: Sequence[str]) -> list[str]:
    """List the paths that have a metric of these names, in order of appearance."""
    keys = dict.fromkeys(key for row in history for key in row)
    parts = [key.partition("/") for key in keys]
    return list(
        dict.fromkeys(path for name, _, path in parts if path and name in names)
    )


def choose_panels(
    histories: Sequence[History],
    panels: Sequence[str] | None,
    x: str,
    *,
    totals_only: bool = False,
) -> list[str]:
    """Choose the panels that the histories can fill, or check those asked for."""
    keys = dict.fromkeys(key for rows in histories for row in rows for key in row)
    if x not in keys:
        raise ValueError(f"no row has x={x!r}; there are {list(keys)}")

    def has(name: str) -> bool:
        layered = any(key.startswith(f"{name}/") for key in keys)
        return bool(total_keys(histories, name)) or (layered and not totals_only)

    if panels is None:
        panels = [name for name in PANELS if has(name)]
    for name in panels:
        if not has(name):
            raise ValueError(f"no row has a metric {name!r}; there are {list(keys)}")
    if not panels:
        raise ValueError(f"nothing to draw: no row has any of {PANELS}: {list(keys)}")
    return list(panels)


def series(history: History, key: str, x: str) -> tuple[np.ndarray, np.ndarray]:
    """Give one metric as two float arrays, from the rows that have it."""
    points = [
        (row[x], row[key])
        for row in history
        if row.get(x) is not None and row.get(key) is not None
    ]
    both = np.array(points, dtype=float).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def stack_seeds(
    histories: Sequence[History], key: str, x: str
) -> tuple[np.ndarray, np.ndarray]:
    """Give the steps that all seeds have, and values of shape (seeds, steps)."""
    each = [dict(zip(*series(history, key, x), strict=True)) for history in histories]
    common = sorted(set(each[0]).intersection(*each[1:]))
    values = [[points[step] for step in common] for points in each]
    return np.array(common, dtype=float), np.array(values, dtype=float)


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Replace runs of consecutive points by their means, if there are too many."""
    if len(steps) <= MAX_POINTS:
        return steps, values
    edges = np.arange(MAX_POINTS) * len(steps) // MAX_POINTS
    sizes = np.diff(edges, append=len(steps))
    return np.add.reduceat(steps, edges) / sizes, np.add.reduceat(values, edges) / sizes


def constant_layers(history: History, name: str) -> dict[str, float]:
    """Give the density of every layer if none of them changes; else nothing."""
    if name != "density":
        return {}
    out = {}
    for layer in layers_of(history, [name]):
        values = [row[key] for row in history if (key := f"{name}/{layer}") in row]
        if any(value != values[0] for value in values):
            return {}
        out[layer] = values[0]
    return out


def short_names(layers: Sequence[str]) -> list[str]:
    """Leave out the first and last parts that all paths share, as ``kernel``."""
    parts = [layer.split("/") for layer in layers]
    room = min(len(path) for path in parts) - 1
    first = last = 0
    while first < room and len({path[first] for path in parts}) == 1:
        first += 1
    while last < room - first and len({path[-1 - last] for path in parts}) == 1:
        last += 1
    if len(layers) == 1:
        first = last = 0
    return ["/".join(path[first : len(path) - last]) for path in parts]
