"""Tables, files and pictures of a history."""

import io
import json
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nmjax import reports
from nmjax.reports import plots, series, tables


def history(steps=12, layers=3, seed=0, changing=False):
    """Make rows as a training run logs them."""
    rng = np.random.default_rng(seed)
    rows = []
    for step in range(steps):
        row = {"step": step, "loss": 2.0 * 0.9**step + 0.01 * rng.random()}
        row |= {"flip_rate": 0.1 * 0.5**step, "density": 0.5, "kept_magnitude": 0.8}
        if step % 4 == 0:
            row["eval_loss"] = row["loss"] + 0.1
        for i in range(layers):
            path = f"params/layer_{i}/kernel"
            row[f"flip_rate/{path}"] = row["flip_rate"] * (i + 1)
            row[f"density/{path}"] = 0.5 - changing * 0.01 * step
            row[f"kept_magnitude/{path}"] = 0.7 + 0.01 * i
        rows.append(row)
    return rows


# Rows and histories.


def test_row_holds_python_scalars_of_the_right_kind():
    metrics = {
        "loss": jnp.array(0.5, jnp.bfloat16),
        "sad": jnp.array(3, jnp.int32),
        "done": jnp.array(True),
        "rate": np.float32(0.25),
        "name": "x",
        "none": None,
    }
    row = reports.row(metrics, step=4)
    assert list(row) == ["step", *metrics]
    assert [type(value) for value in row.values()] == [
        int,
        float,
        int,
        bool,
        float,
        str,
        type(None),
    ]
    assert (row["loss"], row["sad"], row["rate"]) == (0.5, 3, 0.25)


def test_row_refuses_arrays_and_double_names():
    with pytest.raises(ValueError, match=r"'loss' has shape \(2,\).*reports.rows"):
        reports.row({"loss": jnp.ones(2)})
    with pytest.raises(ValueError, match=r"'step' is given both"):
        reports.row({"step": 1}, step=2)


def test_rows_unstack_the_metrics_of_a_scan():
    stacked = {"loss": jnp.array([3.0, 2.0]), "sad": jnp.array([7, 0])}
    assert reports.rows(stacked, steps=range(5, 7)) == [
        {"step": 5, "loss": 3.0, "sad": 7},
        {"step": 6, "loss": 2.0, "sad": 0},
    ]
    with pytest.raises(ValueError, match=r"'loss' has shape \(2,\); 3 steps"):
        reports.rows({"loss": jnp.ones(2)}, steps=range(3))


def test_by_layer_gives_a_line_per_path():
    rows = reports.by_layer(history()[-1])
    assert [row["layer"] for row in rows] == [
        f"params/layer_{i}/kernel" for i in range(3)
    ]
    assert set(rows[0]) == {"layer", "flip_rate", "density", "kept_magnitude"}


# JSON.

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)


@given(
    rows=st.lists(st.dictionaries(st.text(max_size=5), scalars, max_size=4), max_size=4)
)
@pytest.mark.filterwarnings("ignore:history written to")
def test_json_gives_back_what_was_written(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("json") / "history.json"
    reports.write_json(rows, path)
    assert repr(reports.read_json(path)) == repr(rows)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(name))


def test_values_that_are_not_finite_are_written_with_a_warning(tmp_path):
    rows = [{"loss": 1.0}, {"loss": float("nan"), "grad": float("-inf")}]
    with pytest.warns(UserWarning, match=r"'loss' in row 1 is nan \(2 values"):
        reports.write_json(rows, tmp_path / "a" / "history.json")
    back = reports.read_json(tmp_path / "a" / "history.json")
    assert repr(back[1]) == "{'loss': nan, 'grad': -inf}"
    with pytest.raises(ValueError, match=r"'loss' in row 1 is nan.*nonfinite='raise'"):
        reports.write_json(rows, tmp_path / "b.json", nonfinite="raise")
    assert not (tmp_path / "b.json").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "history.json"
    reports.write_json([{"loss": 1.0}], path)
    with pytest.raises(TypeError, match=r"'loss' in row 0 is a .*Array.*reports.row"):
        reports.write_json([{"loss": jnp.ones(())}], path)
    assert reports.read_json(path) == [{"loss": 1.0}]
    assert [file.name for file in tmp_path.iterdir()] == ["history.json"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("[{", "is not JSON"),
        ('{"loss": 1}', "holds a dict, not a list"),
        ("[1]", "row 0 is a int"),
        ('[{"loss": [1]}]', "'loss' in row 0 is .*not a scalar"),
    ],
)
def test_files_of_another_form_are_refused(text, message, tmp_path):
    path = tmp_path / "history.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        reports.read_json(path)


# Tables.


def test_table_aligns_points_and_shows_what_is_missing_or_not_finite():
    rows = [
        {"method": "dense", "loss": 12.5, "steps": 1000},
        {"method": "srste", "loss": float("nan"), "steps": 90, "note": "diverged"},
        {"method": "ste", "steps": None},
    ]
    assert reports.table(rows, title="Runs").splitlines() == [
        "Runs",
        "method   loss  steps  note",
        "------  -----  -----  --------",
        "dense   12.50   1000  -",
        "srste     nan     90  diverged",
        "ste         -      -  -",
    ]


