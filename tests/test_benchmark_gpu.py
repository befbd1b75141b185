"""The GPU session runs every section without a GPU, and survives what may happen."""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys
import time

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[1]
INTERPRETER = hasattr(plgpu, "InterpretGPUParams")


@pytest.fixture
def load(monkeypatch):
    for folder in (ROOT / "benchmarks", ROOT):
        monkeypatch.syspath_prepend(folder)
    return lambda name: importlib.import_module(f"benchmarks.gpu.{name}")


def run(*arguments, module=True):
    how = ["-m", "benchmarks.gpu"] if module else ["benchmarks/gpu"]
    return subprocess.run(
        [sys.executable, *how, *arguments],
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    ).stdout


def strict(text):
    def refuse(constant):
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


# The dry run ------------------------------------------------------------------------


def test_dry_run_takes_every_section_to_its_end(load, tmp_path):
    # One test and no fixture: it takes half a minute, on one worker.
    printed = run("--smoke", "--out", str(tmp_path))
    found = strict((tmp_path / "gpu_cpu.json").read_text())
    assert "complete; results:" in printed, printed
    assert not [task for task in found["tasks"] if task["status"] == "failed"]
    check_tasks(found, load("command").SECTIONS)
    if INTERPRETER:
        check_rows(found)
    check_pages(tmp_path, found)
    command = ["--smoke", "--out", str(tmp_path), "--resume", "--sections"]
    printed = run(*command, "environment,costs", module=False)
    assert "tasks of" in printed and printed.count("nothing is left to do") == 2


def check_tasks(found, sections):
    """What is absent has a reason that is none of ours."""
    assert {task["section"] for task in found["tasks"]} == set(sections)
    for task in found["tasks"]:
        if task["status"] == "absent":
            no_torch = task["worker"] == "torch" and "torch is not" in task["message"]
            assert no_torch or not INTERPRETER, task
    reasons = [row["absent"] for row in found["rows"] if row.get("absent")]
    peers = ["torch was built without"]
    if not INTERPRETER:
        peers.append("has no interpreter of GPU kernels")
    assert all(any(text in reason for text in peers) for reason in reasons), reasons


def check_rows(found):
    """Every section has the rows that its tables and bars are made of."""

    def of(section):
        return [row for row in found["rows"] if row["section"] == section]

    assert {row["verdict"] for row in of("probe")} == {"EXACT"}
    assert {row["verdict"] for row in of("correctness") + of("tiles")} == {"right"}
    kernels = {
        section: {row["kernel"] for row in of(section)}
        for section in ("correctness", "timings", "condensed", "launches")
    }
    every = {"hopper", "hopper_decode", "hopper_weight_only", "nm.matmul"}
    assert kernels["correctness"] >= every
    every = {"dense", "nm.matmul", "tiles 0", "dense, XLA's choice"}
    assert kernels["timings"] >= every
    assert kernels["condensed"] >= {"dense", "dense, highest", "nm.matmul", "BCOO"}
    assert any(name.startswith("tiles") for name in kernels["condensed"])
    assert kernels["launches"] == {"dense", "nm.matmul"}
    assert {row["dtype"] for row in of("eight")} == {"int8"}
    assert {row["base"] for row in of("costs")} == {"copy", "dense"}
    for row in of("timings") + of("condensed") + of("eight") + of("costs"):
        assert row["us"] > 0 and row["ratio"] > 0 and row["low"] <= row["high"]


def check_pages(folder, found):
    """A dry run is told from a real one, and judges nothing."""
    page = (folder / "gpu_cpu.md").read_text()
    assert "A dry run on a CPU" in page and "### 2:4 products" in page
    assert "device cpu" in page and found["machine"]["copy_gb_per_s"] > 0
    assert (folder / "gpu_cpu.png").read_bytes()[:4] == b"\x89PNG"
    assert {bar["verdict"] for bar in found["bars"]} == {"not measured"}
    if INTERPRETER:
        table = json.loads((folder / "tiles.json").read_text())
        (entry,) = table["entries"]
        assert table["device"] == "cpu" and entry["kernel"] == "hopper_decode"


# What may happen --------------------------------------------------------------------

