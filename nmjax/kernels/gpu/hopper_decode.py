"""2:4 products of few rows on Hopper.

With few rows a product takes as long as reading the weights, and there are not enough
tiles of outputs for all multiprocessors: the inputs are cut into parts too, each part
is summed by a block of its own, and XLA adds the sums up.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Int32, Num

from nmjax.kernels.gpu import finishing, hopper, instructions, operands, tiling
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
    r"""Multiply few rows with 2:4 weights of the dtype of the inputs.

    .. math:: y_{bf} = \sigma\Big(s_f \sum_p \sum_{k \in K_p} W_{fk} x_{bk} + c_f\Big)

    over parts :math:`K_p` of the inputs. One part is finished by the kernel. Sums of
    several are stored as they are, float32 or int32, and one XLA fusion adds them up
    and finishes them.

    Args:
      values: as in `nmjax.kernels.gpu.hopper.multiply`.
      image: as there.
      x: as there; any number of rows, meant for up to 64.
      scales: as there.
      bias: as there.
      activation: as there.
      out_dtype: as there.
      tiles: sizes; `splits` is the number of parts.
      processors: as there.
      interpret: as there.

    Returns:
      The product.

    Raises:
      ValueError: shapes, activation or tiles do not fit.
      TypeError: dtypes do not fit.
    """
    operands.check(values, image, x, scales, bias, activation, out_dtype)
    operands.check_same(values, x)
    if tiles is None:
        tiles = tiling.choose("hopper_decode", x.dtype, *operands.sizes(values, x))
    return add_up(
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


def add_up(
    values: Array,
    image: Array,
    x: Array,
    *,
    scales: Array | None,
    bias: Array | None,
    activation: str | None,
    out_dtype: Any,
    tiles: Tiles,
    **settings: Any,
) -> Array:
    """Multiply operands that were checked, in as many parts as the tiles say.

    Args:
      values: as in `multiply`.
      image: as in `multiply`.
      x: as in `multiply`.
      scales: as in `multiply`.
      bias: as in `multiply`.
      activation: as in `multiply`.
      out_dtype: as in `multiply`.
      tiles: as in `multiply`.
      settings: others of `nmjax.kernels.gpu.hopper.product`.

    Returns:
      The product.
    """
    if out_dtype is None:
        out_dtype = finishing.result_dtype(x.dtype, scales, bias, activation)
    if tiles.splits == 1:
        (results,) = hopper.product(
            values,
            image,
            x,
            scales=scales,
            bias=bias,
            activation=activation,
            out_dtype=out_dtype,
            tiles=tiles,
            **settings,
        )
        return results
    sums = instructions.sum_dtype(x.dtype)
    parts = hopper.product(values, image, x, out_dtype=sums, tiles=tiles, **settings)
    total = jnp.sum(parts, axis=0, dtype=sums)
    flat = None if scales is None else scales[:, 0]
    return finishing.finish(total, flat, bias, activation, out_dtype)
