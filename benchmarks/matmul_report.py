"""What matmul.py makes of its rows: bars, the table of best forms, tables, a plot.

A row is one form of one case at one batch size, a dict with the keys ``section``,
``layers``, ``format``, ``layout``, ``density``, ``values``, ``batch``, ``form`` and
either ``absent``, the reason why it was not measured, or

- ``ms``: median time of a call;
- ``ratio_to_dense``: median ratio to dense weights in the dtype of x, and ``low`` and
  ``high``, its quartiles;
- ``ratio_to_float32``: median ratio to dense float32 weights;
- ``limit_ms``: what reading the bytes takes that the form has to touch.

Everything here is a pure function of rows.
"""

import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nmjax.kernels import choosing
from nmjax.reports.plots import COLOURS, grid, legend_below, save

Row = Mapping[str, Any]

CELL = ("section", "layers", "format", "layout", "density", "values", "batch")
"""Keys of what is measured together: forms of one cell are compared."""

LAYOUT = ("format", "layout", "values", "density")
"""Keys of a line of the table of best forms."""

NUMBERS = ("ms", "ratio_to_float32", "ratio_to_dense", "low", "high", "limit_ms")
"""Keys of what was measured."""

# Bars --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bar:
    """How much faster a form must be than another, in every cell that matches.

    Attributes:
      text: what is measured, in words.
      where: values of a row's keys.
      forms: the forms that count; the fastest of a cell is compared.
      over: the form that they are compared to.
      least: lowest speed-up over it.
    """

    text: str
    where: Mapping[str, Any]
    forms: tuple[str, ...]
    over: str
    least: float


CHAIN = "6 x (768 -> 3072 -> 768)"
SQUARE = "4 x (4096 -> 4096)"


def bars() -> list[Bar]:
    """List the bars that a release must keep on two cores."""
    native, xla = ("native", "prepared"), ("xla",)
    best = ("nmjax", "native", "xla", "prepared")
    found = []
    for layers in ("3072 -> 768", "768 -> 3072"):
        where = {"section": "single", "layers": layers, "density": 0.1, "batch": 1}
        text = f"fan-in 90 %, {layers}, batch 1"
        found.append(
            Bar(f"{text}: native or prepared / dense", where, native, "dense", 4.5)
        )
        text = f"{text}: native or prepared / scipy CSR"
        found.append(Bar(text, where, native, "scipy CSR", 3.0))
    chain: dict[str, Any] = {"section": "chain", "layers": CHAIN}
    for batch, least in ((8, 4.0), (64, 3.0), (256, 3.0)):
        where = chain | {"density": 0.1, "batch": batch}
        text = f"fan-in 90 %, chain, batch {batch}"
        found.append(
            Bar(f"{text}: native or prepared / dense", where, native, "dense", least)
        )
        if batch >= 64:
            found.append(Bar(f"{text}: XLA alone / dense", where, xla, "dense", 2.5))
    where = chain | {"density": 0.01, "batch": 64}
    text = "fan-in 99 %, chain, batch 64: best / dense"
    found.append(Bar(text, where, best, "dense", 12.0))
    where = {"section": "block", "layers": CHAIN, "layout": "16x1", "density": 0.1}
    text = "block 16x1 90 %, chain, batch 1: best / dense"
    found.append(Bar(text, where | {"batch": 1}, best, "dense", 8.0))
    square: dict[str, Any] = {"section": "nm", "layers": SQUARE, "batch": 1}
    where = square | {"values": "bfloat16"}
    mixed = (*best, "native, x float32")
    text = "2:4 bfloat16 values, chain, batch 1: best / dense float32"
    found.append(Bar(text, where, mixed, "dense float32", 2.5))
    where = square | {"values": "int8"}
    text = "2:4 int8 values, chain, batch 1: best / torch's dynamic int8"
    found.append(Bar(text, where, best, "torch int8", 1.0))
    text = "everything: what dispatch picks / masked dense"
    found.append(Bar(text, {}, ("nmjax",), "masked dense", 1 / 1.1))
    return found