def test_table_leaves_layers_out_unless_asked():
    rows = history(steps=2)
    assert "/" not in reports.table(rows)
    path = "density/params/layer_0/kernel"
    assert reports.table(rows, ["step", path]).splitlines()[0] == f"step  {path}"
    with pytest.raises(ValueError, match=r"no row has a column 'lose'.*'loss'"):
        reports.table(rows, ["lose"])


@pytest.mark.parametrize(
    "values, texts",
    [
        ([0.5, 0.25], ["0.5000", "0.2500"]),
        ([1234.5, 1.0], ["1234", "1"]),
        ([0.1, 1e-6], ["1.000e-01", "1.000e-06"]),
        ([2e-7, 3e-8], ["2.000e-07", "3.000e-08"]),
        ([0.0, -0.0], ["0.000", "-0.000"]),
        ([3, -20], ["3", "-20"]),
        ([float("inf"), 2.0], ["inf", "2.000"]),
        ([True, False], ["True", "False"]),
    ],
)
def test_columns_have_one_number_format(values, texts):
    assert [
        line[0] for line in tables._layout([{"x": v} for v in values], None, 4)[1]
    ] == (texts)


def test_markdown_escapes_bars():
    text = reports.markdown([{"a|b": "x|y", "n": 1}, {"a|b": "z", "n": 20}])
    assert text.splitlines() == [
        "| a\\|b |  n |",
        "|:-----|---:|",
        "| x\\|y |  1 |",
        "| z    | 20 |",
    ]


def test_summary_gives_mean_and_sample_deviation():
    runs = [
        {"method": "dense", "seed": 0, "accuracy": 0.9, "loss": 1.0, "host": "a"},
        {"method": "srste", "seed": 0, "accuracy": 0.8, "loss": 2.0, "host": "b"},
        {"method": "dense", "seed": 1, "accuracy": 0.94, "loss": None, "host": "a"},
    ]
    assert reports.summarize(runs) == [
        {"method": "dense", "runs": 2, "accuracy": "0.9200 ± 0.0283", "loss": "1.000"},
        {"method": "srste", "runs": 1, "accuracy": "0.8000", "loss": "2.000"},
    ]
    with pytest.raises(ValueError, match=r"row 0 has no column 'name'"):
        reports.summarize(runs, by="name")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_print_table_is_plain_in_a_file_and_rich_on_a_terminal(monkeypatch):
    rows = [{"method": "[bold]dense", "loss": 0.5}]
    plain, rich = io.StringIO(), Terminal()
    reports.print_table(rows, file=plain)
    assert plain.getvalue() == reports.table(rows) + "\n"
    reports.print_table(rows, file=rich)
    assert "┏━━" in rich.getvalue() and "[bold]dense" in rich.getvalue()


def test_missing_packages_say_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "rich.table", None)
    hint = r"needs {}, which is not installed: .*nmjax\[examples\]"
    with pytest.raises(ImportError, match="plot_history " + hint.format("matplotlib")):
        reports.plot_history(history(), tmp_path / "a.png")
    with pytest.raises(
        ImportError, match="plot_comparison " + hint.format("matplotlib")
    ):
        reports.plot_comparison({"a": history()}, tmp_path / "a.png")
    with pytest.raises(ImportError, match="rich_table " + hint.format("rich")):
        reports.rich_table(history())


# Plots.


def drawn(monkeypatch, plot, *arguments, **options):
    """Draw, and give the figure that was saved."""
    figures, save = [], plots.save
    monkeypatch.setattr(
        plots,
        "save",
        lambda figure, path: figures.append(figure) or save(figure, path),
    )
    path = plot(*arguments, **options)
    assert path.stat().st_size > 1000
    return figures[0]


