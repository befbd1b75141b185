"""The benchmark of products runs, checks what it times, and judges rows rightly."""

import importlib
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


def row(form, ratio=None, *, high=None, absent=None, section="table", **keys):
    cell = {"section": section, "layers": "8 -> 8", "format": "FanIn", "layout": ""}
    cell |= {"density": 0.1, "values": "float32", "batch": 1, "form": form} | keys
    if absent:
        return cell | {"absent": absent}
    times = {"ms": ratio, "ratio_to_dense": ratio, "ratio_to_float32": ratio}
    return cell | times | {"low": ratio, "high": high or ratio, "limit_ms": 0.1}


# The run ----------------------------------------------------------------------------


def test_smoke_run_writes_rows_table_and_plot(load, tmp_path, capsys):
    files = {name: tmp_path / f"matmul.{name}" for name in ("json", "markdown", "png")}
    command = ["--smoke", "--json", str(files["json"])]
    command += ["--markdown", str(files["markdown"]), "--plot", str(files["png"])]
    command += ["--forms", str(tmp_path / "forms.json")]
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        load("matmul").main(command)
    finally:
        jax.config.update("jax_disable_most_optimizations", False)
    found = json.loads(files["json"].read_text())
    assert set(found) == {"machine", "bars", "best", "rows"}
    assert set(found["machine"]) >= {"date", "jax", "processor", "threads"}
    rows = {
        (r["section"], r["format"], r["values"], r["form"]): r for r in found["rows"]
    }
    for section in ("single", "chain"):
        for form in ("dense", "masked dense", "nmjax", "xla", "scipy CSR", "BCSR"):
            assert (section, "FanIn", "float32", form) in rows
        assert (section, "FanIn", "float32", "prepared") in rows
    for form in ("dense", "dense float32", "masked dense", "nmjax", "decompress"):
        assert ("table", "NM", "bfloat16", form) in rows
    assert ("table", "FanIn", "float32", "slots") in rows
    assert ("block", "Block", "float32", "scipy BSR") in rows
    for one in found["rows"]:
        measured = all(one.get(k, 0) > 0 for k in ("ms", "ratio_to_dense", "limit_ms"))
        assert measured != bool(one.get("absent"))
    assert not any("absent" in rows[key] for key in rows if key[-1] in ("dense", "xla"))
    kinds = ["FanIn", "Window", "NM", "Block"]
    assert {entry["format"] for entry in found["best"]} == set(kinds)
    forms = json.loads((tmp_path / "forms.json").read_text())["rows"]
    assert [entry["format"] for entry in forms] == kinds
    assert "### NMArray" in files["markdown"].read_text()
    assert files["png"].read_bytes()[:4] == b"\x89PNG"
    printed = capsys.readouterr().out
    assert "chain: 1 x (32 -> 64 -> 32), FanIn 0.1, float32, batch 1" in printed
    assert printed.count("not measured") == len(found["bars"])
    again, run = tmp_path / "again.json", str(files["json"])
    load("matmul").main(["--runs", run, run, "--forms", str(again)])
    again = json.loads(again.read_text())
    assert again["machine"] == found["machine"] | {"runs": "2"}
    layouts = [
        [{**entry, "ratios": set(entry["ratios"])} for entry in entries]
        for entries in (again["rows"], forms)
    ]
    assert layouts[0] == layouts[1]


# What is timed ----------------------------------------------------------------------


def test_wrong_results_are_not_timed(load, monkeypatch):
    cases, forms = load("matmul_cases"), load("matmul_forms")
    case = cases.Case("table", ((64, 32),), "FanIn", 0.1)
    weights = cases.make_weights(case)
    x = jnp.ones((1, 64))
    assert set(forms.forms_of(case, weights, x, ["slots"], "none")) == {
        "dense float32",
        "slots",
    }
    monkeypatch.setitem(forms.PRODUCTS, "wrong", lambda x, w: x @ (w.todense() + 1))
    with pytest.raises(
        ArithmeticError, match="wrong of table: 64 -> 32, FanIn 0.1, fl"
    ):
        forms.forms_of(case, weights, x, ["wrong"], "none")


