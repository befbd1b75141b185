"""Correctness: every kernel, dtype and tile against float32, and against itself."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import nmjax as nm
from benchmarks.gpu import operands
from benchmarks.gpu.device import on_gpu
from benchmarks.gpu.workers import Json, Report, Task
from nmjax import formats
from nmjax.kernels import trials
from nmjax.kernels.gpu.tiles import Tiles
from nmjax.kernels.trials import DTYPES, Product

ACTIVATIONS = ("relu", "gelu", "silu")

BOUNDS = {
    "float32": 1e-5,
    "bfloat16": 2e-3,
    "float16": 1e-3,
    "int8-weights": 2e-3,
    "float8_e4m3fn": 5e-3,
    "float8_e5m2": 5e-3,
    "int8": 0.0,
}
"""Largest norm of the error over the norm of the result that is let pass, by what is
multiplied. Results are rounded to 16 bits (float32 and int32 are not); tensor cores add
up products of float8 with fewer bits than float32 has."""

RERUNS = 4
"""Times that a product is computed again: a race would show as another result."""

ODD = (
    (1, 200, 328),
    (3, 1000, 4100),
    (17, 200, 328),
    (65, 129, 260),
    (200, 1000, 4100),
)
"""Rows, outputs and inputs that fit no tile."""


def tasks(smoke: bool) -> list[Task]:
    """List the tasks: what users call first, then every kernel, dtype and tile."""
    found = []

    def add(name: str, kind: str, settings: Json) -> None:
        found.append(Task("correctness", name, settings | {"kind": kind}, 4.0))

    for product in products(smoke):
        add(*tiles_task(product, 0))
    for dtype in DTYPES[:1] if smoke else DTYPES:
        every = dtype == "bfloat16" and not smoke
        for activation in (None, *ACTIVATIONS) if every else ("gelu",):
            name = f"bias and {activation}, {dtype}"
            rows, size = (8, 128) if smoke else (333, 1024)
            own = {"product": dataclasses.asdict(Product(dtype, size, size, rows))}
            add(name, "epilogue", own | {"activation": activation})
    for dtype in DTYPES[:1] if smoke else ("bfloat16", "float8_e4m3fn", "int8"):
        for rows, features, inputs in ODD[:1] if smoke else ODD:
            product = Product(dtype, features, inputs, rows)
            name = f"matmul {rows} x {inputs} -> {features} {dtype}"
            add(name, "odd", {"product": dataclasses.asdict(product)})
    kinds = ("FanIn", "Block 16x1", "Block 16x16", "Block 64x64")
    for kind in kinds[:2] if smoke else kinds:
        for dtype in ("float32",) if smoke else ("float32", "bfloat16"):
            shapes = [(4, 32, 128)] if smoke else [(1, 768, 3072), (300, 768, 3072)]
            for batch, outputs, inputs in shapes:
                fields = {"outputs": outputs, "inputs": inputs, "batch": batch}
                name = f"{kind} {batch} x {inputs} -> {outputs} {dtype}"
                add(name, "other", fields | {"format": kind, "dtype": dtype})
    return found


def tiles_task(product: Product, index: int) -> tuple[str, str, Json]:
    """Name the task that checks one of a product's tiles."""
    name = f"{product.kind} {product.dtype}, {product.rows} rows, tiles {index}"
    tiles = dataclasses.asdict(product.candidates[index])
    own = {"product": dataclasses.asdict(product), "tiles": tiles}
    return name, "tiles", own


def more_tasks(smoke: bool) -> list[Task]:
    """List the tasks of the section "tiles": every tile but the default."""
    return [
        Task("tiles", name, settings | {"kind": kind}, 4.0)
        for product in products(smoke)[: 1 if smoke else None]
        for index in range(1, 2 if smoke else len(product.candidates))
        for name, kind, settings in [tiles_task(product, index)]
    ]


def products(smoke: bool) -> list[Product]:
    """List the products that all tiles are tried on: more tiles than processors."""
    if smoke:
        return [
            Product("bfloat16", 128, 128, 72),
            Product("int8", 128, 128, 8),
            Product("int8-weights", 128, 128, 8),
        ]
    found = [Product(dtype, 8448, 1536, 2000) for dtype in DTYPES]
    for rows in (5, 16, 64):
        found += [Product(dtype, 4224, 4096, rows) for dtype in DTYPES]
    return found


def run(settings: Json, report: Report) -> None:
    """Check one product."""
    ways = {"tiles": _tiles, "epilogue": _epilogue, "odd": _odd, "other": _other}
    way = ways[settings.pop("kind")]
    if "product" in settings:
        settings["product"] = Product(**settings["product"])
    way(report, **settings)


def _tiles(report: Report, product: Product, tiles: Json) -> None:
    """Check a kernel with given tiles."""
    small, x = trials.draw(jax.random.key(1), product)
    multiply = jax.jit(operands.by_kernel(product, Tiles(**tiles)))
    arguments = trials.prepare(small), x
    found = compare(product.dtype, multiply, arguments, expected_of(small, x))
    report(**operands.fields(product), tiles=tiles, **found)


def _epilogue(report: Report, product: Product, activation: str | None) -> None:
    """Check bias and activation, and results in float32."""
    small, x = trials.draw(jax.random.key(2), product)
    ready = trials.prepare(small)
    sums = expected_of(small, x).astype(jnp.float32)
    size = jnp.sqrt(jnp.mean(sums**2))
    bias = jax.random.normal(jax.random.key(3), (product.features,)) * size
    for dtype in (jnp.dtype("float32"), jnp.dtype("bfloat16")):
        own = bias.astype(dtype)
        multiply = operands.by_matmul(dtype, own, activation)
        total = sums + own.astype(jnp.float32)
        expected = getattr(jax.nn, activation)(total) if activation else total
        # Tensor cores add up products of float8 with fewer bits.
        bound = BOUNDS["float32"] if product.dtype == "int8" else 1e-4
        if dtype == jnp.bfloat16 or "float8" in product.dtype:
            bound = max(BOUNDS["bfloat16"], BOUNDS[product.dtype])
        found = compare(product.dtype, jax.jit(multiply), (ready, x), expected, bound)
        name = f"nm.matmul, bias, {activation}, to {dtype}"
        report(**(operands.fields(product) | {"kernel": name}), **found)


