"""Tables: rows of metrics as plain text, Markdown or a rich table."""

import importlib.util
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from nmjax.reports.history import Row, Scalar
from nmjax.reports.optional import require


def table(
    results: Sequence[Mapping[str, Scalar]],
    columns: Sequence[str] | None = None,
    *,
    title: str | None = None,
    digits: int = 4,
) -> str:
    """Lay rows out as aligned plain text, for a terminal or a log file.

    Args:
      results: the rows; a missing cell is shown as ``-``, NaN as ``nan``.
      columns: which columns, in order. Default: every key of any row, without
        the per-layer keys (those with a slash).
      title: a line above the table.
      digits: significant digits of the largest number of a float column.

    Returns:
      The text, without a newline at its end.

    Raises:
      ValueError: a column is in no row.

    Example:
      >>> from nmjax import reports
      >>> print(reports.table([{"method": "dense", "accuracy": 0.95, "step": 100},
      ...                      {"method": "srste", "accuracy": 0.9375, "step": 90}]))
      method  accuracy  step
      ------  --------  ----
      dense     0.9500   100
      srste     0.9375    90
    """
    names, cells, numeric = _layout(results, columns, digits)
    lines = [names, ["-"] * len(names), *cells]
    widths = [max(len(line[j]) for line in lines) for j in range(len(names))]
    lines[1] = ["-" * width for width in widths]
    text = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    ]
    return "\n".join([title, *text] if title else text)


def markdown(
    results: Sequence[Mapping[str, Scalar]],
    columns: Sequence[str] | None = None,
    *,
    digits: int = 4,
) -> str:
    """Lay rows out as a Markdown table.

    Args:
      results: the rows, as for `table`.
      columns: which columns, in order; default as for `table`.
      digits: significant digits, as for `table`.

    Returns:
      The text, without a newline at its end. A ``|`` in a cell is escaped.

    Raises:
      ValueError: a column is in no row.

    Example:
      >>> from nmjax import reports
      >>> print(reports.markdown([{"method": "srste", "accuracy": 0.9375}]))
      | method | accuracy |
      |:-------|---------:|
      | srste  |   0.9375 |
    """
    names, cells, numeric = _layout(results, columns, digits)
    lines = [[c.replace("|", "\\|") for c in line] for line in [names, *cells]]
    widths = [max(len(line[j]) for line in lines) for j in range(len(names))]
    text = [
        "| "
        + " | ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        + " |"
        for line in lines
    ]
    rule = (
        "-" * (width + 1) + ":" if right else ":" + "-" * (width + 1)
        for width, right in zip(widths, numeric, strict=True)
    )
    return "\n".join([text[0], "|" + "|".join(rule) + "|", *text[1:]])


def print_table(
    results: Sequence[Mapping[str, Scalar]],
    columns: Sequence[str] | None = None,
    *,
    title: str | None = None,
    digits: int = 4,
    file: Any = None,
) -> None:
    """Print rows: with rich on a terminal that has it, else as plain text.

    Args:
      results: the rows, as for `table`.
      columns: which columns, in order; default as for `table`.
      title: a line above the table.
      digits: significant digits, as for `table`.
      file: an open text file; default standard output.

    Raises:
      ValueError: a column is in no row.

    Example:
      >>> from nmjax import reports
      >>> reports.print_table([{"method": "dense", "runs": 3}])
      method  runs
      ------  ----
      dense      3
    """
    out = sys.stdout if file is None else file
    if out.isatty() and importlib.util.find_spec("rich") is not None:
        console = require("rich.console", "print_table").Console(file=out)
        console.print(rich_table(results, columns, title=title, digits=digits))
    else:
        print(table(results, columns, title=title, digits=digits), file=out)


def rich_table(
    results: Sequence[Mapping[str, Scalar]],
    columns: Sequence[str] | None = None,
    *,
    title: str | None = None,
    digits: int = 4,
) -> Any:
    """Lay rows out as a `rich.table.Table`, to print or to put in a live display.

    Args:
      results: the rows, as for `table`.
      columns: which columns, in order; default as for `table`.
      title: a line above the table.
      digits: significant digits, as for `table`.

    Returns:
      The `rich.table.Table`.

    Raises:
      ValueError: a column is in no row.
      ImportError: rich is not installed.

    Example:
      >>> from nmjax import reports
      >>> reports.rich_table([{"method": "dense", "runs": 3}]).row_count
      1
    """
    rich = require("rich.table", "rich_table")
    text = require("rich.text", "rich_table")
    names, cells, numeric = _layout(results, columns, digits)
    out = rich.Table(title=title, title_justify="left")
    for name, right in zip(names, numeric, strict=True):
        out.add_column(text.Text(name), justify="right" if right else "left")
    for line in cells:
        out.add_row(*(text.Text(cell) for cell in line))
    return out


