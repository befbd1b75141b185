"""What follows a product while its sums are still at hand: scales, bias, activation."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from nmjax.kernels import settings

ACTIVATIONS = (None, *settings.ACTIVATIONS)
"""Activations that kernels apply; ``"gelu"`` is the approximation by tanh."""


def finish(
    total: Num[Array, "..."],
    scales: Array | None,
    bias: Array | None,
    activation: str | None,
    dtype: Any,
) -> Num[Array, "..."]:
    r"""Turn sums into results.

    .. math:: y = \sigma(s \, t + b)

    computed in float32; sums that nothing is done with are cast only.

    Args:
      total: sums, float32 or int32.
      scales: factors, of a shape that multiplies `total`.
      bias: what is added, of a shape that adds to `total`.
      activation: of `ACTIVATIONS`.
      dtype: dtype of the results.

    Returns:
      The results.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import finishing
      >>> sums = jnp.array([-3, 5], jnp.int32)
      >>> half = jnp.array([0.5, 0.5], jnp.bfloat16)
      >>> finishing.finish(sums, half, half, "relu", jnp.float32).tolist()
      [0.0, 3.0]
    """
    if scales is None and bias is None and activation is None:
        return total.astype(dtype)
    result = total.astype(jnp.float32)
    if scales is not None:
        result = result * scales.astype(jnp.float32)
    if bias is not None:
        result = result + bias.astype(jnp.float32)
    return _activate(result, activation).astype(dtype)


def _activate(x: jax.Array, activation: str | None) -> jax.Array:
    """Apply an activation; through exp alone, which a GPU has an instruction for."""
    if activation == "relu":
        return jnp.maximum(x, 0)
    if activation == "silu":
        return x / (1 + jnp.exp(-x))
    if activation == "gelu":
        # (1 + tanh u) / 2 is the logistic function of 2 u.
        inner = math.sqrt(8 / math.pi) * (x + 0.044715 * (x * x * x))
        return x / (1 + jnp.exp(-inner))
    assert activation is None, activation
    return x


def result_dtype(
    x_dtype: Any, scales: Any, bias: Any, activation: str | None
) -> jnp.dtype:
    """Give the dtype of results where none is asked for.

    Args:
      x_dtype: dtype of the inputs.
      scales: as in `finish`.
      bias: as in `finish`.
      activation: as in `finish`.

    Returns:
      That of the inputs if it has 16 bits; int32 for products of int8 that nothing is
      done with; bfloat16 else.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import finishing
      >>> str(finishing.result_dtype(jnp.int8, None, None, None))
      'int32'
      >>> str(finishing.result_dtype(jnp.int8, None, None, "relu"))
      'bfloat16'
    """
    dtype = jnp.dtype(x_dtype)
    if dtype.itemsize == 2:
        return dtype
    plain = scales is None and bias is None and activation is None
    if plain and jnp.issubdtype(dtype, jnp.integer):
        return jnp.dtype(jnp.int32)
    return jnp.dtype(jnp.bfloat16)
