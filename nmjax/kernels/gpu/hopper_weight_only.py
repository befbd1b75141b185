"""2:4 products of 16-bit inputs with 8-bit weights on Hopper.

Values of 8 bits are read from memory as they are and widened in registers, from where
the instruction takes them; it is the one on 16-bit values, and so is the image.
"""

from typing import Any

from jaxtyping import Array, Int32, Num

from nmjax.kernels.gpu import hopper_decode, operands, tiling
from nmjax.kernels.gpu.tiles import Tiles


def multiply(
    values: Num[Array, "F kept"],
    image: Int32[Array, "tiles steps 128"],
    x: Num[Array, "batch K"],
    *,
    scales: Num[Array, "F 1"] | None = None,
    bias: Num[Array, " F"] | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    tiles: Tiles | None = None,
    processors: int | None = None,
    interpret: Any = False,
) -> Num[Array, "batch F"]:
    r"""Multiply 16-bit inputs with 2:4 weights of 8 bits and a scale for each output.

    .. math:: y_{bf} = \sigma\Big(s_f \sum_k q_{fk} \, x_{bk} + c_f\Big)

    Every 8-bit value is exact in 16 bits, and scales multiply the float32 sums.

    Args:
      values: kept values, ``(F, K / 2)``, int8, float8_e4m3fn or float8_e5m2.
      image: their positions, from `nmjax.formats.images.encode` for values of 2 bytes,
        or from `nmjax.formats.images.broadcast`.
      x: inputs, bfloat16 or float16, any number of rows.
      scales: :math:`s`.
      bias: as in `nmjax.kernels.gpu.hopper.multiply`.
      activation: as there.
      out_dtype: bfloat16, float16 or float32. Default: that of `x`.
      tiles: sizes; with few rows `splits` may be more than 1, as in
        `nmjax.kernels.gpu.hopper_decode`.
      processors: as there.
      interpret: as there.

    Returns:
      The product.

    Raises:
      ValueError: shapes, activation or tiles do not fit.
      TypeError: dtypes do not fit.
    """
    operands.check(values, image, x, scales, bias, activation, out_dtype)
    if values.dtype.itemsize != 1 or x.dtype.itemsize != 2:
        raise TypeError(
            f"values are {values.dtype} and x is {x.dtype}, but this kernel multiplies "
            "8-bit values with 16-bit inputs; hopper takes operands of one dtype"
        )
    if tiles is None:
        sizes = operands.sizes(values, x)
        tiles = tiling.choose("hopper_weight_only", values.dtype, *sizes)
    return hopper_decode.add_up(
        values,
        image,
        x,
        scales=scales,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype,
        tiles=tiles,
        processors=processors,
        interpret=interpret,
    )
