"""Launches: the times of single kernels, as the profiler sees them, without gaps.

A second opinion on short products: the wall time of a program has the gaps between
kernels in it. A worker of its own runs these tasks, as profiling may slow the rest.
"""

import collections
import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.gpu import operands
from benchmarks.gpu.device import on_gpu
from benchmarks.gpu.workers import Absent, Json, Report, Task, short
from nmjax.kernels import trials
from nmjax.kernels.rotation import CUBLAS, Program, sets_for
from nmjax.kernels.trials import Product

ONE_BY_ONE = CUBLAS | {"xla_gpu_enable_command_buffer": ""}
"""Options of XLA: no CUDA graphs, so that every kernel is an event."""

PASSES = 3


def tasks(smoke: bool) -> list[Task]:
    """List the tasks: few rows, and the largest square that bars ask for."""
    products = [Product("bfloat16", 128, 128, 8)]
    if not smoke:
        sides = ((14336, 4096), (4096, 14336), (4096, 4096))
        products = [Product("bfloat16", f, k, b) for f, k in sides for b in (1, 16)]
        products += [Product("int8-weights", *sides[0], 1)]
        products += [Product("bfloat16", 8192, 8192, 8192)]
    found = []
    for product in products:
        name = f"{product.dtype} {product.rows} x {product.inputs} -> "
        settings = {"product": dataclasses.asdict(product), "smoke": smoke}
        name += str(product.features)
        found.append(Task("launches", name, settings, 10, "profile"))
    return found


def run(settings: Json, report: Report) -> None:
    """Profile a product with dense weights, and ours."""
    product = Product(**settings["product"])
    smoke = settings["smoke"]
    count = 1 if smoke else sets_for(product.least_bytes, 8)
    drawn = [trials.draw(jax.random.key(i), product) for i in range(count)]
    dtype = product.inputs_dtype
    dense = [(operands.dense_rows(small, dtype), x) for small, x in drawn]
    prepared = [(trials.prepare(small), x) for small, x in drawn]
    ours = operands.by_matmul(product.result_dtype)
    if not on_gpu():  # the profiler does not see what is interpreted
        ours = operands.by_xla
    row = operands.fields(product)
    for name, function, sets in (
        ("dense", operands.by_dense(product), dense),
        ("nm.matmul", ours, prepared),
    ):
        program = Program(function, sets, 1 if smoke else PASSES, ONE_BY_ONE)
        events = profile(program)
        if not events:
            raise Absent("the profiler saw no kernels")
        report(**(row | {"kernel": name}), **times_of(events, program.calls))


def times_of(events: Mapping[str, Sequence[float]], calls: int) -> Json:
    """Give what a row says about kernels.

    Args:
      events: nanoseconds of each launch, by the name of the kernel.
      calls: products that were computed. Kernels with fewer launches are no part of
        them.

    Returns:
      The entries ``kernel_us``, the time of the kernels of one product, ``launches``,
      their number, and ``names``.
    """
    own = {name: times for name, times in events.items() if len(times) >= calls}
    own = own or dict(events)
    total = sum(sum(times) for times in own.values())
    names = sorted(own, key=lambda name: -sum(own[name]))
    launches = sum(len(times) for times in own.values()) / calls
    found: dict[str, Any] = {"kernel_us": total / calls / 1e3, "launches": launches}
    return found | {"names": [name[:120] for name in names[:3]]}


def profile(program: Program) -> dict[str, list[float]]:
    """Run a program once under the profiler.

    Args:
      program: the program.

    Returns:
      Nanoseconds of each launch, by the name of the kernel.

    Raises:
      Absent: this version of JAX cannot read what its profiler wrote.
    """
    reader = getattr(jax.profiler, "ProfileData", None)
    if reader is None:
        raise Absent(f"jax {jax.__version__} has no jax.profiler.ProfileData")
    jax.block_until_ready(program.run())
    found: dict[str, list[float]] = collections.defaultdict(list)
    plane_name, line_name = ("/device:GPU", "Stream") if on_gpu() else ("/host", "tf_")
    with tempfile.TemporaryDirectory() as folder:
        try:
            with jax.profiler.trace(folder):
                jax.block_until_ready(program.run())
        except RuntimeError as error:
            raise Absent(short(error)) from error
        for path in Path(folder).rglob("*.xplane.pb"):
            for plane in reader.from_file(str(path)).planes:
                lines = plane.lines if plane.name.startswith(plane_name) else []
                for line in lines:
                    for event in line.events if line.name.startswith(line_name) else []:
                        found[event.name].append(float(event.duration_ns))
    return dict(found)


def line(row: Json) -> str:
    """Say in a line what a row found."""
    text = f"{row['kernel_us']:.2f} us in {row['launches']:.3g} launches"
    return f"{text}: {', '.join(row['names'])}"
