"""Pages: a run as a Markdown table and as a plot; pure functions without JAX."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import (
    CHECKS,
    OURS,
    TIMES,
    WIDTHS,
    Cell,
    Row,
    cells_of,
    fastest,
    name_of,
    number_of,
)


def to_markdown(results: Mapping[str, Any]) -> str:
    """Format a run for readers: bars, then a table for each section."""
    facts = ", ".join(f"{k} {v}" for k, v in results["machine"].items() if v != "")
    lines = [f"Measured on {facts}.", ""]
    if results["settings"].get("smoke"):
        lines += ["A dry run on a CPU: its times say nothing.", ""]
    lines += ["### Bars", "", *_table("bar", "least", "measured", "verdict")]
    for bar in results["bars"]:
        shown = "–" if bar["measured"] is None else f"{bar['measured']:.2f}"
        lines.append(
            f"| {bar['text']} | {bar['least']:g} | {shown} | {bar['verdict']} |"
        )
    parts = (_probe, _correctness, _products, _launches, _condensed, _tiles, _costs)
    parts = (*parts, _left_out)
    for part in parts:
        found = part(results)
        lines += ["", *found] if found else []
    return "\n".join(lines) + "\n"


def _table(*names: str) -> list[str]:
    return [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]


def _probe(results: Mapping[str, Any]) -> list[str]:
    rows = [row for row in results["rows"] if row["section"] == "probe"]
    if not rows:
        return []
    lines = ["### Positions as the hardware decodes them", ""]
    lines += _table("kernel", "dtype", "image", "verdict")
    for row in rows:
        known = f": {', '.join(row['reads_as'])}" if row.get("reads_as") else ""
        cells = (row["kernel"], row["dtype"], row["image"], row["verdict"] + known)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _correctness(results: Mapping[str, Any]) -> list[str]:
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results["rows"]:
        if row["section"] in CHECKS:
            groups.setdefault((row["kernel"], row["dtype"]), []).append(row)
    if not groups:
        return []
    lines = ["### Errors relative to float32", ""]
    lines += _table("kernel", "dtype", "cases", "right", "largest error", "run again")
    for (kernel, dtype), rows in groups.items():
        right = sum(row["verdict"] == "right" for row in rows)
        worst = max(number_of(row["error"]) for row in rows)
        again = {row["rerun"] for row in rows}
        text = "equal" if again == {"equal"} else "differs"
        cells = (kernel, dtype, len(rows), right, f"{worst:.1e}", text)
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return lines


def limits(results: Mapping[str, Any]) -> Callable[[Row], float | None]:
    """Give a function from a row to the least time that its work could take.

    It reads and writes its bytes at the rate of a copy, and multiplies at the highest
    rate that dense weights of its dtype reached in this run, 2:4 ones at twice that.

    Args:
      results: a run.

    Returns:
      From a row to microseconds, or None where the rate of a copy is not known.
    """
    rate = results["machine"].get("copy_gb_per_s")
    peaks: dict[str, float] = {}
    for row in results["rows"]:
        if "us" in row and "operations" in row and "dense" in row["kernel"]:
            own = row["operations"] / row["us"]
            peaks[row["dtype"]] = max(own, peaks.get(row["dtype"], 0.0))

    def limit(row: Row) -> float | None:
        if not rate:
            return None
        peak = peaks.get(row["dtype"], math.inf)
        twice = 1 if "dense" in row["kernel"] else 2
        return max(row["bytes"] / rate / 1e3, row["operations"] / peak / twice)

    return limit


def _products(results: Mapping[str, Any]) -> list[str]:
    cells = cells_of(results["rows"], TIMES)
    if not cells:
        return []
    limit = limits(results)
    lines = ["### 2:4 products", ""]
    lines += ["Times of one product in microseconds; TFLOP/s count the dense weights'"]
    lines += ["operations. Gains are over cuBLAS through JAX in the same process.", ""]
    names = ["dtype", "batch", "inputs → outputs", "cuBLAS", "XLA's choice", "nmjax"]
    names += ["TFLOP/s", "GB/s", "gain", "best tiles", "gain", "limit"]
    lines += _table(*names, "torch dense", "cuSPARSELt")
    for cell in sorted(cells, key=_place):
        one = next(iter(cell.values()))
        own, tiles = cell.get(OURS), fastest(cell, "tiles")
        shown = [one["dtype"], one["batch"], f"{one['inputs']} → {one['outputs']}"]
        shown += [_us(cell.get("dense")), _us(cell.get("dense, XLA's choice"))]
        shown += [_us(own), _tera(own), _giga(own), _gain(own)]
        shown += [_us(tiles), _gain(tiles)]
        least = limit(own) if own else None
        shown += ["–" if least is None else f"{least:.1f}"]
        peer = fastest(cell, "cuSPARSELt")
        name = f" ({peer['kernel'].split()[-1]})" if peer else ""
        shown += [_us(cell.get("torch dense")), _us(peer) + name]
        lines.append(f"| {' | '.join(map(str, shown))} |")
    return lines


def _launches(results: Mapping[str, Any]) -> list[str]:
    rows = [row for row in results["rows"] if row["section"] == "launches"]
    if not rows:
        return []
    lines = ["### Kernels alone, as the profiler sees them", ""]
    lines += _table("product", "of", "us", "launches", "kernels")
    for row in rows:
        cells = (name_of(row), row["kernel"], f"{row['kernel_us']:.2f}")
        names = ", ".join(f"`{name[:60]}`" for name in row["names"])
        lines.append(f"| {' | '.join(cells)} | {row['launches']:.3g} | {names} |")
    return lines


def _tiles(results: Mapping[str, Any]) -> list[str]:
    rows = [row for row in results["rows"] if row["section"] == "tune"]
    if not rows:
        return []
    lines = ["### Fastest tiles", "", *_table("product", "us", "default", "tiles")]
    for row in rows:
        tiles = ", ".join(f"{name} {value}" for name, value in row["tiles"].items())
        default = row["default_us"] or "–"
        lines.append(f"| {name_of(row)} | {row['us']} | {default} | {tiles} |")
    return lines


def _place(cell: Cell) -> tuple[Any, ...]:
    """Sort by dtype, squares first, then by weights and batch."""
    one = next(iter(cell.values()))
    sides = one["outputs"], one["inputs"]
    square = sides == (one["batch"], one["batch"])
    return one["dtype"], not square, *sides, one["batch"]


def _condensed(results: Mapping[str, Any]) -> list[str]:
    cells = cells_of(results["rows"], ("condensed",))
    if not cells:
        return []
    lines = ["### Constant fan-in and blocks", ""]
    names = ["weights", "kept", "dtype", "batch", "dense", "dense, highest", "nmjax"]
    names += ["gain", "best tiles", "BCOO", "torch dense", "torch CSR"]
    lines += _table(*names)
    for cell in cells:
        one = next(iter(cell.values()))
        own = cell.get(OURS)
        shown = [one["layout"], f"{one['density']:.0%}", one["dtype"], one["batch"]]
        shown += [_us(cell.get(n)) for n in ("dense", "dense, highest", OURS)]
        shown += [_gain(own), _us(fastest(cell, "tiles")), _us(cell.get("BCOO"))]
        shown += [_us(cell.get("torch dense")), _us(fastest(cell, "torch CSR"))]
        lines.append(f"| {' | '.join(map(str, shown))} |")
    return lines


def _costs(results: Mapping[str, Any]) -> list[str]:
    rows = [r for r in results["rows"] if r["section"] == "costs" and "us" in r]
    if not rows:
        return []
    lines = ["### Costs of training", "", *_table("of", "what", "us", "ratio", "to")]
    for row in rows:
        ratio = f"{row['ratio']:.2f} ({row['low']:.2f}–{row['high']:.2f})"
        cells = (row["of"], row["name"], f"{row['us']:.1f}", ratio, row["base"])
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _left_out(results: Mapping[str, Any]) -> list[str]:
    found = [t for t in results["tasks"] if t["status"] != "done"]
    reasons: dict[str, int] = {}
    for task in found:
        key = f"{task['section']}, {task['status']}: {task['message']}"
        reasons[key] = reasons.get(key, 0) + 1
    for row in results["rows"]:
        if row.get("absent"):
            key = f"{row['section']}, {row.get('kernel', row.get('name'))}: "
            key += str(row["absent"])
            reasons[key] = reasons.get(key, 0) + 1
    if not reasons:
        return []
    lines = ["### Not measured", ""]
    return lines + [f"- {text} ({count} times)" for text, count in reasons.items()]


def _us(row: Row | None) -> str:
    return "–" if row is None else f"{row['us']:.4g}"


def _tera(row: Row | None) -> str:
    return "–" if row is None else f"{row['operations'] / row['us'] / 1e6:.0f}"


def _giga(row: Row | None) -> str:
    return "–" if row is None else f"{row['bytes'] / row['us'] / 1e3:.0f}"


def _gain(row: Row | None) -> str:
    return "–" if row is None else f"{1 / row['ratio']:.2f}"


# Plot --------------------------------------------------------------------------------

LINES = {
    OURS: (0, "-"),
    "tiles": (1, "-"),
    "dense": (6, "-"),
    "torch dense": (6, "--"),
    "cuSPARSELt": (2, "--"),
    "BCOO": (4, ":"),
    "torch CSR": (3, "--"),
}
"""Colour and dashes of what is drawn; of several rows the fastest is."""


def plot(results: Mapping[str, Any], path: Path) -> Path | None:
    """Draw speed-ups over dense weights: squares, decoding, constant fan-in.

    Args:
      results: a run.
      path: the picture.

    Returns:
      The path, or None where there is nothing to draw.

    Raises:
      ImportError: matplotlib is not installed.
    """
    panels = _panels(results["rows"])
    if not panels:
        return None
    import matplotlib.figure
    import matplotlib.ticker

    from nmjax.reports.plots import COLOURS, grid, legend_below, save

    title = str(results["machine"].get("device", ""))
    figure, axes = grid(matplotlib.figure, len(panels), title)
    drawn: dict[str, Any] = {}
    for axis, (name, label, lines) in zip(axes, panels.values(), strict=False):
        for form, points in lines.items():
            colour, dashes = LINES[form]
            (drawn[form],) = axis.plot(
                *zip(*sorted(points), strict=True),
                color=COLOURS[colour],
                linestyle=dashes,
                marker="o",
                markersize=3,
                linewidth=1.4,
            )
        ticks = sorted({x for points in lines.values() for x, _ in points})
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_major_formatter(plain)
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_title(name)
        axis.set_xlabel(label)
        axis.set_ylabel("speed-up over dense")
        axis.grid(alpha=0.3)
    legend_below(figure, drawn, min(7, 2 * len(panels)))
    return save(figure, path)


def _panels(rows: Sequence[Row]) -> dict[str, tuple[str, str, Any]]:
    """Gather what is drawn: title, label and lines of each panel."""
    found: dict[str, tuple[str, str, dict[str, list[tuple[int, float]]]]] = {}
    for cell in cells_of(rows, (*TIMES, "condensed")):
        one = next(iter(cell.values()))
        base = cell.get("dense")
        if base is None:
            continue
        sides = one["outputs"], one["inputs"]
        label = "batch"
        if one["section"] == "condensed":
            if one["layout"] != "FanIn" or one["dtype"] != "float32":
                continue
            name = f"fan-in, {1 - one['density']:.0%} sparse"
        elif sides == (one["batch"], one["batch"]):
            name, label = f"2:4 {one['dtype']}, M = N = K", "size"
            if one["dtype"] == "float16":
                continue  # one size
        elif one["dtype"] in ("bfloat16", "float8_e4m3fn") and sides in WIDTHS:
            name = f"2:4 {one['dtype']}, {one['inputs']} → {one['outputs']}"
        else:
            continue
        lines = found.setdefault(name, (name, label, {}))[2]
        for form in LINES:
            row = cell.get(form) or fastest(cell, form)
            if row is not None and (form != "dense" or row is base):
                gain = base["us"] / row["us"]
                lines.setdefault(form, []).append((one["batch"], gain))
    return found
