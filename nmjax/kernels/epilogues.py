"""Epilogues: what happens to the sums of a product before they are stored."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
"""Activations that a product can apply; gelu is the tanh approximation."""


class Epilogue(NamedTuple):
    """Static settings of a product.

    Attributes:
      activation: None or a key of `ACTIVATIONS`.
      dtype: dtype of the result; None for that of x.
    """

    activation: str | None = None
    dtype: Any = None

    def finish(self, product: Array, bias: Array | None) -> Array:
        """Add a bias to a product that has its dtype already, and activate it.

        Args:
          product: ``(batch, F)``.
          bias: None or ``(F,)``, of the same dtype.

        Returns:
          The result, ``(batch, F)``.

        Example:
          >>> import jax.numpy as jnp
          >>> from nmjax.kernels.epilogues import Epilogue
          >>> bias = jnp.array([1.0, -5.0])
          >>> Epilogue("relu").finish(jnp.array([[1.0, 2.0]]), bias).tolist()
          [[2.0, 0.0]]
        """
        out = product if bias is None else product + bias
        return out if self.activation is None else ACTIVATIONS[self.activation](out)


def result_dtype(x: Any, preferred: Any) -> Any:
    """Give the dtype of a product.

    Args:
      x: inputs, an array or its shape and dtype.
      preferred: what was asked for, or None.

    Returns:
      What was asked for; else that of x, int32 for integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels import epilogues
      >>> epilogues.result_dtype(jnp.ones(2, jnp.int8), None).name
      'int32'
    """
    if preferred is not None:
        return jnp.dtype(preferred)
    integers = jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.dtype(jnp.int32) if integers else x.dtype
