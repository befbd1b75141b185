"""Saliency: arrays -> scores. A higher score means the weight is kept longer."""

import jax
import jax.numpy as jnp
from jax import lax

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
    return _clear_sign(weights) if weights.dtype.itemsize == 2 else jnp.abs(weights)


@jax.custom_jvp
def _clear_sign(weights: FloatArray) -> FloatArray:
    """Take |w| of 16-bit floats on their bits.

    XLA:CPU computes in float32 and rounds back otherwise, which makes a bfloat16 mask
    1.7 to 2.2 times slower.
    """
    bits = lax.bitcast_convert_type(weights, jnp.int16)
    return lax.bitcast_convert_type(bits & jnp.int16(0x7FFF), weights.dtype)


@_clear_sign.defjvp
def _sign_times_tangent(primals, tangents):
    (weights,), (tangent,) = primals, tangents
    return _clear_sign(weights), jnp.sign(weights) * tangent