def _odd(report: Report, product: Product) -> None:
    """Check what users call on shapes that fit no tile."""
    drawn = dataclasses.replace(product, inputs=-(-product.inputs // 8) * 8)
    small, x = trials.draw(jax.random.key(4), drawn)
    if product.inputs % 8:  # a shorter array of the same weights
        dense = small.todense()[: product.inputs]
        small = formats.NMArray.from_dense(dense, 2, 4)
        x = x[:, : product.inputs]
    ready = formats.PreparedArray.from_canonical(small, "sm90")
    multiply = jax.jit(operands.by_matmul(product.result_dtype))
    found = compare(product.dtype, multiply, (ready, x), expected_of(small, x))
    report(**(operands.fields(product) | {"kernel": "nm.matmul"}), **found)


def _other(report: Report, **settings: Any) -> None:
    """Check constant fan-in and blocks."""
    batch, outputs, inputs = (settings[k] for k in ("batch", "outputs", "inputs"))
    dtype = jnp.dtype(settings["dtype"])
    small = make_other(settings["format"], inputs, outputs, 0.1, dtype)
    x = jax.random.normal(jax.random.key(5), (batch, inputs)).astype(dtype)
    multiply = jax.jit(operands.by_matmul(dtype))
    found = compare(str(dtype), multiply, (small, x), expected_of(small, x))
    report(**settings, kernel=settings["format"], **found)


def make_other(
    kind: str, inputs: int, outputs: int, density: float, dtype: Any, seed: int = 0
) -> formats.Compressed:
    """Draw weights of constant fan-in ("FanIn") or of blocks ("Block 16x1").

    Returns:
      A compressed array of dense shape ``(inputs, outputs)``.
    """
    keys = jax.random.split(jax.random.key(seed))
    scores = jax.random.uniform(keys[0], (inputs, outputs))
    weights = jax.random.normal(keys[1], (inputs, outputs)).astype(dtype)
    if kind == "FanIn":
        mask = _fan_in_mask(scores, k=max(1, round(density * inputs)))
        sparse = jnp.where(mask, weights, 0)
        return formats.FanInArray.from_dense(sparse, mask=mask)
    high, wide = map(int, kind.split()[1].split("x"))
    count = max(1, round(density * inputs * outputs / (high * wide)))
    mask = _block_mask(scores, count=count, sides=(wide, high))
    sparse = jnp.where(mask, weights, 0)
    return formats.BlockArray.from_dense(sparse, high, wide, mask=mask)


@functools.partial(jax.jit, static_argnames="k")
def _fan_in_mask(scores: jax.Array, k: int) -> jax.Array:
    return nm.fan_in_mask(scores, k)


@functools.partial(jax.jit, static_argnames=("count", "sides"))
def _block_mask(scores: jax.Array, count: int, sides: tuple[int, int]) -> jax.Array:
    return nm.block_mask(scores, count, sides)


# Comparing ---------------------------------------------------------------------------


@jax.jit
def expected_of(small: formats.Compressed, x: jax.Array) -> jax.Array:
    """Multiply with the dense weights: in int32 for int8, else in float32."""
    dense = small.todense()
    if x.dtype == jnp.int8:
        return lax.dot(x, dense, preferred_element_type=jnp.int32)
    wide = dense.astype(jnp.float32)
    scales = getattr(small, "scales", None)
    if scales is not None and isinstance(small, formats.NMArray):
        # Scaled weights are rounded where they are stored dense; sums are not.
        wide = dataclasses.replace(small, scales=None).todense().astype(jnp.float32)
        wide = wide * scales.astype(jnp.float32).mT
    return lax.dot(x.astype(jnp.float32), wide, precision=lax.Precision.HIGHEST)


def compare(
    dtype: str,
    multiply: Any,
    arguments: tuple[Any, ...],
    expected: jax.Array,
    bound: float | None = None,
) -> Json:
    """Compute a product several times and compare.

    Args:
      dtype: a key of `BOUNDS`.
      multiply: the product.
      arguments: its arguments.
      expected: the result.
      bound: of the error. Default: that of the dtype.

    Returns:
      The entries ``error``, ``bound``, ``verdict`` and ``rerun`` of a row.
    """
    bound = BOUNDS[dtype] if bound is None else bound
    result = multiply(*arguments)[: expected.shape[0], : expected.shape[1]]
    error = float(trials.difference(result, expected))
    others = [
        float(
            trials.difference(again[: expected.shape[0], : expected.shape[1]], result)
        )
        for again in (multiply(*arguments) for _ in range(RERUNS if on_gpu() else 1))
    ]
    worst = max(others, key=lambda e: math.inf if math.isnan(e) else e)
    right = error <= bound  # never where it is NaN
    verdict = "right" if right and not worst else "UNSTABLE" if right else "WRONG"
    rerun = "equal" if worst == 0 else f"differs by {worst:.1e}"
    return {"error": error, "bound": bound, "verdict": verdict, "rerun": rerun}


def line(row: Json) -> str:
    """Say in a line what a row found."""
    return f"{row['verdict']}, error {row['error']:.1e}, {row['rerun']}"