def summarize(
    results: Sequence[Mapping[str, Scalar]], by: str = "method", *, digits: int = 4
) -> list[Row]:
    """Average the rows of a method's runs: mean ± sample standard deviation.

    Args:
      results: one row per run (a method with a seed).
      by: the column whose value names the method.
      digits: significant digits of a mean.

    Returns:
      One row per method, in order of appearance: the method, ``runs`` and, for every
      column that holds numbers, its mean as text, with ``± deviation`` where there
      are two runs or more. The columns ``seed`` and ``step`` are left out.

    Raises:
      ValueError: a row has no column `by`.

    Example:
      >>> from nmjax import reports
      >>> runs = [{"method": "dense", "seed": s, "accuracy": 0.9 + s / 100}
      ...         for s in range(3)]
      >>> reports.summarize(runs)
      [{'method': 'dense', 'runs': 3, 'accuracy': '0.9100 ± 0.0100'}]
    """
    groups: dict[Scalar, list[Mapping[str, Scalar]]] = {}
    for i, result in enumerate(results):
        if by not in result:
            raise ValueError(f"row {i} has no column {by!r}; it has {list(result)}")
        groups.setdefault(result[by], []).append(result)
    out: list[Row] = [{by: name, "runs": len(group)} for name, group in groups.items()]
    for key in dict.fromkeys(key for result in results for key in result):
        columns = [
            [r[key] for r in g if r.get(key) is not None] for g in groups.values()
        ]
        if key in (by, "seed", "step") or not all(map(_is_number, sum(columns, []))):
            continue
        samples = [np.array(column, dtype=float) for column in columns]
        means = [float(sample.mean()) if sample.size else None for sample in samples]
        spec = _number_format([mean for mean in means if mean is not None], digits)
        for line, sample, mean in zip(out, samples, means, strict=True):
            line[key] = None if mean is None else format(mean, spec)
            if sample.size > 1:
                line[key] = f"{line[key]} ± {format(float(sample.std(ddof=1)), spec)}"
    return out


def _is_number(value: Any) -> bool:
    """Tell whether a cell holds a number (a bool is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number_format(values: Sequence[Any], digits: int) -> str:
    """Choose one format for a column of numbers, so that its points line up."""
    if all(isinstance(value, int) for value in values):
        return "d"
    sizes = [abs(v) for v in values if v != 0 and math.isfinite(v)]
    if not sizes:
        return f".{digits - 1}f"
    decimals = max(0, digits - 1 - math.floor(math.log10(max(sizes))))
    if max(sizes) >= 1e7 or decimals > digits + 1 or min(sizes) < 0.5 * 10**-decimals:
        return f".{digits - 1}e"
    return f".{decimals}f"


def _layout(
    results: Sequence[Mapping[str, Scalar]],
    columns: Sequence[str] | None,
    digits: int,
) -> tuple[list[str], list[list[str]], list[bool]]:
    """Choose the columns and format every cell; tell which columns are numbers."""
    known = list(dict.fromkeys(key for one_row in results for key in one_row))
    if columns is None:
        columns = [key for key in known if "/" not in key]
    for name in columns:
        if name not in known:
            raise ValueError(f"no row has a column {name!r}; there are {known}")
    texts, numeric = [], []
    for name in columns:
        column = [one_row.get(name) for one_row in results]
        numbers = [value for value in column if _is_number(value)]
        spec = _number_format(numbers, digits)
        texts.append(
            [
                "-" if v is None else format(v, spec) if _is_number(v) else str(v)
                for v in column
            ]
        )
        numeric.append(
            bool(numbers) and all(_is_number(v) or v is None for v in column)
        )
    return list(columns), [list(line) for line in zip(*texts, strict=True)], numeric