def test_what_is_not_there_is_a_reason(load, monkeypatch):
    cases, forms = load("matmul_cases"), load("matmul_forms")
    case = cases.Case("table", ((64, 32),), "FanIn", 0.1)
    weights, x = cases.make_weights(case), jnp.ones((1, 64))

    def refuse(x, w):
        raise NotImplementedError("not on this machine\nor any other")

    monkeypatch.setitem(forms.PRODUCTS, "refuse", refuse)
    found = forms.forms_of(case, weights, x, ["refuse", "torch CSR"], "no torch here")
    assert found["refuse"] == "not on this machine"
    assert found["torch CSR"] == "no torch here"
    monkeypatch.setattr(forms, "LARGEST_STEP", 100)
    case = cases.Case("table", ((64, 32),), "Block", 0.1, (16, 1))
    found = forms.forms_of(case, cases.make_weights(case), x, ["blocks"], "")
    assert found["blocks"].startswith("would write")


@pytest.mark.parametrize(
    ("kind", "density", "sides", "count"),
    [
        ("FanIn", 0.1, (), 6 * 32),
        ("NM", 0.5, (2, 4), 1024),
        ("Block", 0.1, (16, 1), 208),
    ],
)
def test_layers_have_weights_of_their_own(load, kind, density, sides, count):
    cases = load("matmul_cases")
    case = cases.Case("table", ((64, 32),) * 2, kind, density, sides)
    weights = cases.make_weights(case)
    assert type(weights.small[0]).__name__ == f"{kind}Array"
    for dense, mask, small in zip(
        weights.plain, weights.masks, weights.small, strict=True
    ):
        assert np.count_nonzero(mask) == count
        np.testing.assert_array_equal(small.todense(), dense)
        assert (np.asarray(dense) != 0).sum() == count
        assert not np.any(np.asarray(dense)[~np.asarray(mask)])
    for arrays in (weights.plain, weights.masks, [w.values for w in weights.small]):
        assert len({array.unsafe_buffer_pointer() for array in arrays}) == 2


def test_layers_apart_are_run_in_turn(load):
    forms = load("matmul_forms")
    call = forms.next_of(lambda x, w: (x, w), 1, ["a", "b"])
    assert [call() for _ in range(3)] == [(1, ["a"]), (1, ["b"]), (1, ["a"])]


def test_time_of_reading_grows_with_bytes(load):
    speed = load("matmul_cases").ReadSpeed(2**16, 0.0)
    speed.sizes, speed.times = [2**16, 2**18], [1e-6, 4e-6]
    assert speed.ms(2**17) == pytest.approx(2e-3)
    assert speed.ms(2**20) == pytest.approx(16e-3)


# What is made of it -----------------------------------------------------------------


def test_names_of_chains(load):
    layers_of = load("matmul_cases").layers_of
    assert layers_of([(3, 4)]) == "3 -> 4"
    assert layers_of([(3, 4), (4, 3)] * 6) == "6 x (3 -> 4 -> 3)"
    assert layers_of([(4, 4)] * 4) == "4 x (4 -> 4)"


def test_bars_take_the_worst_cell_and_the_best_form(load):
    report = load("matmul_report")
    rows = [row("dense", 1.0), row("xla", 0.5), row("native", 0.25)]
    rows += [row(r["form"], r["ms"] * 2, batch=8) for r in rows[:2]]
    rows += [row("native", 1.0, batch=8)]
    rows += [row("dense", 1.0, density=0.5), row("native", absent="no", density=0.5)]
    where = {"density": 0.1}

    def judge(*forms, least, where=where, over="dense"):
        bar = report.Bar("a bar", where, forms, over, least)
        (found,) = report.verdicts(rows, [bar])
        return found["measured"], found["verdict"]

    assert judge("native", least=2.0) == (2.0, "kept")
    assert judge("native", least=2.01) == (2.0, "MISSED")
    assert judge("xla", "native", least=2.0) == (2.0, "kept")
    assert judge("xla", "native", least=4.0, where=where | {"batch": 1}) == (
        4.0,
        "kept",
    )
    assert judge("native", least=1.0, where={"density": 0.5}) == (
        None,
        "not measured (native: no)",
    )
    assert judge("native", least=1.0, over="torch int8") == (
        None,
        "not measured (no such rows)",
    )
    text = report.bars_to_text(
        report.verdicts(rows, [report.Bar("b", where, ("xla",), "dense", 3)])
    )
    assert "2.00x (bar 3)  b: MISSED at section table" in text


