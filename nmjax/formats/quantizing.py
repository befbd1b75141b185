"""Quantization: values of 8 bits, with a scale for each output or block."""

import dataclasses
from typing import Any, cast

import jax.numpy as jnp
import numpy as np

from nmjax.formats.blocks import BlockArray
from nmjax.formats.checks import Compressed, check_concrete
from nmjax.formats.fan_in import FanInArray
from nmjax.formats.windows import WindowArray

DTYPES = ("int8", "float8_e4m3fn", "float8_e5m2")


def quantize(small: Compressed, dtype: Any = jnp.int8) -> Compressed:
    r"""Store values in 8 bits, with scales.

    .. math:: s = \max_i |v_i| \, / \, q_{\max}, \qquad
       q_i = \operatorname{round}(v_i / s)

    over the values of one output (of one block of a `BlockArray`); :math:`q_{\max}` is
    127 for int8 and the largest number of a float8 dtype. Rounding is to nearest even.
    The error of an int8 value is at most half a scale, plus what rounding the scale to
    the dtype of the weights adds.

    Args:
      small: a compressed array that has no scales.
      dtype: int8, float8_e4m3fn or float8_e5m2.

    Returns:
      The compressed array with `values` of this dtype and `scales` in the dtype of the
      weights, which stays its ``dtype``.

    Raises:
      TypeError: another dtype, values that have scales already, or a traced array.
      ValueError: a value is not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> weights = jnp.array([[0.0], [2.0], [0.0], [-1.0]])
      >>> small = formats.quantize(formats.NMArray.from_dense(weights, 2, 4))
      >>> small.values.tolist()
      [[127, -64]]
      >>> small.dtype, small.todense().round(3).ravel().tolist()
      (dtype('float32'), [0.0, 2.0, 0.0, -1.00...])
    """
    dtype = np.dtype(dtype)
    if dtype.name not in DTYPES:
        raise TypeError(f"dtype={dtype} is none of {', '.join(DTYPES)}")
    if small.scales is not None:
        raise TypeError(
            f"the values are {small.values.dtype} with scales already; quantize the "
            "weights as they were trained"
        )
    check_concrete("formats.quantize", small.values)
    if isinstance(small, WindowArray):  # which has the values of 16 outputs in a row
        return WindowArray.from_canonical(
            cast(FanInArray, quantize(small.canonical, dtype))
        )
    axes = (-2, -1) if isinstance(small, BlockArray) else (-1,)
    values = small.values.astype(jnp.float32)
    most = jnp.max(jnp.abs(values), axis=axes, keepdims=True)
    if not bool(jnp.all(jnp.isfinite(most))):
        raise ValueError(
            "a weight is not finite, so that no scale fits; look at the training run, "
            "or set it to a number"
        )
    integers = jnp.issubdtype(dtype, jnp.integer)
    limit = float(jnp.iinfo(dtype).max if integers else jnp.finfo(dtype).max)
    scales = jnp.where(most > 0, most / limit, 1.0).astype(small.values.dtype)
    # A scale too small for its dtype would be zero.
    scales = jnp.where(scales > 0, scales, jnp.finfo(scales.dtype).tiny)
    scaled = jnp.clip(values / scales.astype(jnp.float32), -limit, limit)
    rounded = jnp.round(scaled) if integers else scaled
    stored: Any = small
    return dataclasses.replace(stored, values=rounded.astype(dtype), scales=scales)
