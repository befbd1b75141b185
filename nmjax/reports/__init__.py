"""Reports: metrics of a training run -> tables, Markdown, JSON and plots.

Tables and JSON need no further package; `rich_table` needs rich, plots need
matplotlib. Both are imported when first used and come with ``nmjax[examples]``.

Example:
  >>> from nmjax import reports
  >>> history = [reports.row({"loss": 1 / step}, step=step) for step in (1, 2)]
  >>> reports.print_table(history)
  step   loss
  ----  -----
     1  1.000
     2  0.500
"""

from nmjax.reports.history import (
    History,
    Row,
    Scalar,
    by_layer,
    read_json,
    row,
    rows,
    write_json,
)
from nmjax.reports.plots import plot_comparison, plot_history
from nmjax.reports.series import PANELS
from nmjax.reports.sweep import plot_sweep
from nmjax.reports.tables import markdown, print_table, rich_table, summarize, table

__all__ = [
    "PANELS",
    "History",
    "Row",
    "Scalar",
    "by_layer",
    "markdown",
    "plot_comparison",
    "plot_history",
    "plot_sweep",
    "print_table",
    "read_json",
    "rich_table",
    "row",
    "rows",
    "summarize",
    "table",
    "write_json",
]
