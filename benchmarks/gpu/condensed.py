"""Constant fan-in and blocks beside dense weights, BCOO and torch's CSR."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import timing
from jax import lax
from jax.experimental import sparse

from benchmarks.gpu import operands
from benchmarks.gpu.correctness import make_other
from benchmarks.gpu.operands import bytes_of
from benchmarks.gpu.timings import BASE, about, is_lost, line, times_of
from benchmarks.gpu.workers import Absent, Json, Report, Task, short
from nmjax.kernels.rotation import CUBLAS, SERIAL, Program, passes_for

__all__ = ["line", "run", "tasks"]

SHAPE = (768, 3072)
"""Outputs and inputs."""

BATCHES = (256, 1, 64, 2048)
DENSITIES = (0.1, 0.2, 0.05, 0.01)

SETS = {1: 24, 64: 24, 256: 16, 2048: 8}
"""Sets of operands by batch: dense weights of 9 MB are in no cache."""


def tasks(smoke: bool) -> list[Task]:
    """List the tasks: what bars ask for first."""
    found = []
    cells = [("FanIn", d, b, "float32") for d in DENSITIES for b in BATCHES]
    cells += [("FanIn", DENSITIES[0], b, "bfloat16") for b in BATCHES]
    for kind in ("Block 64x64", "Block 16x1"):
        cells += [(kind, DENSITIES[0], b, "float32") for b in BATCHES]
        cells += [(kind, DENSITIES[0], b, "bfloat16") for b in BATCHES]
    if smoke:
        cells = [("FanIn", 0.1, 4, "float32"), ("Block 16x1", 0.1, 4, "float32")]
    for kind, density, batch, dtype in cells:
        outputs, inputs = (32, 128) if smoke else SHAPE
        settings = {"format": kind, "density": density, "batch": batch}
        settings |= {"dtype": dtype, "outputs": outputs, "inputs": inputs}
        settings |= {"smoke": smoke}
        name = f"{kind} {density:g} {dtype} batch {batch}"
        found.append(Task("condensed", name, settings, 14))
        if kind == "FanIn" and dtype == "float32":
            own = settings | {"kind": "CSR"}
            found.append(Task("condensed", f"torch {name}", own, 5, "torch"))
    return found


def run(settings: Json, report: Report) -> None:
    """Time one product."""
    smoke, kind = settings.pop("smoke"), settings.pop("format")
    outputs, inputs, batch = (settings[k] for k in ("outputs", "inputs", "batch"))
    dtype, density = jnp.dtype(settings["dtype"]), settings["density"]
    count = 1 if smoke else SETS.get(batch, 8)
    arrays = [
        make_other(kind, inputs, outputs, density, dtype, seed) for seed in range(count)
    ]
    keys = jax.random.split(jax.random.key(9), count)
    xs = [jax.random.normal(key, (batch, inputs)).astype(dtype) for key in keys]
    small = list(zip(arrays, xs, strict=True))
    dense = [(a.todense().mT.copy(), x) for a, x in small]
    row = settings | {"layout": kind}
    operations = 2 * outputs * inputs * batch
    written = batch * outputs * dtype.itemsize
    passes = 1 if smoke else min(3, passes_for(operations, 0, count))
    programs = {BASE: Program(by_dense(None), dense, passes, CUBLAS)}
    touched = {BASE: bytes_of(dense[0])}
    highest = by_dense(lax.Precision.HIGHEST)
    expected = jax.jit(highest)(*dense[0])

    def coordinates() -> list[tuple[Any, jax.Array]]:
        # It stores a product for each weight and row: two sets exceed the cache.
        return [(sparse.BCOO.fromdense(w), x) for w, x in dense[:2]]

    ways: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
        "nm.matmul": (lambda: operands.by_matmul(dtype), lambda: small),
        "BCOO": (lambda: lambda w, x: (w @ x.mT).mT, coordinates),
    }
    if dtype == jnp.float32:
        ways["dense, highest"] = (lambda: highest, lambda: dense)
    if kind == "FanIn" and density == DENSITIES[0]:
        for name, function in other_tiles(arrays[0], xs[0], smoke).items():
            ways[name] = (lambda function=function: function, lambda: small)
    skipped = {}
    for name, (make, sets) in ways.items():
        try:
            function, made = make(), sets()
            operands.check_alike(jax.jit(function)(*made[0]), expected)
            own = 1 if name == "BCOO" else passes
            programs[name] = Program(function, made, own, SERIAL)
            touched[name] = bytes_of(made[0])
        except Exception as error:  # noqa: BLE001 - a way that fails is a result
            if is_lost(error):
                raise
            skipped[name] = short(error)
    rounds, target = (1, 0.0) if smoke else (7, 0.02)
    found = timing.measure(programs, BASE, rounds, target)
    for name, program in programs.items():
        times = times_of(found[name], program, programs[BASE])
        more = about(program) | {"bytes": touched[name] + written}
        report(**row, kernel=name, **times, **more, operations=operations)
    for name, reason in skipped.items():
        report(**row, kernel=name, absent=reason)


def other_tiles(small: Any, x: jax.Array, smoke: bool) -> dict[str, Any]:
    """Make products of constant fan-in with tiles that are not the chosen ones."""
    try:
        fan_in, settings = operands.module("fan_in"), operands.interpretation()
    except Absent:
        return {}
    length, (alive, k) = x.shape[1], small.values.shape
    dtypes = x.dtype, small.values.dtype, small.indices.dtype

    def choose(rows: int) -> Any:
        return fan_in.choose(rows, length, alive, k, *dtypes)

    own = choose(x.shape[0])
    options = [own._replace(slots=slots) for slots in (1, 2, 4)]
    # What is chosen for other numbers of rows serves this one too.
    options += [choose(rows) for rows in (1, 4, 8, 16, 32, 64)]
    others = [tiles for tiles in dict.fromkeys(options) if tiles != own]

    def product(tiles: Any) -> Any:
        return lambda w, x: fan_in.multiply(
            w.values, w.indices, x, tiles=tiles, **settings
        )

    found = {}
    for tiles in others[: 1 if smoke else None]:
        sizes = f"{tiles.rows} x {tiles.neurons}, {tiles.slots} slots"
        found[f"tiles {sizes}"] = product(tiles)
    return found


def by_dense(precision: Any) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Give the dense product of x ``(batch, K)`` and weights ``(F, K)``."""
    rows = (((1,), (1,)), ((), ()))
    return lambda w, x: lax.dot_general(x, w, rows, precision=precision)
