"""The benchmark of training steps runs and prints its ratios."""

import importlib.util
import pathlib

import jax
import pytest

SCRIPT = pathlib.Path(__file__).parents[1] / "benchmarks" / "train_step.py"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPT.parent)  # for its own modules
    spec = importlib.util.spec_from_file_location("train_step", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_smoke_run_prints_every_row(benchmark, capsys):
    with jax.numpy_dtype_promotion("standard"):  # for Adam of optax
        benchmark.main(["--smoke"])
    printed = capsys.readouterr().out
    assert "1,024 parameters" in printed
    for row in ("dense", "ste", "srste", "hybrid", "transposable, mean of 40"):
        assert f"\n  {row} " in printed
