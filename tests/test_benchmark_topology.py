"""The benchmark of topology updates runs and writes its results."""

import importlib.util
import json
import pathlib

import jax
import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "topology.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # for its own modules
    spec = importlib.util.spec_from_file_location("benchmark_topology", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke_run_writes_every_row(benchmark, tmp_path, capsys):
    file = tmp_path / "topology.json"
    with jax.numpy_dtype_promotion("standard"):  # for Adam of optax
        benchmark.main(["--smoke", "--json", str(file)])
    found = json.loads(file.read_text())
    assert set(found["machine"]) >= {"date", "jax", "processor"}
    rows = {(row["table"].split()[0], row["name"]) for row in found["results"]}
    for name in ("copy", "rigl", "set", "srigl, gamma 0.3", "rigl by argsort"):
        assert ("one", name) in rows
    for name in ("dense", "rigl", "srigl"):
        assert {("tree", name), ("step", name)} <= rows
    assert {("step", "rigl, mean of 100"), ("step", "srigl, mean of 100")} <= rows
    for row in found["results"]:
        times = [row[key] for key in ("ms", "compile_s", "peak_mib") if key in row]
        assert times and min(times) > 0
    assert "step on 8 tokens" in capsys.readouterr().out