def titles(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


def test_plot_history_draws_a_panel_per_metric(monkeypatch, tmp_path):
    figure = drawn(
        monkeypatch, plots.plot_history, history(), tmp_path / "new" / "a.png"
    )
    loss, flips, density, kept = figure.axes
    assert titles(figure) == [
        "loss",
        "flip rate",
        "density per layer",
        "kept magnitude",
    ]
    assert [text.get_text() for text in loss.get_legend().get_texts()] == [
        "loss",
        "eval_loss",
    ]
    assert [len(line.get_xdata()) for line in loss.lines] == [12, 3]
    assert loss.get_yscale() == "linear" and flips.get_yscale() == "log"
    assert len(flips.lines) == len(kept.lines) == 4
    assert [bar.get_width() for bar in density.patches] == [0.5] * 3
    assert [t.get_text() for t in density.get_yticklabels()] == [
        "layer_0",
        "layer_1",
        "layer_2",
    ]
    legend = figure.legends[0].get_texts()
    assert [text.get_text() for text in legend] == ["layer_0", "layer_1", "layer_2"]


def test_densities_that_change_are_lines_and_many_layers_get_a_bar(
    monkeypatch, tmp_path
):
    rows = history(steps=3, layers=40, changing=True)
    figure = drawn(
        monkeypatch, plots.plot_history, rows, tmp_path / "a.png", panels=["density"]
    )
    panel, bar = figure.axes
    assert len(panel.lines) == 41 and not panel.patches and not figure.legends
    assert bar.get_ylabel() == "layer, first to last"
    assert [text.get_text() for text in bar.get_yticklabels()][::11] == [
        "layer_0",
        "layer_39",
    ]


def test_points_that_are_not_finite_are_told(monkeypatch, tmp_path):
    rows = history(layers=0)
    rows[7]["loss"], rows[9]["loss"] = float("nan"), float("inf")
    figure = drawn(
        monkeypatch, plots.plot_history, rows, tmp_path / "a.png", panels=["loss"]
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == ["2 points not finite, from step 7"]


def test_zero_flip_rates_stay_visible(monkeypatch, tmp_path):
    rows = history(layers=0)
    rows[0]["flip_rate"] = 0.0
    figure = drawn(
        monkeypatch, plots.plot_history, rows, tmp_path / "a.png", panels=["flip_rate"]
    )
    assert figure.axes[0].get_yscale() == "symlog"


def test_panels_of_dynamic_training_say_what_they_show(monkeypatch, tmp_path):
    rows = [
        {"step": i, "itop": 0.1 * (i + 1), "itop/a/kernel": 0.1 * (i + 1)}
        | {"active_neurons": 1 - 0.1 * i, "active_neurons/a/kernel": 1 - 0.1 * i}
        | {"fan_in_max": 4 + i, "fan_in_max/a/kernel": 4 + i}
        for i in range(4)
    ]
    both = ["positions explored (ITOP)", "share of active neurons"]
    names = ["itop", "active_neurons", "fan_in_max"]
    for plot, runs in (
        (plots.plot_history, rows),
        (plots.plot_comparison, {"rigl": rows, "srigl": rows}),
    ):
        figure = drawn(monkeypatch, plot, runs, tmp_path / "a.png")
        assert titles(figure) == both
        figure = drawn(monkeypatch, plot, runs, tmp_path / "a.png", panels=names)
        assert titles(figure) == [*both, "largest fan-in"]
        assert [axis.get_ylim()[0] for axis in figure.axes] == [0.0, 0.0, 0.0]


def test_comparison_draws_mean_and_range_over_seeds(monkeypatch, tmp_path):
    def run(level):
        return [{"step": i, "loss": level + i} for i in range(4)]

    runs = {"dense": [run(1.0), run(2.0), run(6.0)[:3]], "srste": run(4.0)}
    figure = drawn(
        monkeypatch, plots.plot_comparison, runs, tmp_path / "a.png", title="Methods"
    )
    (axis,) = figure.axes
    dense, srste = axis.lines
    np.testing.assert_allclose(dense.get_xdata(), [0, 1, 2])
    np.testing.assert_allclose(dense.get_ydata(), [3.0, 4.0, 5.0])
    np.testing.assert_allclose(srste.get_ydata(), [4.0, 5.0, 6.0, 7.0])
    band = axis.collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == (1.0, 8.0)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "dense (mean and range of 3 seeds)",
        "srste",
    ]


def test_long_lines_are_drawn_as_means():
    steps, values = np.arange(1001.0), np.ones(1001)
    thin_steps, thin_values = series.thin(steps, values)
    assert len(thin_steps) == len(thin_values) == series.MAX_POINTS
    assert (np.diff(thin_steps) > 0).all() and (thin_values == 1.0).all()
    np.testing.assert_allclose(np.average(thin_steps), 500.0, atol=0.5)


@pytest.mark.parametrize(
    "layers, names",
    [
        (["p/a/kernel", "p/b/kernel"], ["a", "b"]),
        (["p/a/q/kernel", "p/a/k/kernel"], ["q", "k"]),
        (["p/kernel", "p/a/kernel"], ["kernel", "a/kernel"]),
        (["p/a/kernel"], ["p/a/kernel"]),
        (["a", "b"], ["a", "b"]),
        (["x/a/x", "x/b/x", "x/x"], ["a/x", "b/x", "x"]),
    ],
)
def test_labels_leave_out_what_all_layers_share(layers, names):
    assert series.short_names(layers) == names


def test_plots_of_nothing_are_refused(tmp_path):
    path = tmp_path / "a.png"
    with pytest.raises(ValueError, match=r"no row has a metric 'bleu'.*'loss'"):
        reports.plot_history(history(), path, panels=["loss", "bleu"])
    with pytest.raises(ValueError, match=r"no row has x='epoch'"):
        reports.plot_history(history(), path, x="epoch")
    with pytest.raises(ValueError, match=r"nothing to draw"):
        reports.plot_history([{"step": 1, "bleu": 30.0}], path)
    with pytest.raises(ValueError, match=r"no row has x='step'"):
        reports.plot_comparison({}, path)
    with pytest.raises(ValueError, match=r"method 'ste' has no history"):
        reports.plot_comparison({"dense": history(), "ste": []}, path)
    assert not path.exists()
