"""Costs of training: masks beside a copy, sparse steps beside dense ones."""

import functools
from typing import Any

import jax
import masks
import numpy as np
import timing
import train_step

import nmjax as nm
from benchmarks.gpu.timings import is_lost, times_of
from benchmarks.gpu.workers import Json, Report, Task, short
from nmjax.kernels.rotation import SERIAL, Program

SIZE = 4096
"""Side of the arrays that masks are computed of."""


def tasks(smoke: bool) -> list[Task]:
    """List the tasks."""
    found = []
    for dtype in ("float32",) if smoke else ("float32", "bfloat16"):
        settings = {"kind": "masks", "dtype": dtype, "smoke": smoke}
        found.append(Task("costs", f"masks of {dtype}", settings, 25))
    for tokens in (8,) if smoke else (4096, 512):
        settings = {"kind": "steps", "tokens": tokens, "smoke": smoke}
        found.append(Task("costs", f"steps on {tokens} tokens", settings, 45))
    return found


def run(settings: Json, report: Report) -> None:
    """Time masks or training steps."""
    smoke = settings["smoke"]
    if settings["kind"] == "masks":
        time_masks(64 if smoke else SIZE, settings["dtype"], smoke, report)
    else:
        time_steps(settings["tokens"], smoke, report)


def time_masks(size: int, dtype: str, smoke: bool, report: Report) -> None:
    """Time masks of arrays that exceed the cache together."""
    count = 2 if smoke else 6
    keys = jax.random.split(jax.random.key(0), count)
    sets = [(jax.random.normal(key, (size, size)).astype(dtype),) for key in keys]
    k = size * size // 10
    ways: dict[str, Any] = {
        "2:4 axis 0": functools.partial(nm.nm_mask, n=2, m=4, axis=0),
        "2:4 axis -1": functools.partial(nm.nm_mask, n=2, m=4, axis=-1),
        "4:8 axis 0": functools.partial(nm.nm_mask, n=4, m=8, axis=0),
        "transposable 2:4": functools.partial(nm.transposable_nm_mask, n=2, m=4),
        "top-k flat": functools.partial(nm.topk_mask, k=k, axis=None),
        "top-k axis 0": functools.partial(nm.topk_mask, k=size // 10, axis=0),
        "fan-in": functools.partial(nm.fan_in_mask, k=max(1, size // 10)),
    }
    if smoke:
        ways = dict(list(ways.items())[::3])
    programs = {"copy": Program(masks.copy, sets, 2, SERIAL)}
    name = f"{size}x{size} {dtype}"
    skipped = {}
    for way, function in ways.items():
        try:
            programs[way] = Program(
                lambda x, f=function: f(masks.magnitude(x)), sets, 1, SERIAL
            )
        except Exception as error:  # noqa: BLE001 - a mask that fails is a result
            if is_lost(error):
                raise
            skipped[way] = short(error)
    rounds, target = (2, 0.0) if smoke else (7, 0.01)
    found = timing.measure(programs, "copy", rounds, target)
    for way, program in programs.items():
        times = times_of(found[way], program, programs["copy"])
        report(name=way, of=name, base="copy", **times)
    for way, reason in skipped.items():
        report(name=way, of=name, base="copy", absent=reason)


def time_steps(tokens: int, smoke: bool, report: Report) -> None:
    """Time training steps of the model of train_step.py, wider than there."""
    blocks, width, hidden = (1, 16, 32) if smoke else (4, 2048, 8192)
    params = train_step.init(jax.random.key(0), blocks, width, hidden)
    keys = jax.random.split(jax.random.key(tokens))
    x, y = (jax.random.normal(key, (tokens, width)) for key in keys)
    rows = train_step.make_rows(params, x, y)
    train_step.measure(rows, x, y, 2 if smoke else 15)
    times = train_step.summary(rows)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    for name, (wall, _) in times.items():
        low, middle, high = np.quantile(wall / times["dense"][0], [0.25, 0.5, 0.75])
        report(
            name=name,
            of=f"step of {size / 1e6:.3g} M parameters on {tokens} tokens",
            base="dense",
            us=1e6 * float(np.median(wall)),
            ratio=float(middle),
            low=float(low),
            high=float(high),
        )


def line(row: Json) -> str:
    """Say in a line what a row found."""
    if "absent" in row:
        return f"{row['name']}: - {row['absent']}"
    text = f"{row['name']}: {row['us']:.1f} us, {row['ratio']:.2f} of {row['base']}"
    return f"{text} ({row['low']:.2f}-{row['high']:.2f})"