WORKER = """
import json, os, sys, time
print(json.dumps({"device": "fake", "platform": PLATFORM}), flush=True)
for line in sys.stdin:
    question = json.loads(line)
    if "settings" not in question:
        tasks = [dict(section="s", name=n, settings={"do": n}, seconds=0.0,
                      worker="jax") for n in TASKS]
        print(json.dumps({"end": tasks}), flush=True)
        continue
    do = question["settings"]["do"]
    print(json.dumps({"row": {"kernel": do, "pid": os.getpid()}}), flush=True)
    if do == "die":
        print("the end is near", file=sys.stderr, flush=True)
        os._exit(7)
    if do == "hang":
        time.sleep(1000)
    end = {"end": None} | ({"error": "E: bad"} if do in ("err", "lost") else {})
    end |= {"lost": True} if do == "lost" else {}
    end |= {"absent": "no such thing"} if do == "absent" else {}
    print(json.dumps(end), flush=True)
    if do == "lost":
        sys.exit(3)
"""


@pytest.fixture
def session(load, tmp_path, monkeypatch):
    command, workers = load("command"), load("workers")
    monkeypatch.setattr(workers.Task, "patience", 1.0)
    script = tmp_path / "worker.py"

    def make(tasks, platform="gpu", **options):
        script.write_text(f"TASKS, PLATFORM = {tasks!r}, {platform!r}\n" + WORKER)
        settings = {"smoke": False, "minutes": 5.0, "out": tmp_path, "json": None}
        settings |= {"resume": None, "skip_failed": False, "again": []} | options
        log = tmp_path / "log"

        def start(name, patience):
            return workers.Worker([sys.executable, str(script)], log, None, patience)

        return command.Session(argparse.Namespace(**settings), start)

    return make


def test_session_goes_on_behind_tasks_that_die_or_hang(session, tmp_path, capsys):
    names = ["one", "die", "two", "hang", "three", "err", "lost", "absent", "four"]
    own = session(names)
    assert own.run(["s"])
    own.close()
    found = strict((tmp_path / "gpu_fake.json").read_text())
    tasks = {task["task"]: task for task in found["tasks"]}
    statuses = {name: task["status"] for name, task in tasks.items()}
    failed = dict.fromkeys(("die", "hang", "err", "lost"), "failed")
    assert statuses == dict.fromkeys(names, "done") | failed | {"absent": "absent"}
    assert "exit status 7" in tasks["die"]["message"]
    assert "the end is near" in tasks["die"]["message"]
    assert "no answer in time" in tasks["hang"]["message"]
    assert tasks["err"]["message"] == "E: bad"
    assert "a new worker goes on" in tasks["lost"]["message"]
    # Every row was kept, also those of tasks that failed, by four processes.
    assert [row["task"] for row in found["rows"]] == names
    pids = {row["task"]: row["pid"] for row in found["rows"]}
    assert len(set(pids.values())) == 4
    assert pids["three"] == pids["err"] == pids["lost"] != pids["absent"]
    assert "4 tasks failed" in importlib.import_module("benchmarks.gpu.report").summary(
        found
    )


def test_resumed_session_runs_failed_tasks_again(session, tmp_path):
    own = session(["one", "err"])
    own.run(["s"])
    own.close()
    before = json.loads((tmp_path / "gpu_fake.json").read_text())
    for options, again in (
        ({}, {"err"}),
        ({"skip_failed": True}, set()),
        ({"skip_failed": True, "again": ["s"]}, {"one", "err"}),
    ):
        own = session(["one", "err"], resume=True, **options)
        own.run(["s"])
        own.close()
        found = json.loads((tmp_path / "gpu_fake.json").read_text())
        pids = {row["task"]: row["pid"] for row in found["rows"]}
        old = {row["task"]: row["pid"] for row in before["rows"]}
        assert len(found["rows"]) == 2
        assert {name for name in old if pids[name] != old[name]} == again
        before = found
    # Other kernels: nothing of the old ones is taken over.
    own = session(["one", "err"], resume=True)
    own.kernels = "other"
    own.choose_path("fake")
    assert own.found["tasks"] == []
    # Another device: begun anew.
    own = session([], resume=str(tmp_path / "gpu_fake.json"))
    own.found["machine"] = {"device": "fake"}
    text = json.dumps(before | {"machine": {"device": "H100"}})
    (tmp_path / "gpu_fake.json").write_text(text)
    assert "is of H100, this is fake" in own.go_on(tmp_path / "gpu_fake.json", "fake")


