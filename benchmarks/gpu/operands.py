"""Ways to multiply with 2:4 weights, on a GPU or, interpreted, without one."""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import nmjax as nm
from benchmarks.gpu.device import on_gpu
from benchmarks.gpu.workers import Absent
from nmjax import formats
from nmjax.formats import NMArray, PreparedArray
from nmjax.kernels import trials
from nmjax.kernels.trials import Product


def fields(product: Product) -> dict[str, Any]:
    """Give what every row of results says about a product."""
    return {
        "kernel": product.kind,
        "dtype": product.dtype,
        "outputs": product.features,
        "inputs": product.inputs,
        "batch": product.rows,
    }


def bytes_of(tree: Any) -> int:
    """Count the bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


@functools.partial(jax.jit, static_argnames="dtype")
def dense_rows(small: NMArray, dtype: Any) -> jax.Array:
    """Give the dense weights, an output in every row: ``(F, K)``."""
    return small.todense().mT.astype(dtype)


def by_dense(product: Product) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Give the product of dense weights ``(F, K)`` and x, stored as that of kernels.

    cuBLAS multiplies float8 by 16 rows at a time; with others XLA would widen all
    weights first. So rows of zeros are added.
    """
    rows, dtype = (((1,), (1,)), ((), ())), product.result_dtype
    missing = -product.rows % 16 if "float8" in product.dtype else 0

    def multiply(w: jax.Array, x: jax.Array) -> jax.Array:
        full = jnp.pad(x, ((0, missing), (0, 0))) if missing else x
        out = lax.dot_general(full, w, rows, preferred_element_type=dtype)
        return out[: product.rows] if missing else out

    return multiply


def by_matmul(
    out_dtype: Any, bias: Any = None, activation: str | None = None
) -> Callable[[formats.Compressed, jax.Array], jax.Array]:
    """Give the product as users call it; where there is no GPU, interpreted."""
    if on_gpu():
        settings = {"preferred_element_type": out_dtype, "implementation": "pallas"}
        settings |= {"bias": bias, "activation": activation}
        return lambda w, x: nm.matmul(x, w, **settings)
    products = module("products")
    epilogue = products.Epilogue(activation, jnp.dtype(out_dtype))
    settings = interpretation()
    return lambda w, x: products.multiply(x, w, bias, epilogue, **settings)


def by_xla(w: formats.Compressed, x: jax.Array) -> jax.Array:
    """Give the product in plain XLA operations."""
    return nm.matmul(x, w, implementation="xla")


def by_kernel(
    product: Product, tiles: Any = None, **settings: Any
) -> Callable[[PreparedArray, jax.Array], jax.Array]:
    """Give the product by its kernel.

    Args:
      product: the product.
      tiles: its tiles. Default: what the kernel chooses.
      settings: other arguments, such as out_dtype, bias and activation.

    Returns:
      A function of prepared weights and x.
    """
    module(product.kind)
    return trials.multiplier(product, tiles, **(interpretation() | settings))


def check_alike(found: jax.Array, expected: jax.Array) -> None:
    """Raise ArithmeticError where results differ: nothing wrong is timed."""
    error = float(trials.difference(found, expected))
    if not error <= trials.LARGEST_DIFFERENCE:
        raise ArithmeticError(f"wrong: it differs from dense weights by {error:.2g}")


def module(name: str) -> Any:
    """Import a module of `nmjax.kernels.gpu`.

    Raises:
      Absent: it is not there, or this version of JAX cannot import it.
    """
    try:
        return importlib.import_module(f"nmjax.kernels.gpu.{name}")
    except ImportError as error:
        raise Absent(f"nmjax.kernels.gpu.{name}: {error}") from error


def interpretation() -> dict[str, Any]:
    """Give the settings for Pallas' interpreter where there is no GPU.

    Raises:
      Absent: this version of JAX has no interpreter of GPU kernels.
    """
    if on_gpu():
        return {}
    from jax.experimental.pallas import mosaic_gpu

    params = getattr(mosaic_gpu, "InterpretGPUParams", None)
    if params is None:
        raise Absent(f"jax {jax.__version__} has no interpreter of GPU kernels")
    return {"interpret": params()}
