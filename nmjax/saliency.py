"""Saliency: arrays -> scores. A higher score means the weight is kept longer."""

import jax.numpy as jnp

from nmjax.typing import FloatArray


def magnitude(weights: FloatArray) -> FloatArray:
    r"""Score every weight by its absolute value.

    .. math:: s_i = |w_i|

    Args:
      weights: array of any shape and floating dtype.

    Returns:
      Scores of the same shape and dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import saliency
      >>> print(saliency.magnitude(jnp.array([-2.0, 0.5])))
      [2.  0.5]

    Reference:
      Han, Pool, Tran and Dally, "Learning both Weights and Connections for
      Efficient Neural Networks", 2015, arXiv 1506.02626.
    """
    return jnp.abs(weights)