def test_no_task_starts_that_would_not_end(session, tmp_path, capsys):
    own = session(["one", "two"])
    own.deadline = time.monotonic()
    own.write()
    own.plan = lambda section: [
        importlib.import_module("benchmarks.gpu.workers").Task("s", "one", {}, 5.0)
    ]
    assert not own.run_section("s")
    assert "1 tasks are left for --resume" in capsys.readouterr().out
    assert not own.found["rows"]
    own.close()


def test_session_ends_where_no_worker_starts(session, load, tmp_path, capsys):
    own = session([])
    workers = load("workers")

    def start(name, patience):
        return workers.Worker([sys.executable, "-c", "1/0"], tmp_path / "log")

    own.start = start
    assert not own.run(["s"])
    assert "ZeroDivisionError" in capsys.readouterr().out
    own.close()


def test_session_wants_a_gpu(session, capsys):
    own = session(["one"], platform="cpu")
    assert not own.run(["s"]) and not own.found["tasks"]
    assert "JAX runs on cpu: this needs a GPU (or --smoke)" in capsys.readouterr().out
    own.close()


def test_worker_keeps_its_answers_apart_from_prints(load, tmp_path):
    script = tmp_path / "worker.py"
    script.write_text(
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from benchmarks.gpu import workers\n"
        "def answer(question, report):\n"
        "    print('chatter')\n"
        "    report(x=float('nan') if question['x'] is None else question['x'])\n"
        "    if question['x'] == 2: raise ValueError('two  is\\nbad')\n"
        "    if question['x'] == 3: raise workers.Absent('three is not there')\n"
        "    return 'done'\n"
        "workers.serve({'hello': 1}, answer, lambda: True)\n"
    )
    worker = load("workers").Worker([sys.executable, str(script)], tmp_path / "log")
    assert worker.hello == {"hello": 1}
    assert list(worker.ask({"x": 1}, 9)) == [{"row": {"x": 1}}, {"end": "done"}]
    *_, last = worker.ask({"x": 2}, 9)
    assert last["error"] == "ValueError: two is bad"
    *_, last = worker.ask({"x": 3}, 9)
    assert last == {"end": None, "absent": "three is not there"}
    worker.close()
    assert worker.process.returncode == 0
    assert (tmp_path / "log").read_text().count("chatter") == 3


# Probing ----------------------------------------------------------------------------