def verdicts(rows: Iterable[Row], wanted: Sequence[Bar] | None = None) -> list[Row]:
    """Check bars.

    Args:
      rows: rows of one run.
      wanted: the bars. Default: `bars`.

    Returns:
      For each bar its text, ``least``, the lowest speed-up ``measured`` over all cells
      that match (None where there is none), that ``cell``, and the ``verdict``: kept,
      MISSED or not measured, with a reason.
    """
    cells = cells_of(rows)
    return [_verdict(bar, cells) for bar in (bars() if wanted is None else wanted)]


def _verdict(bar: Bar, cells: Sequence[Mapping[str, Row]]) -> Row:
    found, reasons = [], []
    for cell in cells:
        one = next(iter(cell.values()))
        if any(one[key] != value for key, value in bar.where.items()):
            continue
        times = {n: row["ratio_to_float32"] for n, row in cell.items() if "ms" in row}
        fastest = min((times[name] for name in bar.forms if name in times), default=0)
        if fastest and bar.over in times:
            found.append((times[bar.over] / fastest, one))
            continue
        names = (*bar.forms, bar.over)
        rows = [cell[name] for name in names if name in cell]
        reasons += [
            f"{row['form']}: {row['absent']}" for row in rows if "ms" not in row
        ]
    base = {"text": bar.text, "least": bar.least, "measured": None, "cell": None}
    if not found:
        reason = reasons[0] if reasons else "no such rows"
        return base | {"verdict": f"not measured ({reason})"}
    measured, one = min(found, key=lambda pair: pair[0])
    verdict = "kept" if measured >= bar.least else "MISSED"
    cell = ", ".join(f"{key} {one[key]}" for key in CELL if one[key] != "")
    return base | {"measured": measured, "cell": cell, "verdict": verdict}