def test_bars_ask_for_rows_that_the_benchmark_makes(load):
    report, matmul = load("matmul_report"), load("matmul")
    layers_of, scale = load("matmul_cases").layers_of, matmul.Scale()
    pair = ((scale.narrow, scale.wide), (scale.wide, scale.narrow))
    assert report.CHAIN == layers_of(pair * scale.blocks)
    assert report.SQUARE == layers_of([(scale.square, scale.square)] * 4)
    for bar in report.bars():
        if not bar.where:
            continue
        assert bar.where["batch"] in getattr(scale, bar.where["section"])
        assert bar.where.get("density", 0.1) in scale.densities
        if "layout" in bar.where:
            assert tuple(map(int, bar.where["layout"].split("x"))) in scale.sizes
        names = {*matmul.SPARSE, "torch int8", "dense float32", "native, x float32"}
        assert {*bar.forms, bar.over} <= names


def test_best_form_is_the_fastest_that_dispatch_can_pick(load):
    report = load("matmul_report")
    rows = [row("dense", 1.0), row("nmjax", 0.1), row("slots", 0.5)]
    rows += [row("direct", 0.25), row("decompress", 2.0)]
    rows += [
        row("slots", 0.95, high=1.02, batch=8),
        row("direct", absent="no", batch=8),
    ]
    rows += [row("direct", absent="no", batch=64)]
    best = report.best_forms(rows)
    shown = [(b["batch"], b["form"], b["speedup"], b["beats_dense"]) for b in best]
    assert shown == [(1, "direct", 4.0, True), (8, "slots", 1 / 0.95, False)]
    assert set(best[0]) >= {"format", "layout", "density", "values"}


def test_runs_are_combined_to_their_medians(load):
    report = load("matmul_report")
    runs = [[row("native", ratio), row("slots", absent="no")] for ratio in (3.0, 1.0)]
    runs.append([row("native", 1.5), row("slots", 0.5), row("slots", 9.0, batch=8)])
    native, slots, other = report.combined(runs)
    assert native["ratio_to_dense"] == 1.5
    assert slots["ratio_to_dense"] == 0.5 and "absent" not in slots
    assert (other["batch"], other["ratio_to_dense"]) == (8, 9.0)
    assert report.combined(runs, max)[0]["ratio_to_dense"] == 3.0


def test_table_for_dispatch_has_the_ratios_of_a_cell(load):
    report = load("matmul_report")
    rows = [row("dense", 1.0), row("slots", 0.5), row("direct", 0.25004)]
    rows += [row("slots", absent="no", batch=8), row("dense", 1.0, batch=8)]
    forms = report.to_forms(rows, {"device": "cpu"})
    keys = {"format": "FanIn", "layout": "", "values": "float32"}
    keys |= {"density": 0.1, "batch": 1, "ratios": {"direct": 0.25, "slots": 0.5}}
    assert forms == {"machine": {"device": "cpu"}, "rows": [keys]}
    text = report.to_json(forms)
    assert json.loads(text) == forms and len(text.splitlines()) == 8


def test_markdown_has_a_table_per_format_and_dashes(load):
    report = load("matmul_report")
    cell = {"layout": "", "values": "float32", "density": 0.1, "batch": 1}
    fan_in = cell | {"format": "FanIn", "form": "slots", "speedup": 2.04}
    best = [fan_in | {"beats_dense": True}]
    best += [fan_in | {"batch": 8, "beats_dense": False}]
    halves = {"format": "NM", "layout": "2:4", "density": 0.5, "values": "bfloat16"}
    best += [best[0] | halves | {"form": "direct", "speedup": 3.0, "batch": 8}]
    best += [best[0] | {"format": "Block", "layout": "16x1"}]
    text = report.to_markdown(best, {"device": "cpu"})
    lines = text.splitlines()
    assert lines[0] == "Measured on device cpu."
    assert "| weights | 1 | 8 |" in lines and "| 10 % | slots 2.0x | – |" in lines
    assert "| 2:4 bfloat16 | direct 3.0x |" in lines
    assert "| 16x1, 10 % | slots 2.0x |" in lines
    assert [ln for ln in lines if ln.startswith("#")] == [
        "### FanInArray",
        "### NMArray",
        "### BlockArray",
    ]


def test_plot_asks_for_chains_or_single_layers(load, tmp_path):
    report = load("matmul_report")
    with pytest.raises(ValueError, match="sections chain or single"):
        report.plot([row("nmjax", 0.5)], tmp_path / "plot.png")
    rows = [row("nmjax", 0.5, section="single", batch=b) for b in (1, 64)]
    assert report.plot(rows, tmp_path / "plot.svg").read_text().startswith("<?xml")