def decoded(seed=0, features=128, kept=128):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(features, kept)).astype(np.float32)
    pairs = np.array([(a, b) for b in range(4) for a in range(b)])
    positions = pairs[rng.integers(0, 6, (features, kept // 2))]
    return values, positions.reshape(features, kept).astype(np.uint8)


def test_probe_places_values_like_the_format(load):
    import jax.numpy as jnp

    from nmjax import formats

    values, positions = decoded()
    dense = load("probe").place(values, positions)
    small = formats.NMArray.from_dense(jnp.asarray(dense), 2, 4, axis=-1)
    np.testing.assert_array_equal(small.values, values)
    np.testing.assert_array_equal(small.positions, positions)
    found = load("probe").diagnose(dense, values, positions, 2)
    assert found == {"verdict": "EXACT"}


@pytest.mark.parametrize("size", [1, 2])
def test_probe_names_known_mistakes(load, size):
    probe = load("probe")
    values, positions = decoded()
    mistakes = probe.mistakes(size)
    assert len(mistakes) >= 8
    for name, mistake in mistakes.items():
        wrong = probe.place(*mistake(values, positions))
        found = probe.diagnose(wrong, values, positions, size)
        assert found["verdict"] == "WRONG" and name in found["reads_as"]
        assert found["mismatches"] == (wrong != probe.place(values, positions)).sum()
        assert name in probe.line(found)


def test_probe_says_where_the_first_mismatch_is(load):
    probe = load("probe")
    values, positions = decoded()
    got = probe.place(values, positions)
    want = got[70, 36:40].copy()
    got[70, 37] = np.nan
    found = probe.diagnose(got, values, positions, 2)
    assert found["first"] == [70, 37] and found["mismatches"] == 1
    assert found["want"] == want.tolist() and found["reads_as"] == []
    # Output 70 is row 6 of its 64, inputs 32 to 47 belong to the third of its threads.
    assert found["outputs_mod_64"] == [6] and found["lanes"] == [4 * 6 + 2]
    (lane,) = probe.diagnose(got, values, positions, 1)["lanes"]
    assert lane == 4 * 6 + 2 * 1


# Judging ----------------------------------------------------------------------------


def timed(kernel, us, section="timings", **keys):
    row = {"section": section, "task": "", "kernel": kernel, "us": us, "ratio": us}
    row |= {"dtype": "bfloat16", "outputs": 8192, "inputs": 8192, "batch": 8192}
    row |= {"low": us, "high": us, "bytes": 4e8, "operations": 2 * 8192**3}
    return row | keys


def results(rows, smoke=False):
    machine = {"device": "H100", "copy_gb_per_s": 2500.0}
    return {"machine": machine, "settings": {"smoke": smoke}, "tasks": [], "rows": rows}


def judged(report, rows, text):
    found = report.verdicts(results(rows))
    (bar,) = [bar for bar in found if text in bar["text"]]
    return bar["measured"], bar["verdict"]


def test_bars_of_the_largest_square(load):
    report = load("report")
    rows = [timed("dense", 1400.0), timed("nm.matmul", 1000.0)]
    assert judged(report, rows, "nm.matmul / cuBLAS (JAX)") == (1.4, "kept")
    assert judged(report, rows, "nm.matmul / cuSPARSELt") == (None, "not measured")
    rows += [timed("cuSPARSELt 0", 950.0), timed("cuSPARSELt 1", 990.0)]
    assert judged(report, rows, "nm.matmul / cuSPARSELt") == (0.95, "MISSED")
    rows += [timed("tiles 3", 700.0), timed("torch dense", 1300.0)]
    assert judged(report, rows, "best tiles / cuBLAS (JAX)") == (2.0, "kept")
    assert judged(report, rows, "nm.matmul / cuBLAS (torch)") == (1.3, "MISSED")
    # Another product is no evidence.
    other = [dict(row, inputs=4096) for row in rows]
    assert judged(report, other, "nm.matmul / cuBLAS (JAX)")[0] is None


def test_bar_of_decoding_takes_the_worst_cell_and_the_fastest_dense(load):
    report = load("report")
    wide = {"outputs": 14336, "inputs": 4096}
    rows = [timed("dense", 40.0, batch=1, **wide)]
    rows += [timed("dense, XLA's choice", 30.0, batch=1, **wide)]
    rows += [timed("nm.matmul", 20.0, batch=1, **wide)]
    text = "decode 4096-14336, batch <= 16: nm.matmul"
    assert judged(report, rows, text) == (1.5, "kept")
    rows += [timed("dense", 26.0, batch=16, **wide)]
    rows += [timed("nm.matmul", 20.0, batch=16, **wide)]
    assert judged(report, rows, text) == (1.3, "MISSED")
    alone = "decode 4096-14336, batch <= 16, kernels alone"
    assert judged(report, rows, alone) == (None, "not measured")
    rows += [
        timed(kernel, None, "launches", kernel_us=us, batch=16, **wide)
        for kernel, us in (("dense", 30.0), ("nm.matmul", 20.0))
    ]
    assert judged(report, rows, alone) == (1.5, "kept")
    rows += [timed("dense", 1.0, batch=64, **wide)]
    rows += [timed("nm.matmul", 20.0, batch=64, **wide)]
    assert judged(report, rows, text) == (1.3, "MISSED")


def test_bars_of_constant_fan_in(load):
    report = load("report")
    keys = {"layout": "FanIn", "density": 0.1, "batch": 256, "dtype": "float32"}
    keys |= {"section": "condensed", "outputs": 768, "inputs": 3072}
    rows = [timed("dense", 18.0, **keys), timed("nm.matmul", 10.0, **keys)]
    rows += [timed("dense, highest", 9.0, **keys), timed("BCOO", 140.0, **keys)]
    rows += [timed("torch CSR", 150.0, **keys), timed("tiles 1 x 8", 6.0, **keys)]
    rows += [timed("torch CSR, x row by row", 120.0, **keys)]
    text = "fan-in 90 %, 3072 -> 768, batch 256: nm.matmul / "
    assert judged(report, rows, f"{text}dense") == (1.8, "kept")
    assert judged(report, rows, f"{text}BCOO") == (14.0, "kept")
    assert judged(report, rows, f"{text}CSR") == (12.0, "MISSED")
    text = text.replace("nm.matmul", "best tiles")
    assert judged(report, rows, f"{text}dense") == (3.0, "kept")


def test_bars_of_what_is_right(load):
    report = load("report")
    sizes = {"outputs": 1, "inputs": 2, "batch": 3}
    probe = {"section": "probe", "task": "", "kernel": "hopper", "image": "i"} | sizes
    rows = [probe | {"dtype": "int8", "verdict": "EXACT"}]
    assert judged(report, rows, "probe, int8: ") == (1.0, "kept")
    rows += [probe | {"dtype": "int8", "verdict": "WRONG", "mismatches": 1}]
    assert judged(report, rows, "probe, int8: ") == (0.0, "MISSED")
    check = probe | {"section": "correctness", "rerun": "equal"}
    rows = [check | {"dtype": "bfloat16", "error": 1e-3, "verdict": "right"}]
    assert judged(report, rows, "correct bfloat16") == (2.0, "kept")
    rows += [check | {"dtype": "bfloat16", "error": None, "verdict": "WRONG"}]
    assert judged(report, rows, "correct bfloat16") == (0.0, "MISSED")
    rows += [check | {"dtype": "int8", "error": 0.0, "verdict": "right"}]
    assert judged(report, rows, "correct int8") == (1.0, "kept")
    measured, verdict = judged(report, rows, "all correct")
    assert verdict == "MISSED" and measured == pytest.approx(2 / 3)
    found = report.verdicts(results(rows, smoke=True))
    assert {bar["verdict"] for bar in found} == {"not measured"}


def test_bars_ask_for_cells_that_the_session_measures(load):
    report, timings, condensed = (load(n) for n in ("report", "timings", "condensed"))
    tasks = timings.tasks(False)
    own = [t.settings["product"] for t in tasks if "product" in t.settings]
    cells = {(p["dtype"], p["features"], p["inputs"], p["rows"]) for p in own}
    assert tuple(report.SQUARE[key] for key in report.KEY) in cells
    for outputs, inputs in report.WIDTHS:
        for batch in (1, 16):
            assert ("bfloat16", outputs, inputs, batch) in cells
    wanted = report.FAN_IN
    found = [
        task.settings
        for task in condensed.tasks(False)
        if task.settings["format"] == wanted["layout"]
        and all(task.settings[k] == wanted[k] for k in ("density", "batch", "dtype"))
    ]
    assert [settings.get("kind") for settings in found] == [None, "CSR"]
    more = timings.more_tasks(False)
    assert len({task.name for task in tasks + more}) == len(tasks + more)


def test_limit_is_reached_by_memory_or_by_multiplying(load):
    rows = [timed("dense", 1374.0), timed("nm.matmul", 1000.0)]
    limit = load("pages").limits(results(rows))
    assert limit(rows[0]) == pytest.approx(1374.0)
    assert limit(rows[1]) == pytest.approx(687.0)
    small = timed("nm.matmul", 30.0, bytes=5e7, operations=1e6)
    assert limit(small) == pytest.approx(20.0)
    assert load("pages").limits({"machine": {}, "rows": rows})(small) is None


def test_pages_have_a_table_for_each_section(load, tmp_path):
    report, pages = load("report"), load("pages")
    sizes = {"dtype": "bfloat16", "outputs": 1, "inputs": 2, "batch": 3, "task": ""}
    probe = sizes | {"section": "probe", "kernel": "hopper", "image": "one"}
    rows = [probe | {"verdict": "WRONG", "reads_as": ["rows are swapped"]}]
    check = sizes | {"section": "correctness", "kernel": "hopper", "rerun": "equal"}
    rows += [check | {"verdict": "right", "error": 1e-3}]
    rows += [timed("dense", 1400.0), timed("nm.matmul", 1000.0, ratio=0.7)]
    rows += [timed("tiles 1", 900.0), timed("cuSPARSELt 4", 950.0)]
    launch = sizes | {"section": "launches", "kernel": "dense", "kernel_us": 5.0}
    rows += [launch | {"launches": 1.0, "names": ["gemm"]}]
    tuned = sizes | {"section": "tune", "kernel": "hopper", "tiles": {"rows": 8}}
    rows += [tuned | {"us": 1.0, "default_us": 2.0, "measured": 3}]
    cost = {"section": "costs", "task": "", "name": "2:4", "of": "x", "base": "copy"}
    rows += [cost | {"us": 1.0, "ratio": 1.5, "low": 1.4, "high": 1.6}]
    fan_in = {"layout": "FanIn", "density": 0.1, "dtype": "float32"}
    keys = fan_in | {"section": "condensed", "batch": 1}
    rows += [timed("dense", 9.0, **keys), timed("nm.matmul", 3.0, **keys)]
    rows += [{"section": "timings", "task": "", "kernel": "x", "absent": "no x"}]
    found = results(rows)
    found["bars"] = report.verdicts(found)
    found["tasks"] = [
        {"section": "s", "task": "t", "status": "failed", "message": "broken"}
    ]
    page = pages.to_markdown(found)
    heads = [line for line in page.splitlines() if line.startswith("#")]
    assert len(heads) == 9
    assert "WRONG: rows are swapped" in page
    assert "| bfloat16 | 8192 | 8192 → 8192 | 1400 | – | 1000 | 1100 |" in page
    assert "950 (4)" in page and "x: no x" in page and "broken" in page
    assert pages.plot(found, tmp_path / "plot.svg").read_text().startswith("<?xml")
    assert pages.plot(results([]), tmp_path / "none.svg") is None


def test_json_has_neither_nan_nor_infinity(load):
    report = load("report")
    found = results([{"error": float("nan"), "us": 1.23456, "x": [float("inf")]}])
    text = report.to_json(found | {"bars": []})
    assert strict(text)["rows"] == [{"error": None, "us": 1.235, "x": [None]}]


# What the sections do ---------------------------------------------------------------


def test_differing_reruns_are_unstable(load):
    import itertools

    import jax.numpy as jnp

    compare = load("correctness").compare
    x = jnp.ones((2, 2))
    found = compare("float32", lambda x: x, (x,), x)
    assert (found["verdict"], found["rerun"]) == ("right", "equal")
    turns = itertools.count()
    found = compare("float32", lambda x: x + 1e-6 * next(turns), (x,), x)
    assert found["verdict"] == "UNSTABLE" and found["rerun"].startswith("differs by")
    assert compare("float32", lambda x: 2 * x, (x,), x)["verdict"] == "WRONG"
    assert compare("float32", lambda x: x * jnp.nan, (x,), x)["verdict"] == "WRONG"
    integers = jnp.ones((2, 2), jnp.int32)
    found = compare("int8", lambda x: x.at[0, 0].set(2), (integers,), integers)
    assert (found["error"], found["verdict"]) == (0.25, "WRONG")


def test_kernels_of_a_product_are_added_up(load):
    events = {"gemm": [2e3] * 6, "reduce": [5e2] * 6, "corner": [9e3]}
    found = load("launches").times_of(events, 6)
    assert found == {"kernel_us": 2.5, "launches": 2.0, "names": ["gemm", "reduce"]}


def test_wrong_results_are_not_timed(load):
    import jax.numpy as jnp

    check = load("operands").check_alike
    check(jnp.ones((2, 2)), jnp.ones((2, 2)))
    with pytest.raises(ArithmeticError, match="differs from dense weights by 0.5"):
        check(jnp.ones((2, 2)) * 1.5, jnp.ones((2, 2)))


def test_tasks_survive_json(load):
    for name in ("probe", "correctness", "timings", "condensed", "launches", "tuning"):
        for smoke in (True, False):
            tasks = load(name).tasks(smoke)
            fields = [dataclasses.asdict(task) for task in tasks]
            assert json.loads(json.dumps(fields)) == fields
            assert len({task.name for task in tasks}) == len(tasks)
