"""The benchmark of masks runs, and times what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def timing(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return __import__("timing")


def test_smoke_run_writes_its_results(tmp_path):
    command = [sys.executable, BENCHMARKS / "masks.py", "--smoke", "--only", "flat"]
    command += ["--json", tmp_path / "masks.json"]
    done = subprocess.run(
        command,
        env=os.environ,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "allocator: kept pages" in done.stdout
    results = json.loads((tmp_path / "masks.json").read_text())["results"]
    names = {result["name"] for result in results}
    assert {"copy", "nmjax", "argsort", "lax.top_k", "numpy"} <= names
    assert all(result["ms"] > 0 and result["ratio"] > 0 for result in results)


def test_measure_alternates_with_the_base(timing):
    calls = []
    functions = {name: lambda n=name: calls.append(n) for name in ("base", "a", "b")}
    results = timing.measure(functions, "base", rounds=3, target=0)
    assert calls[-13:] == ["base", *["a", "base", "b", "base"] * 3]
    assert results["base"].ratio == 1


def test_peer_answers_from_its_own_process(timing, tmp_path):
    script = tmp_path / "peer.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import timing\n"
        "timing.serve({'sum': lambda: sum(range(1000))}, '1.2')\n"
    )
    peer = timing.Peer(str(script), [], sys.executable)
    assert peer.version == "1.2"
    assert peer.functions["sum"].seconds(2) > 0
    peer.close()
    assert peer.process.returncode == 0
