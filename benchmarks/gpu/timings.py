"""Timings of 2:4 products beside cuBLAS in JAX, and cuBLAS and cuSPARSELt in torch.

Each cell is one product: its dense weights are the base that all else alternates with.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import timing

from benchmarks.gpu import operands
from benchmarks.gpu.device import device_answers
from benchmarks.gpu.operands import bytes_of
from benchmarks.gpu.workers import Absent, Json, Report, Task, short
from nmjax.kernels import trials
from nmjax.kernels.rotation import CUBLAS, SERIAL, Program, passes_for, sets_for
from nmjax.kernels.trials import Product

BASE, CHOICE = "dense", "dense, XLA's choice"

WEIGHTS = (
    (4096, 14336),
    (14336, 4096),
    (4096, 4096),
    (4096, 11008),
    (11008, 4096),
)
"""Outputs and inputs of layers of language models."""

BATCHES = (1, 16, 64, 256, 1024, 4096)
SQUARES = (8192, 4096, 16384, 2048, 1024)
EIGHTS = ("float8_e4m3fn", "int8")


def tasks(smoke: bool) -> list[Task]:
    """List the tasks of the section "timings": bfloat16, what bars ask for first."""
    if smoke:
        product = Product("bfloat16", 128, 128, 8)
        found = pair("timings", product, smoke, tiles=1)
        return [*found, choice("timings", product, smoke)]
    found = []
    for size in SQUARES[:2]:
        found += pair("timings", Product("bfloat16", size, size, size), smoke, tiles=6)
    for outputs, inputs in WEIGHTS[:3]:
        for batch in BATCHES[:2]:
            product = Product("bfloat16", outputs, inputs, batch)
            found += pair("timings", product, smoke, tiles=4)
    for size in SQUARES[2:]:
        found += pair("timings", Product("bfloat16", size, size, size), smoke)
    for batch in BATCHES[2:]:
        for outputs, inputs in WEIGHTS[:2]:
            found += pair("timings", Product("bfloat16", outputs, inputs, batch), smoke)
    for outputs, inputs in WEIGHTS[:2]:
        for batch in BATCHES[:2]:
            product = Product("bfloat16", outputs, inputs, batch)
            found.append(choice("timings", product, smoke))
    found.append(choice("timings", Product("bfloat16", 8192, 8192, 8192), smoke))
    return found


def more_tasks(smoke: bool) -> list[Task]:
    """List the tasks of the section "eight": 8 bits, float16, the other shapes."""
    if smoke:
        return pair("eight", Product("int8", 128, 128, 8), smoke)
    found = []
    for dtype in EIGHTS:
        for size in SQUARES[:2]:
            found += pair("eight", Product(dtype, size, size, size), smoke, tiles=4)
    for outputs, inputs in WEIGHTS[:3]:
        for batch in BATCHES[:2]:
            for dtype in (EIGHTS[0], "int8-weights"):
                found += pair("eight", Product(dtype, outputs, inputs, batch), smoke)
    for dtype in EIGHTS:
        for size in SQUARES[2:]:
            found += pair("eight", Product(dtype, size, size, size), smoke)
    found += pair("eight", Product("float16", 8192, 8192, 8192), smoke)
    for batch in BATCHES:
        for outputs, inputs in WEIGHTS[3:]:
            found += pair("eight", Product("bfloat16", outputs, inputs, batch), smoke)
        found += pair("eight", Product(EIGHTS[0], *WEIGHTS[1], batch), smoke)
        found += pair("eight", Product(EIGHTS[1], *WEIGHTS[1], batch), smoke)
    for batch in BATCHES[2:]:
        found += pair("eight", Product("bfloat16", *WEIGHTS[2], batch), smoke)
    known = {task.name for task in tasks(smoke)}
    others = {task.name: task for task in found if task.name not in known}
    return list(others.values())


def pair(section: str, product: Product, smoke: bool, tiles: int = 0) -> list[Task]:
    """Make the tasks of a cell: ours, and torch's.

    Args:
      section: the section.
      product: the product.
      smoke: whether it is a dry run.
      tiles: time so many candidates beside the tiles that are chosen by default.

    Returns:
      The tasks.
    """
    name = name_of(product)
    settings = {"product": dataclasses.asdict(product), "smoke": smoke}
    # Most of it is drawing and compiling; the largest ones run for a while.
    seconds = 7 + 3 * tiles + product.operations / 1e12
    tasks = [Task(section, name, settings | {"tiles": tiles}, seconds)]
    if product.dtype != "int8-weights":
        row = operands.fields(product)
        del row["kernel"]
        seconds = 3 + product.operations / 1e12
        peer = row | {"kind": "2:4", "smoke": smoke}
        tasks.append(Task(section, f"torch {name}", peer, seconds, "torch"))
    return tasks


def choice(section: str, product: Product, smoke: bool) -> Task:
    """Make the task that lets XLA choose how to multiply dense weights."""
    settings = {"product": dataclasses.asdict(product), "smoke": smoke}
    name = f"{CHOICE}, {name_of(product)}"
    return Task(section, name, settings | {"choice": True, "tiles": 0}, 25)


def name_of(product: Product) -> str:
    """Name a product."""
    sides = f"{product.rows} x {product.inputs} -> {product.features}"
    return f"{product.dtype} {sides}"


def run(settings: Json, report: Report) -> None:
    """Time one product."""
    smoke, tiles = settings["smoke"], settings["tiles"]
    product = Product(**settings["product"])
    count, passes = 1, 1
    if not smoke:
        count = sets_for(product.least_bytes)
        passes = passes_for(product.operations, product.least_bytes, count)
    drawn = [trials.draw(jax.random.key(i), product) for i in range(count)]
    dtype = product.inputs_dtype
    dense = [(operands.dense_rows(small, dtype), x) for small, x in drawn]
    own = [(trials.prepare(small), x) for small, x in drawn]
    expected = operands.by_dense(product)(*dense[0])
    del drawn
    programs = {BASE: Program(operands.by_dense(product), dense, passes, CUBLAS)}
    candidates = product.candidates[:tiles] if tiles else []
    # Functions are made where they are compiled: they may not be there.
    ways: dict[str, Callable[[], Any]] = {
        "nm.matmul": lambda: operands.by_matmul(product.result_dtype)
    }
    for i, one in enumerate(candidates):
        ways[f"tiles {i}"] = lambda one=one: operands.by_kernel(product, one)
    if settings.get("choice"):
        ways = {CHOICE: lambda: operands.by_dense(product)}
    skipped = {}
    for name, make in ways.items():
        try:
            function, sets = make(), dense if name == CHOICE else own
            operands.check_alike(jax.jit(function)(*sets[0]), expected)
            programs[name] = Program(function, sets, passes, SERIAL)
        except Exception as error:  # noqa: BLE001 - a way that fails is a result
            if is_lost(error):
                raise
            skipped[name] = short(error)
    rounds, target = (1, 0.0) if smoke else (7, 0.02)
    found = timing.measure(programs, BASE, rounds, target)
    read = {True: bytes_of(dense[0]), False: bytes_of(own[0])}
    written = product.rows * product.features * product.result_dtype.itemsize
    for name, program in programs.items():
        if name == BASE and CHOICE in ways:
            continue  # another task reports it
        row = operands.fields(product) | {"kernel": name}
        if name.startswith("tiles"):
            row["tiles"] = dataclasses.asdict(candidates[int(name.split()[1])])
        row |= times_of(found[name], program, programs[BASE]) | about(program)
        touched = read[name.startswith("dense")] + written
        report(**row, bytes=touched, operations=product.operations)
    for name, reason in skipped.items():
        report(**(operands.fields(product) | {"kernel": name}), absent=reason)


def times_of(
    result: timing.Timing, program: Program, base: Program
) -> dict[str, float]:
    """Give what a row says about times: those of one of a program's products."""
    # The base's program may hold another number of products.
    scale = base.calls / program.calls
    ratios = {name: scale * getattr(result, name) for name in ("ratio", "low", "high")}
    return {"us": 1e3 * result.ms / program.calls} | ratios


def about(program: Program) -> Json:
    """Give what else a row says: how long the host was busy, and what was called."""
    return {"host": round(program.host, 3), "targets": program.targets}


def is_lost(error: Exception) -> bool:
    """Tell whether the device cannot be used after an error."""
    if isinstance(error, Absent | NotImplementedError | ValueError | TypeError):
        return False
    return not device_answers()


def line(row: Json) -> str:
    """Say in a line what a row found."""
    if "absent" in row:
        return f"- {row['absent']}"
    us = row["us"]
    rate = row["operations"] / us / 1e6
    spread = f"{1 / row['high']:.2f}-{1 / row['low']:.2f}"
    text = f"{us:10.2f} us {rate:8.1f} TFLOP/s {row['bytes'] / us / 1e3:7.0f} GB/s"
    text += f"  {1 / row['ratio']:5.2f}x ({spread})"
    return text + ("  host-bound" if row.get("host", 0) > 0.9 else "")
