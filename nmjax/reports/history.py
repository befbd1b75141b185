"""Histories: metrics of a run as rows of Python scalars, in memory and in JSON.

A *row* is a flat dict, for example ``{"step": 10, "loss": 0.3,
"flip_rate/Dense_0/kernel": 0.01}``; a *history* is a list of rows of one run. A key
with a slash belongs to one layer: ``<metric>/<path of the leaf>``, as
`nmjax.metrics.tracker` names them. Rows need not all have the same keys.
"""

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import jax
import numpy as np

Scalar: TypeAlias = float | int | bool | str | None
"""What a cell of a row may be."""

Row: TypeAlias = dict[str, Scalar]
"""One line of a history: metric name -> Python scalar."""

History: TypeAlias = Sequence[Mapping[str, Scalar]]
"""The rows of one run."""


def row(metrics: Mapping[str, Any], **extra: Scalar) -> Row:
    """Bring one step's metrics to the host as a row of Python scalars.

    Args:
      metrics: name -> scalar array or Python scalar, fetched in one transfer.
      **extra: more cells, put first, for example ``step=10``.

    Returns:
      A row. Counts stay ints, everything else becomes a float.

    Raises:
      ValueError: a value is not a scalar; or a name is given twice.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import reports
      >>> reports.row({"loss": jnp.array(0.5), "sad": jnp.array(3)}, step=10)
      {'step': 10, 'loss': 0.5, 'sad': 3}
    """
    both = sorted(set(metrics) & set(extra))
    if both:
        raise ValueError(f"{both[0]!r} is given both in metrics and as an argument")
    # As a list: a dict would come back with its keys sorted.
    host = jax.device_get(list(metrics.values()))
    return extra | {
        name: _scalar(name, value) for name, value in zip(metrics, host, strict=True)
    }


def rows(metrics: Mapping[str, Any], steps: Iterable[int]) -> list[Row]:
    """Bring the stacked metrics of a `jax.lax.scan` to the host as rows.

    Args:
      metrics: name -> array of shape (steps,), as `scan` stacks its outputs.
      steps: the step number of every row.

    Returns:
      One row per step, its number under ``"step"``.

    Raises:
      ValueError: an array has another shape.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import reports
      >>> reports.rows({"loss": jnp.array([0.5, 0.25])}, steps=range(10, 12))
      [{'step': 10, 'loss': 0.5}, {'step': 11, 'loss': 0.25}]
    """
    numbers = [int(step) for step in steps]
    values = map(np.asarray, jax.device_get(list(metrics.values())))
    host = dict(zip(metrics, values, strict=True))
    for name, value in host.items():
        if value.shape != (len(numbers),):
            raise ValueError(
                f"metric {name!r} has shape {value.shape}; {len(numbers)} steps need "
                f"shape ({len(numbers)},). For several seeds, call rows for each seed."
            )
    return [
        {"step": step} | {name: _scalar(name, v[i]) for name, v in host.items()}
        for i, step in enumerate(numbers)
    ]


def by_layer(one_row: Mapping[str, Scalar]) -> list[Row]:
    """Turn the per-layer metrics of one row into a table with a line per layer.

    Args:
      one_row: a row with keys ``<metric>/<path>``; other keys are left out.

    Returns:
      One row per path, in order of appearance: ``layer`` and its metrics.

    Example:
      >>> from nmjax import reports
      >>> reports.by_layer({"loss": 0.1, "density/a/kernel": 0.5, "density/b": 1.0})
      [{'layer': 'a/kernel', 'density': 0.5}, {'layer': 'b', 'density': 1.0}]
    """
    layers: dict[str, Row] = {}
    for key, value in one_row.items():
        metric, slash, path = key.partition("/")
        if slash:
            layers.setdefault(path, {"layer": path})[metric] = value
    return list(layers.values())


