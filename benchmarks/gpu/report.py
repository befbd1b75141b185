"""What the rows of a run say: bars, what failed, JSON; pure functions without JAX."""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
Cell = dict[str, Row]

OURS = "nm.matmul"
KEY = ("dtype", "outputs", "inputs", "batch")
"""Keys of a product; rows of one product are compared."""

CHECKS = ("correctness", "tiles")
TIMES = ("timings", "eight")

SQUARE = {"dtype": "bfloat16", "outputs": 8192, "inputs": 8192, "batch": 8192}
WIDTHS = {(4096, 14336), (14336, 4096)}
FAN_IN = {"layout": "FanIn", "density": 0.1, "batch": 256, "dtype": "float32"}
PROBED = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int8-weights")


# Cells -------------------------------------------------------------------------------


def cells_of(rows: Iterable[Row], sections: Sequence[str]) -> list[Cell]:
    """Group rows by product: name -> row; those without a time are left out."""
    cells: dict[tuple[Any, ...], Cell] = {}
    for row in rows:
        if row["section"] in sections and "us" in row and "kernel" in row:
            key = tuple(row.get(name) for name in (*KEY, "layout", "density"))
            cells.setdefault(key, {})[row["kernel"]] = row
    return list(cells.values())


def fastest(cell: Cell, *starts: str) -> Row | None:
    """Give the fastest row of a cell whose name starts with one of these."""
    found = [row for name, row in cell.items() if name.startswith(starts)]
    return min(found, key=lambda row: row["us"], default=None)


def gain(cell: Cell, ours: Sequence[str], others: Sequence[str]) -> float | None:
    """Give how much faster the fastest of ours is than the fastest of others."""
    own, other = fastest(cell, *ours), fastest(cell, *others)
    return None if own is None or other is None else other["us"] / own["us"]


# Bars --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bar:
    """What a GPU must show.

    Attributes:
      text: what is measured, in words.
      least: the lowest value that keeps the bar.
      measured: takes the rows; gives values, each with the name of its cell.
    """

    text: str
    least: float
    measured: Callable[[Sequence[Row]], list[tuple[float, str]]]


def bars() -> list[Bar]:
    """List the bars; the lowest of the values that were measured is judged."""
    dense = ("dense", "torch dense")
    square = "2:4 bfloat16 8192^3: "
    found = [Bar(f"probe, {d}: fraction EXACT", 1.0, _exact(d)) for d in PROBED]
    found += [
        Bar("correct bfloat16: 2e-3 / error", 1.0, _margin("bfloat16", 2e-3)),
        Bar("correct int8: fraction of exact results", 1.0, _right("int8")),
        Bar("all correct, and equal when run again: fraction", 1.0, _right(None)),
        Bar(f"{square}nm.matmul / cuBLAS (JAX)", 1.4, _square((OURS,), ("dense",))),
        Bar(f"{square}best tiles / cuBLAS (JAX)", 1.4, _square(_OWN, ("dense",))),
        Bar(f"{square}nm.matmul / cuBLAS (torch)", 1.4, _square((OURS,), dense[1:])),
        Bar(f"{square}nm.matmul / cuSPARSELt", 1.0, _square((OURS,), ("cuSPARSELt",))),
        Bar("decode 4096-14336, batch <= 16: nm.matmul / dense", 1.4, _decode((OURS,))),
        Bar("decode 4096-14336, batch <= 16: best tiles / dense", 1.4, _decode(_OWN)),
    ]
    text = "decode 4096-14336, batch <= 16, kernels alone: nm.matmul / dense"
    found.append(Bar(text, 1.4, _decode_alone))
    text = "fan-in 90 %, 3072 -> 768, batch 256: nm.matmul / "
    for name, least, others in (
        ("dense", 1.7, ("dense", "torch dense")),
        ("BCOO", 13.0, ("BCOO",)),
        ("CSR (torch)", 13.0, ("torch CSR",)),
    ):
        found.append(Bar(f"{text}{name}", least, _fan_in((OURS,), others)))
    text = text.replace("nm.matmul / ", "best tiles / dense")
    found.append(Bar(text, 1.7, _fan_in(_OWN, ("dense", "torch dense"))))
    return found


_OWN = (OURS, "tiles")


def _exact(dtype: str) -> Callable[[Sequence[Row]], list[tuple[float, str]]]:
    def measured(rows: Sequence[Row]) -> list[tuple[float, str]]:
        return [
            (float(row["verdict"] == "EXACT"), f"{row['kernel']}, {row['image']}")
            for row in rows
            if row["section"] == "probe" and row["dtype"] == dtype
        ]

    return measured


def _margin(
    dtype: str, bound: float
) -> Callable[[Sequence[Row]], list[tuple[float, str]]]:
    def measured(rows: Sequence[Row]) -> list[tuple[float, str]]:
        return [
            (bound / max(number_of(row["error"]), 1e-9), name_of(row))
            for row in rows
            if row["section"] in CHECKS and row["dtype"] == dtype
        ]

    return measured


def _right(dtype: str | None) -> Callable[[Sequence[Row]], list[tuple[float, str]]]:
    def measured(rows: Sequence[Row]) -> list[tuple[float, str]]:
        own = [
            row
            for row in rows
            if row["section"] in CHECKS and dtype in (None, row["dtype"])
        ]
        wrong = [name_of(row) for row in own if row["verdict"] != "right"]
        if not own:
            return []
        return [(1 - len(wrong) / len(own), "; ".join(wrong[:5]))]

    return measured


def _square(
    ours: Sequence[str], others: Sequence[str]
) -> Callable[[Sequence[Row]], list[tuple[float, str]]]:
    return lambda rows: _gains(
        rows, lambda row: all(row[k] == v for k, v in SQUARE.items()), ours, others
    )


