"""Timing for all benchmarks: interleaved, in ratios, with peers in their own process.

A benchmark hands `measure` a table of functions and the name of a base, such as a copy
of the array. Runs alternate base, function, base, function, ... and a ratio compares a
function with the runs of the base right before and after it, so that a change in the
machine's load meets both. Medians and quartiles of these ratios are reported; the ratio
of the fastest runs stands beside them, since it suffers least from other users.

Peers such as torch run in a process of their own (`Peer`, `serve`): two thread pools
in one process stall each other. This module imports neither JAX nor torch by itself.
"""

import dataclasses
import datetime
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

MALLOC = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
}

PAUSE = 0.01
"""Seconds of rest after a peer was timed: its threads spin for a while before they
sleep, and would share the cores with what is timed next."""


def keep_pages() -> None:
    """Start this script again with an allocator that keeps its pages, and say so.

    By default glibc hands arrays of 32 MiB and more back to the system, and every call
    that makes one pays for page faults again.
    """
    if all(os.environ.get(name) == value for name, value in MALLOC.items()):
        settings = " ".join(f"{name}={value}" for name, value in MALLOC.items())
        print(f"allocator: kept pages, set by this script ({settings})")
    elif sys.platform == "linux":
        sys.stdout.flush()
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | MALLOC)
    else:
        print("allocator: the system's own; large outputs pay for page faults")


def describe() -> dict[str, str]:
    """Describe the machine and the versions of what is measured."""
    import jax

    device = jax.devices()[0]
    names = [platform.processor() or platform.machine()]
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [ln.split(":")[1].strip() for ln in lines if "model name" in ln]
    return {
        "date": datetime.date.today().isoformat(),
        "device": f"{device.platform} ({device.device_kind})",
        "processor": f"{names[0]}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "jax": jax.__version__,
    }


def block(result: Any) -> Any:
    """Wait until a result is computed; JAX returns before it is."""
    if hasattr(result, "block_until_ready"):
        result.block_until_ready()  # as below; a tree costs a microsecond more
    elif "jax" in sys.modules:
        sys.modules["jax"].block_until_ready(result)
    return result


def seconds(function: Callable[[], Any], repeats: int = 1) -> float:
    """Return the mean wall time of one call in seconds."""
    start = time.perf_counter()
    for _ in range(repeats):
        block(function())
    return (time.perf_counter() - start) / repeats


@dataclasses.dataclass(frozen=True)
class Timing:
    """Times of one function beside the base.

    Attributes:
      ms: median time of a call in milliseconds.
      ratio: median ratio to the base.
      low: lower quartile of the ratio.
      high: upper quartile of the ratio.
      best: ratio of the fastest call to the fastest call of the base.
    """

    ms: float
    ratio: float
    low: float
    high: float
    best: float


def measure(
    functions: Mapping[str, Any],
    base: str,
    rounds: int = 9,
    target: float = 0.02,
    slow: float = 1.0,
) -> dict[str, Timing]:
    """Time functions in alternation with the base, called once before to warm up.

    Args:
      functions: Functions without arguments; a `PeerFunction` runs in its process, and
        anything else that has a method ``seconds`` like it times itself.
      base: Name of the function that ratios are taken to.
      rounds: Rounds over all functions.
      target: Seconds to spend on one function per round; fast ones are repeated.
      slow: Functions that take longer than this many seconds run three rounds at most.

    Returns:
      A `Timing` per name, the base included.
    """
    repeats, limit = {}, {}
    for name, function in functions.items():
        _seconds(function, 1)
        once = _seconds(function, 1)
        repeats[name] = max(1, min(1000, round(target / max(once, 1e-7))))
        limit[name] = rounds if once < slow else min(rounds, 3)
    times: dict[str, list[float]] = {name: [] for name in functions}
    ratios: dict[str, list[float]] = {name: [] for name in functions}
    before = _seconds(functions[base], repeats[base])
    times[base].append(before)
    for turn in range(rounds):
        for name, function in functions.items():
            if turn >= limit[name] or name == base:
                continue
            took = _seconds(function, repeats[name])
            after = _seconds(functions[base], repeats[base])
            times[name].append(took)
            times[base].append(after)
            ratios[name].append(2 * took / (before + after))
            before = after
    ratios[base] = [1.0]
    fastest = min(times[base])
    return {
        name: Timing(
            statistics.median(times[name]) * 1e3,
            *_quartiles(ratios[name]),
            min(times[name]) / fastest,
        )
        for name in functions
    }


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return the median, the lower and the upper quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return middle, low, high


def table(title: str, results: Mapping[str, Timing], notes: Mapping[str, str]) -> str:
    """Format results as a table, with a note per name where there is one."""
    width = max(len(name) for name in results)
    head = f"{'':{width}}  {'ms':>9}  {'ratio':>7}  {'quartiles':>15}  {'best':>7}"
    lines = [f"\n{title}", head]
    for name, t in results.items():
        spread = f"{t.low:.2f}-{t.high:.2f}"
        line = f"{name:{width}}  {t.ms:9.3f}  {t.ratio:7.2f}  {spread:>15}"
        line += f"  {t.best:7.2f}  {notes.get(name, '')}"
        lines.append(line.rstrip())
    return "\n".join(lines)


def _seconds(function: Any, repeats: int) -> float:
    if isinstance(function, PeerFunction):
        took = function.seconds(repeats)
        time.sleep(PAUSE)
        return took
    if hasattr(function, "seconds"):
        return function.seconds(repeats)
    return seconds(function, repeats)


class Peer:
    """A peer's script in a process of its own, which `serve` answers from.

    Args:
      script: Path of the script.
      arguments: Its command line arguments.
      python: The interpreter that has the peer installed.
    """

    def __init__(self, script: str, arguments: Sequence[str], python: str):
        """Start the script and wait for the names of its functions."""
        self.process = subprocess.Popen(
            [python, script, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        hello = self.ask(None)
        self.version: str = hello["version"]
        self.functions = {name: PeerFunction(self, name) for name in hello["names"]}

    def ask(self, question: Any) -> Any:
        """Send one line of JSON (nothing for None) and return the answer."""
        assert self.process.stdin is not None and self.process.stdout is not None
        if question is not None:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        if not (line := self.process.stdout.readline()):
            raise RuntimeError(f"{self.process.args} ended with {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@dataclasses.dataclass(frozen=True)
class PeerFunction:
    """A function of a peer, timed inside the peer's process."""

    peer: Peer
    name: str

    def seconds(self, repeats: int) -> float:
        """Return the mean wall time of one call in seconds."""
        return self.peer.ask([self.name, repeats])


def serve(functions: Mapping[str, Callable[[], Any]], version: str) -> None:
    """Answer a `Peer`: time functions by name until the input ends."""
    print(json.dumps({"version": version, "names": list(functions)}), flush=True)
    for line in sys.stdin:
        name, repeats = json.loads(line)
        print(json.dumps(seconds(functions[name], repeats)), flush=True)


def python_with(module: str, given: str | None) -> str | None:
    """Return an interpreter that has a module: the given one, this one, or None."""
    if given is None:
        return sys.executable if importlib.util.find_spec(module) else None
    check = [given, "-c", f"import importlib.util as u; u.find_spec('{module}') or 1/0"]
    found = subprocess.run(check, stderr=subprocess.DEVNULL, check=False)
    return given if found.returncode == 0 else None