def write_json(
    history: Sequence[Mapping[str, Any]],
    path: str | os.PathLike[str],
    *,
    nonfinite: Literal["warn", "raise"] = "warn",
) -> None:
    """Write a history as a JSON list of objects, one row per line.

    JSON has no NaN and no infinity. They are written as ``{"float": "nan"}``, which
    `read_json` turns back, and a warning says where the first one is, so that a
    diverged run is saved but not overlooked. The file is replaced in one move:
    an interrupted write leaves the old one.

    Args:
      history: the rows.
      path: the file; its folder is made if it is missing.
      nonfinite: ``"warn"``, or ``"raise"`` to write nothing and raise instead.

    Raises:
      ValueError: a value is not finite and `nonfinite` is ``"raise"``.
      TypeError: a value is not a Python scalar; see `row`.

    Example:
      >>> import pathlib, tempfile
      >>> from nmjax import reports
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "history.json"
      >>> reports.write_json([{"step": 1, "loss": 0.5}], path)
      >>> reports.read_json(path)
      [{'step': 1, 'loss': 0.5}]
    """
    bad = [
        f"{key!r} in row {i} is {value}"
        for i, one_row in enumerate(history)
        for key, value in one_row.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    message = f"{bad[0]} ({len(bad)} values are not finite)" if bad else ""
    if bad and nonfinite == "raise":
        raise ValueError(f"{message}, and nonfinite='raise'")
    lines = [
        json.dumps({k: _to_json(i, k, v) for k, v in one_row.items()}, allow_nan=False)
        for i, one_row in enumerate(history)
    ]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text("[\n" + ",\n".join(lines) + "\n]\n", encoding="utf-8")
    os.replace(part, path)
    if bad:
        warnings.warn(f"history written to {path}: {message}", stacklevel=2)


def read_json(path: str | os.PathLike[str]) -> list[Row]:
    """Read a history that `write_json` wrote; NaN and infinity come back.

    Args:
      path: the file.

    Returns:
      The rows.

    Raises:
      ValueError: the file is not a JSON list of objects with scalar values.

    Example:
      >>> import pathlib, tempfile
      >>> from nmjax import reports
      >>> path = pathlib.Path(tempfile.mkdtemp()) / "history.json"
      >>> reports.write_json([{"step": 1, "note": None}], path)
      >>> reports.read_json(path)
      [{'step': 1, 'note': None}]
    """
    try:
        history = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(history, list):
        raise ValueError(f"{path} holds a {type(history).__name__}, not a list of rows")
    return [_from_json(path, i, one_row) for i, one_row in enumerate(history)]


def _scalar(name: str, value: Any) -> Scalar:
    """Turn a host scalar into the Python scalar of its kind."""
    if value is None or isinstance(value, str):
        return value
    array = np.asarray(value)
    if array.shape != ():
        raise ValueError(
            f"metric {name!r} has shape {array.shape}; a row takes scalars. "
            "For metrics stacked by scan, use reports.rows."
        )
    if array.dtype == np.bool_:
        return bool(array)
    return int(array) if np.issubdtype(array.dtype, np.integer) else float(array)


def _to_json(i: int, key: str, value: Any) -> Any:
    """Encode one cell; NaN and infinity as ``{"float": ...}``."""
    if value is not None and not isinstance(value, bool | int | float | str):
        raise TypeError(
            f"{key!r} in row {i} is a {type(value).__name__}; make rows of Python "
            "scalars with reports.row(metrics, step=...)"
        )
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    return value


def _from_json(path: str | os.PathLike[str], i: int, encoded: Any) -> Row:
    """Decode one row of `read_json`."""
    if not isinstance(encoded, dict):
        raise ValueError(
            f"{path}: row {i} is a {type(encoded).__name__}, not an object"
        )
    out: Row = {}
    for key, value in encoded.items():
        if isinstance(value, dict) and value.get("float") in ("nan", "inf", "-inf"):
            value = float(value["float"])
        if isinstance(value, dict | list):
            raise ValueError(f"{path}: {key!r} in row {i} is {value!r}, not a scalar")
        out[key] = value
    return out