def _is_decode(row: Row) -> bool:
    sides = (row["outputs"], row["inputs"])
    return row["dtype"] == "bfloat16" and row["batch"] <= 16 and sides in WIDTHS


def _decode_alone(rows: Sequence[Row]) -> list[tuple[float, str]]:
    """Compare the times of kernels that the profiler saw."""
    cells: dict[tuple[Any, ...], Cell] = {}
    for row in rows:
        if row["section"] == "launches" and _is_decode(row):
            key = tuple(row[name] for name in KEY)
            cells.setdefault(key, {})[row["kernel"]] = row
    return [
        (cell["dense"]["kernel_us"] / cell[OURS]["kernel_us"], name_of(cell[OURS]))
        for cell in cells.values()
        if {"dense", OURS} <= set(cell)
    ]


def _decode(
    ours: Sequence[str],
) -> Callable[[Sequence[Row]], list[tuple[float, str]]]:
    return lambda rows: _gains(rows, _is_decode, ours, ("dense",))


def _fan_in(
    ours: Sequence[str], others: Sequence[str]
) -> Callable[[Sequence[Row]], list[tuple[float, str]]]:
    def wanted(row: Row) -> bool:
        return all(row.get(k) == v for k, v in FAN_IN.items())

    def others_of(rows: Sequence[Row]) -> list[tuple[float, str]]:
        found = []
        for cell in cells_of(rows, ("condensed",)):
            kept = {n: row for n, row in cell.items() if n != "dense, highest"}
            value = gain(kept, ours, others)
            if value is not None and wanted(next(iter(cell.values()))):
                found.append((value, name_of(next(iter(cell.values())))))
        return found

    return others_of


def _gains(
    rows: Sequence[Row],
    wanted: Callable[[Row], bool],
    ours: Sequence[str],
    others: Sequence[str],
) -> list[tuple[float, str]]:
    found = []
    for cell in cells_of(rows, TIMES):
        one = next(iter(cell.values()))
        value = gain(cell, ours, others) if wanted(one) else None
        if value is not None:
            found.append((value, name_of(one)))
    return found


def name_of(row: Row) -> str:
    """Name a product: "bfloat16 16 x 4096 -> 14336"."""
    sides = f"{row['batch']} x {row['inputs']} -> {row['outputs']}"
    kernel = row["kernel"] if row["section"] in CHECKS else ""
    return f"{kernel} {row['dtype']} {sides}".strip()


def number_of(value: Any) -> float:
    """Read a number; one that is none (NaN is written as null) is infinite."""
    return math.inf if value is None or math.isnan(value) else value


def verdicts(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Judge the bars.

    Args:
      results: a run, see the documentation of the package.

    Returns:
      For each bar ``text``, ``least``, the lowest value ``measured`` (None where there
      is none), its ``cell`` and the ``verdict``: kept, MISSED or not measured.
    """
    found = []
    for bar in bars():
        values = bar.measured(results["rows"])
        entry: dict[str, Any] = {"text": bar.text, "least": bar.least}
        if not values or results["settings"].get("smoke"):
            none = {"measured": None, "cell": "", "verdict": "not measured"}
            found.append(entry | none)
            continue
        lowest, cell = min(values)
        verdict = "kept" if lowest >= bar.least else "MISSED"
        found.append(entry | {"measured": lowest, "cell": cell, "verdict": verdict})
    return found


def bar_to_text(bar: Row) -> str:
    """Say in a line what became of a bar."""
    measured = bar["measured"]
    shown = "    -" if measured is None else f"{measured:5.2f}"
    at = f" ({bar['cell']})" if bar["verdict"] == "MISSED" and bar["cell"] else ""
    return f"{shown} of {bar['least']:g}  {bar['text']}: {bar['verdict']}{at}"


def summary(results: Mapping[str, Any]) -> str:
    """Say what a run found: bars, what failed, and what was slower than dense."""
    lines = ["", "bars", *(f"  {bar_to_text(bar)}" for bar in results["bars"])]
    failed = [t for t in results["tasks"] if t["status"] == "failed"]
    if failed:
        lines += ["", f"{len(failed)} tasks failed"]
    for task in failed[:20]:
        text = f"  {task['section']}: {task['task']}: {task['message']}"
        lines.append(text if len(text) < 300 else f"{text[:297]}...")
    return "\n".join(lines)


# JSON --------------------------------------------------------------------------------


def to_json(results: Mapping[str, Any]) -> str:
    """Format results as JSON, a line for each bar, task and row."""
    head = {k: v for k, v in results.items() if not isinstance(v, list)}
    parts = [f' "{key}": {json.dumps(_plain(value))}' for key, value in head.items()]
    for key in ("bars", "tasks", "rows"):
        lines = ",\n".join(f"  {json.dumps(_plain(one))}" for one in results[key])
        parts.append(f' "{key}": [\n{lines}\n ]' if lines else f' "{key}": []')
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _plain(value: Any) -> Any:
    """Give floats four significant digits; JSON has no NaN and no infinity."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def tiles_of(results: Mapping[str, Any]) -> str:
    """Make the table that kernels follow, `nmjax/kernels/gpu/tiles.json`.

    Args:
      results: a run.

    Returns:
      The file's text; empty where no tiles were measured.
    """
    entries = [row["entry"] for row in results["rows"] if row["section"] == "tune"]
    if not entries:
        return ""
    from nmjax.kernels import tune  # imports JAX, which touches no device by that

    machine = results["machine"]
    head = {
        "device": machine.get("device"),
        "versions": {name: machine.get(name) for name in ("jax", "jaxlib")},
        "date": machine.get("date", "")[:10],
    }
    return tune.to_json(tune.merge({}, head, entries))
