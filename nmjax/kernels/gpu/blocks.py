"""Products with weights in blocks on a GPU, without dense ones.

Large blocks of 16 bits are multiplied by tensor cores, see `wide`. All others are
multiplied as constant fan-in weights are, see `narrow`.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt

from nmjax.kernels.gpu import narrow, wide
from nmjax.kernels.gpu.finishing import ACTIVATIONS


def refusal(values: Any, x: Any) -> str:
    """Say why no kernel serves a product; empty if one does.

    Args:
      values: blocks ``(blocks, inputs, outputs)``, an array or its shape and dtype.
      x: inputs ``(batch, K)``.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nmjax.kernels.gpu import blocks
      >>> w = jax.ShapeDtypeStruct((8, 1, 16), jnp.float32)
      >>> blocks.refusal(w, jax.ShapeDtypeStruct((3, 4), jnp.int8))
      'x are int8; the kernel takes float32, bfloat16, float16'
    """
    return narrow.refusal(values, x)


def on_tensor_cores(values: Any, x: Any) -> bool:
    """Tell whether tensor cores multiply these blocks.

    Their instructions take 16 inputs of 16 bits at a time, and the memory engine as
    many outputs; blocks of less than 512 weights take it longer to load than to
    multiply them otherwise.

    Args:
      values: blocks ``(blocks, inputs, outputs)``, an array or its shape and dtype.
      x: inputs ``(batch, K)``.

    Returns:
      Whether they do.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nmjax.kernels.gpu import blocks
      >>> w = jax.ShapeDtypeStruct((8, 64, 64), jnp.bfloat16)
      >>> blocks.on_tensor_cores(w, jax.ShapeDtypeStruct((3, 128), jnp.bfloat16))
      True
    """
    _, inputs, outputs = values.shape
    return (
        values.dtype == x.dtype
        and jnp.dtype(x.dtype).itemsize == 2
        and inputs % 16 == 0
        and outputs % 16 == 0
        and inputs * outputs >= 512
    )


def multiply(
    values: Num[Array, "blocks inputs outputs"],
    rows: UInt[Array, " blocks"],
    columns: UInt[Array, " blocks"],
    x: Float[Array, "batch K"],
    *,
    dense_shape: tuple[int, ...],
    scales: Float[Array, "blocks 1 1"] | None = None,
    bias: Float[Array, " F"] | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    interpret: Any = False,
) -> Float[Array, "batch F"]:
    r"""Multiply with the blocks of a matrix.

    .. math:: y_b = \sigma\Big(\sum_n s_n \, x_{b, R_n} V_n + c\Big)

    where R_n are the inputs of block n, and the sum is over the blocks of a column.
    Sums are float32; bias and activation are applied to them before they are cast.

    Args:
      values: :math:`V`, the blocks, ``(blocks, inputs, outputs)``, float32, bfloat16,
        float16, float8_e4m3fn, float8_e5m2 or int8.
      rows: number of each block along the inputs, ``(blocks,)``.
      columns: number of each block along the outputs, ``(blocks,)``; blocks are sorted
        by column, then by row.
      x: inputs, ``(batch, K)``, float32, bfloat16 or float16.
      dense_shape: ``(K, F)``.
      scales: :math:`s`, a factor of each block, ``(blocks, 1, 1)``.
      bias: :math:`c`, ``(F,)``.
      activation: :math:`\sigma`: None, ``"relu"``, ``"gelu"`` (approximated by tanh)
        or ``"silu"``.
      out_dtype: float32, bfloat16 or float16. Default: that of x.
      interpret: `plgpu.InterpretGPUParams` to run without a GPU.

    Returns:
      The product.

    Raises:
      ValueError: the kernel does not serve this case, as `refusal` says, or shapes do
        not fit.
    """
    if reason := refusal(values, x):
        raise ValueError(f"the kernel does not serve this product: {reason}")
    _check(values, x, dense_shape, bias, activation)
    outputs = dense_shape[-1]
    numbers = jnp.arange(outputs // values.shape[2] + 1, dtype=jnp.int32)
    # Of small arrays: as many comparisons at once as there are.
    starts = jnp.searchsorted(columns.astype(jnp.int32), numbers, method="compare_all")
    settings = {
        "bias": bias,
        "activation": activation,
        "out_dtype": jnp.dtype(x.dtype if out_dtype is None else out_dtype),
        "interpret": interpret,
    }
    given = (values, rows, starts.astype(jnp.int32), x)
    if scales is None and on_tensor_cores(values, x):
        tiles = wide.choose(values, x)
        return wide.multiply(*given, outputs, tiles=tiles, **settings)
    return narrow.multiply(*given, outputs, scales=scales, **settings)


def _check(
    values: Array,
    x: Array,
    dense_shape: tuple[int, ...],
    bias: Array | None,
    activation: str | None,
) -> None:
    _, inputs, outputs = values.shape
    if len(dense_shape) != 2 or dense_shape[0] % inputs or dense_shape[1] % outputs:
        raise ValueError(
            f"dense_shape={dense_shape} is not a matrix of blocks of {inputs} inputs "
            f"and {outputs} outputs"
        )
    if x.shape[1] != dense_shape[0]:
        raise ValueError(
            f"x has shape {x.shape}; for dense_shape={dense_shape} it must have "
            f"{dense_shape[0]} inputs"
        )
    if bias is not None and bias.shape != dense_shape[1:]:
        raise ValueError(
            f"bias has shape {bias.shape}; for dense_shape={dense_shape} it must have "
            f"{dense_shape[1:]}"
        )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {ACTIVATIONS}")
