"""From a product of arrays to the kernel that computes it."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Num

from nmjax.formats import BlockArray, Compressed, FanInArray, PreparedArray
from nmjax.kernels.gpu import blocks, fan_in, hopper, hopper_decode, hopper_weight_only
from nmjax.kernels.settings import Epilogue, result_dtype

FEW_ROWS = 64
"""Up to as many rows, the inputs are split among multiprocessors too."""


def refusal(x: Any, w: Compressed, epilogue: Epilogue) -> str:
    """Say why no Pallas kernel serves a product; empty where one does.

    Args:
      x: inputs ``(batch, K)``, an array or its shape and dtype.
      w: compressed, of dense shape ``(K, F)``.
      epilogue: activation and dtype of the result.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels.settings import Epilogue
      >>> from nmjax.kernels.gpu import products
      >>> w = formats.NMArray.from_dense(jnp.zeros((64, 64), jnp.bfloat16), 2, 4)
      >>> x = jnp.ones((1, 64), jnp.bfloat16)
      >>> products.refusal(x, w, Epilogue())
      "the array is not laid out for a GPU: prepare it once with nm.prepare(params, ..."
    """
    if not isinstance(x.shape[0], int):
        return "the number of rows must be known when a kernel is made"
    if not x.shape[0] or not w.shape[1]:
        return "there is nothing to compute"
    out = result_dtype(x, epilogue.dtype)
    if isinstance(w, PreparedArray):
        return _refuse_prepared(w, out)
    if isinstance(w, FanInArray):
        if w.neuron_axes != (-1,):
            return "the kernel wants neurons in the columns of a FanInArray"
        return fan_in.refusal(w.values, w.indices, x)
    if isinstance(w, BlockArray):
        if w.axis != -2:
            return "the kernel wants outputs in the last axis of a BlockArray"
        return blocks.refusal(w.values, x)
    return (
        "the array is not laid out for a GPU: prepare it once with nm.prepare(params, "
        "'sm90')"
    )


def _refuse_prepared(w: PreparedArray, out: Any) -> str:
    if w.target != "sm90":
        return (
            f"the kernels for {w.target} are experimental: call those in "
            "nmjax.kernels.gpu, or prepare for 'sm90'"
        )
    if w.axis != -2:
        return "the kernel wants groups along the inputs of a PreparedArray"
    floats = ("bfloat16", "float16", "float32")
    known = ("int32", *floats) if w.dtype == jnp.int8 else floats
    if str(out) not in known:
        return f"the kernel stores {', '.join(known)}, not {out}"
    return ""


def multiply(
    x: Num[Array, "batch K"],
    w: Compressed,
    bias: Num[Array, "F"] | None,
    epilogue: Epilogue,
    *,
    interpret: Any = False,
) -> Num[Array, "batch F"]:
    r"""Multiply with a Pallas kernel.

    .. math:: y_{bf} = \sigma \Bigl( s_f \sum_k x_{bk} w_{kf} + b_f \Bigr)

    Sums, bias and activation are computed in float32 (sums of int8 in int32).

    Args:
      x: inputs.
      w: what `refusal` has nothing against.
      bias: None, or of the result's dtype.
      epilogue: activation and dtype of the result.
      interpret: settings of Pallas' interpreter, for tests on a CPU.

    Returns:
      The product.

    Raises:
      NotImplementedError: what `refusal` says.
    """
    if reason := refusal(x, w, epilogue):
        raise NotImplementedError(reason)
    options = {
        "activation": epilogue.activation,
        "out_dtype": result_dtype(x, epilogue.dtype),
        "interpret": interpret,
    }
    if isinstance(w, PreparedArray):
        return _multiply_prepared(x, w, bias, options)
    if isinstance(w, BlockArray):
        return blocks.multiply(
            w.values,
            w.rows,
            w.columns,
            x,
            dense_shape=w.dense_shape,
            scales=w.scales,
            bias=bias,
            **options,
        )
    assert isinstance(w, FanInArray)
    alive, outputs = w.neurons.size, w.dense_shape[-1]
    if alive == outputs:
        return fan_in.multiply(
            w.values, w.indices, x, scales=w.scales, bias=bias, **options
        )
    # Ablated neurons give their bias.
    some = None if bias is None else bias[w.neurons]
    found = fan_in.multiply(
        w.values, w.indices, x, scales=w.scales, bias=some, **options
    )
    empty = jnp.zeros((x.shape[0], outputs), found.dtype)
    constant = epilogue.finish(empty, bias)
    return constant.at[:, w.neurons].set(
        found,
        mode="promise_in_bounds",
        unique_indices=True,
        indices_are_sorted=True,
    )


def _multiply_prepared(
    x: Array, w: PreparedArray, bias: Array | None, options: dict[str, Any]
) -> Array:
    outputs, (features, half) = w.dense_shape[-1], w.values.shape
    x = pad(x, 2 * half, axis=1)
    if bias is not None:
        bias = pad(bias, features, axis=0)
    if w.scales is not None:
        kernel = hopper_weight_only
    elif x.shape[0] <= FEW_ROWS:
        kernel = hopper_decode
    else:
        kernel = hopper
    out = kernel.multiply(w.values, w.image, x, scales=w.scales, bias=bias, **options)
    return out if features == outputs else out[:, :outputs]


def pad(array: jax.Array, length: int, axis: int) -> jax.Array:
    """Fill an axis up with zeros."""
    missing = length - array.shape[axis]
    if not missing:
        return array
    widths = [(0, missing if i == axis else 0) for i in range(array.ndim)]
    return jnp.pad(array, widths)