def cells_of(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Group rows by cell, form -> row."""
    cells: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        cells.setdefault(tuple(row[key] for key in CELL), {})[row["form"]] = row
    return list(cells.values())


def combined(
    runs: Iterable[Iterable[Row]],
    how: Callable[[Iterable[float]], float] = statistics.median,
) -> list[dict[str, Any]]:
    """Combine runs, one of which may have caught a form at a bad moment.

    Args:
      runs: the rows of each run.
      how: what to make of the numbers of several runs.

    Returns:
      A row for each form of each cell, with numbers made of those of the runs that
      measured it.
    """
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in itertools.chain.from_iterable(runs):
        found.setdefault((*(row[key] for key in CELL), row["form"]), []).append(row)
    out = []
    for rows in found.values():
        measured = [row for row in rows if "ms" in row]
        numbers = {
            key: how([row[key] for row in measured]) for key in NUMBERS if measured
        }
        out.append({**(measured or rows)[0], **numbers})
    return out


def bars_to_text(found: Iterable[Row]) -> str:
    """Format verdicts, a line each."""
    lines = ["\nbars"]
    for row in found:
        measured = row["measured"]
        shown = "     -" if measured is None else f"{measured:5.2f}x"
        line = f"  {shown} (bar {row['least']:.3g})  {row['text']}: {row['verdict']}"
        if row["verdict"] == "MISSED" or row["text"].startswith("everything"):
            line += f" at {row['cell']}" if row["cell"] else ""
        lines.append(line)
    return "\n".join(lines)


# The table of best forms -------------------------------------------------------------


def best_forms(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Choose the fastest form of every cell.

    Args:
      rows: rows of the section "table".

    Returns:
      For each cell the keys of `LAYOUT`, ``batch``, the fastest ``form`` of those that
      dispatch can choose from, its ``speedup`` over dense weights of the same dtype,
      and whether it ``beats_dense``, with its upper quartile too: a tie goes to dense.
      Cells in which none was measured are left out.
    """
    best = []
    for cell in cells_of(rows):
        found = [cell[name] for name in choosing.FORMS if "ms" in cell.get(name, {})]
        if not found:
            continue
        row = min(found, key=lambda row: row["ratio_to_dense"])
        entry = {key: row[key] for key in (*LAYOUT, "batch", "form")}
        speedup, beats = 1 / row["ratio_to_dense"], row["high"] < 1
        best.append(entry | {"speedup": speedup, "beats_dense": beats})
    return best


def to_forms(rows: Iterable[Row], machine: Mapping[str, str]) -> dict[str, Any]:
    """Make the table that dispatch chooses by, `nmjax/kernels/cpu_forms.json`.

    Args:
      rows: rows of the section "table".
      machine: what was measured on, from `timing.describe`.

    Returns:
      The machine and, for each cell, the keys of `LAYOUT`, ``batch`` and ``ratios``:
      from the forms of dispatch that were measured to their time relative to dense
      weights of the same dtype.
    """
    found = []
    for cell in cells_of(rows):
        ratios = {
            name: round(cell[name]["ratio_to_dense"], 3)
            for name in choosing.FORMS
            if "ms" in cell.get(name, {})
        }
        if ratios:
            row = next(iter(cell.values()))
            keys = {key: row[key] for key in (*LAYOUT, "batch")}
            found.append(keys | {"ratios": ratios})
    return {"machine": dict(machine), "rows": found}


def to_json(results: Mapping[str, Any]) -> str:
    """Format results as JSON, a line for each of their rows.

    Args:
      results: what can be written as JSON, with a list ``rows`` of dicts.

    Returns:
      The text; numbers of rows have four significant digits.
    """
    head = {key: value for key, value in results.items() if key != "rows"}
    rows = [
        {key: _short(value) for key, value in row.items()} for row in results["rows"]
    ]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
    return f'{json.dumps(head, indent=1)[:-2]},\n "rows": [\n{lines}\n ]\n}}\n'


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def to_markdown(best: Sequence[Row], machine: Mapping[str, str]) -> str:
    """Format the table of best forms for the docs.

    Args:
      best: what `best_forms` gave.
      machine: what was measured on, from `timing.describe`.

    Returns:
      A heading and a table for each format. A cell names the fastest form and its
      speed-up over dense weights; a dash stands where dense wins, and a space where
      nothing was measured.
    """
    facts = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines = [f"Measured on {facts}.", ""]
    for kind in dict.fromkeys(row["format"] for row in best):
        own = [row for row in best if row["format"] == kind]
        batches = sorted({row["batch"] for row in own})
        lines += [f"### {kind}Array", ""]
        lines.append("| " + " | ".join(["weights", *map(str, batches)]) + " |")
        lines.append("|---" * (len(batches) + 1) + "|")
        for layout in dict.fromkeys(_layout_of(row) for row in own):
            cells = {
                row["batch"]: _cell_of(row) for row in own if _layout_of(row) == layout
            }
            shown = [layout, *(cells.get(batch, "") for batch in batches)]
            lines.append("| " + " | ".join(shown) + " |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _layout_of(row: Row) -> str:
    """Name a layout: "16x1, 10 %", "2:4 bfloat16"."""
    kept = f"{100 * row['density']:g} %"
    values = "" if row["values"] == "float32" else f" {row['values']}"
    if row["format"] == "NM":
        return f"{row['layout']}{values}"
    return f"{row['layout']}, {kept}{values}" if row["layout"] else f"{kept}{values}"


def _cell_of(row: Row) -> str:
    return f"{row['form']} {row['speedup']:.1f}x" if row["beats_dense"] else "–"


# Printed tables ----------------------------------------------------------------------


def cell_to_text(title: str, rows: Sequence[Row]) -> str:
    """Format the forms of a cell, a line each."""
    width = max(len(row["form"]) for row in rows)
    head = f"{'ms':>9}  {'speed-up':>8}  {'quartiles':>13}  {'limit ms':>8}"
    lines = [f"\n{title}", f"{'':{width}}  {head}"]
    for row in rows:
        if "ms" not in row:
            lines.append(f"{row['form']:{width}}          -  {row['absent']}")
            continue
        spread = f"{1 / row['high']:.2f}-{1 / row['low']:.2f}"
        line = f"{row['form']:{width}}  {row['ms']:9.3f}"
        line += f"  {1 / row['ratio_to_dense']:8.2f}  {spread:>13}"
        line += f"  {row['limit_ms']:8.3f}  {row.get('note', '')}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def cell_to_line(rows: Sequence[Row]) -> str:
    """Format the speed-ups of a cell in one line."""
    one = rows[0]
    name = f"{one['format']} {one['layout']}".strip()
    shown = [
        f"{row['form']} {1 / row['ratio_to_dense']:.2f}" for row in rows if "ms" in row
    ]
    line = f"{name} {one['density']:g} {one['values']}, batch {one['batch']}: "
    return line + ", ".join(shown)


# Plot --------------------------------------------------------------------------------

STYLES = {
    "nmjax": (COLOURS[0], "-"),
    "native": (COLOURS[1], "-"),
    "prepared": (COLOURS[0], "--"),
    "xla": (COLOURS[5], "-"),
    "masked dense": (COLOURS[6], ":"),
    "scipy CSR": (COLOURS[2], "--"),
    "torch dense": (COLOURS[6], "--"),
    "torch CSR": (COLOURS[3], "--"),
    "BCOO": (COLOURS[4], ":"),
    "BCSR": (COLOURS[4], "--"),
}
"""Colour and dashes of the forms that are drawn."""


def plot(rows: Sequence[Row], path: str | Path, title: str | None = None) -> Path:
    """Draw speed-up over dense against batch, a panel per sparsity, a line per form.

    Args:
      rows: rows of the section "chain", or of "single" where there are none.
      path: the picture; its ending names the format.
      title: a line above the panels.

    Returns:
      The path of the picture.

    Raises:
      ValueError: there are no such rows.
    """
    import matplotlib.figure
    import matplotlib.ticker

    drawn = [row for row in rows if "ms" in row and row["form"] in STYLES]
    for section in ("chain", "single"):
        own = [row for row in drawn if row["section"] == section]
        if own:
            break
    else:
        raise ValueError("no row of the sections chain or single can be drawn")
    own = [row for row in own if row["layers"] == own[0]["layers"]]
    densities = sorted({row["density"] for row in own}, reverse=True)
    figure, axes = grid(matplotlib.figure, len(densities), title)
    batches = sorted({row["batch"] for row in own})
    found = [1 / row["ratio_to_dense"] for row in own]
    lines: dict[str, Any] = {}
    for axis, density in zip(axes, densities, strict=False):
        for form, (colour, dashes) in STYLES.items():
            points = sorted(
                (row["batch"], 1 / row["ratio_to_dense"])
                for row in own
                if row["form"] == form and row["density"] == density
            )
            if points:
                (lines[form],) = axis.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    linestyle=dashes,
                    marker="o",
                    markersize=3,
                    linewidth=1.4,
                )
        axis.axhline(1, color="0.4", linewidth=1)
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_ylim(min(found) / 1.2, max(found) * 1.2)
        plain = matplotlib.ticker.FuncFormatter(lambda value, _: f"{value:g}")
        axis.yaxis.set_major_formatter(plain)
        axis.yaxis.set_minor_formatter(matplotlib.ticker.NullFormatter())
        axis.set_xticks(batches, [str(batch) for batch in batches])
        axis.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        axis.set_title(f"{100 * (1 - density):g} % sparse")
        axis.set_xlabel("batch")
        axis.set_ylabel("speed-up over dense XLA")
        axis.grid(alpha=0.3)
    legend_below(figure, lines, 5)
    return save(figure, path)
