"""Tune: the fastest tiles, product by product, written beside the results."""

import dataclasses
from collections.abc import Sequence

import jax

from benchmarks.gpu import operands
from benchmarks.gpu.device import on_gpu
from benchmarks.gpu.workers import Absent, Json, Report, Task
from nmjax.kernels import trials, tune
from nmjax.kernels.gpu.tiles import Tiles
from nmjax.kernels.rotation import Program
from nmjax.kernels.trials import Product

DTYPES = ("bfloat16", "float8_e4m3fn", "int8-weights", "int8")
"""bfloat16 in all shapes of `nmjax.kernels.tune`; the others in the first ones."""


def tasks(smoke: bool) -> list[Task]:
    """List the tasks, a product each."""
    if smoke:
        products = [Product("bfloat16", 128, 128, 8)]
    else:
        products = [Product(DTYPES[0], *shape) for shape in tune.SHAPES[:2]]
        for rows in (8, 16):
            products += [Product(DTYPES[0], *w, rows) for w in tune.WEIGHTS[:3]]
        for dtype in DTYPES[1:]:
            rows = (8, 16) if dtype == "int8-weights" else (8, 4096)
            products += [Product(dtype, *tune.WEIGHTS[0], r) for r in rows]
            products += [Product(dtype, *tune.WEIGHTS[1], r) for r in rows]
        products += [Product(DTYPES[0], *shape) for shape in tune.SHAPES]
    found = {}
    for product in products:
        name = f"{product.kind} {product.dtype} {product.features}x{product.inputs}"
        settings = {"product": dataclasses.asdict(product)}
        name = f"{name}x{product.rows}"
        found[name] = Task("tune", name, settings, 15 + product.operations / 1e12)
    return list(found.values())


def run(settings: Json, report: Report) -> None:
    """Choose the tiles of a product."""
    product = Product(**settings["product"])
    entry = tune.choose(product, trials.measure if on_gpu() else interpreted)
    if isinstance(entry, str):
        raise Absent(entry)
    times = {name: entry[name] for name in ("tiles", "us", "default_us", "measured")}
    report(**operands.fields(product), **times, entry=entry)


def interpreted(product: Product, tiles: Sequence[Tiles]) -> list[float | str]:
    """Run the first tiles in Pallas' interpreter: a dry run, whose times are none."""
    drawn = trials.draw(jax.random.key(0), product)
    sets = [(trials.prepare(drawn[0]), drawn[1])]
    programs = [Program(operands.by_kernel(product, one), sets) for one in tiles[:1]]
    times = trials.measure_in_turn(programs, rounds=1, seconds=0.0)
    return [*times, *["a dry run takes the first tiles only"] * (len(tiles) - 1)]


def line(row: Json) -> str:
    """Say in a line what a row found."""
    tiles = ", ".join(f"{name} {value}" for name, value in row["tiles"].items())
    default = row["default_us"]
    gain = f", {default / row['us']:.2f}x the default" if default else ""
    return f"{row['us']:.2f} us{gain}, of {row['measured']}: {tiles}"
