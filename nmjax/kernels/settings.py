"""Static settings of a product: what happens to its sums, and how it is computed."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}
"""Activations that a product can apply; gelu is the tanh approximation."""


class Epilogue(NamedTuple):
    """What happens to the sums of a product before they are stored.

    Attributes:
      activation: None or a key of `ACTIVATIONS`.
      dtype: dtype of the result; None for that of x.
    """

    activation: str | None = None
    dtype: Any = None

    def finish(self, product: Array, bias: Array | None) -> Array:
        """Add a bias to a product that has its dtype already, and activate it.

        Args:
          product: ``(batch, F)``, or ``(F, batch)`` with a bias of ``(F, 1)``.
          bias: None or ``(F,)``, of the same dtype.

        Returns:
          The result, of the product's shape.

        Example:
          >>> import jax.numpy as jnp
          >>> from nmjax.kernels.settings import Epilogue
          >>> bias = jnp.array([1.0, -5.0])
          >>> Epilogue("relu").finish(jnp.array([[1.0, 2.0]]), bias).tolist()
          [[2.0, 0.0]]
        """
        out = product if bias is None else product + bias
        return out if self.activation is None else ACTIVATIONS[self.activation](out)


class Settings(NamedTuple):
    """Static parameters of the primitive.

    Attributes:
      treedef: structure of w, which holds its format, dense shape and layout.
      form: the form asked for.
      epilogue: what happens to the sums.
    """

    treedef: Any
    form: str | None
    epilogue: Epilogue

    def split(self, operands: Any) -> tuple[Any, Any, Any]:
        """Give x, the leaves of w, and the bias or None."""
        x, *leaves = operands
        count = self.treedef.num_leaves
        return x, leaves[:count], leaves[count] if len(leaves) > count else None

    @property
    def linear(self) -> "Settings":
        """The same without an activation."""
        return self._replace(epilogue=self.epilogue._replace(activation=None))


def result_dtype(x: Any, preferred: Any) -> Any:
    """Give the dtype of a product.

    Args:
      x: inputs, an array or its shape and dtype.
      preferred: what was asked for, or None.

    Returns:
      What was asked for; else that of x, int32 for integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels import settings
      >>> settings.result_dtype(jnp.ones(2, jnp.int8), None).name
      'int32'
    """
    if preferred is not None:
        return jnp.dtype(preferred)
    integers = jnp.issubdtype(x.dtype, jnp.integer)
    return jnp.dtype(jnp.int32) if integers else x.dtype
