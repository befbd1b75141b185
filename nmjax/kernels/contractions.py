"""Contractions and convolutions whose right side may be compressed.

Drop-in replacements for what layers call: `jax.lax.dot_general` and
`jax.lax.conv_general_dilated`. What can be seen as one matrix goes to `matmul`, the
rest is decompressed.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nmjax.formats import Compressed
from nmjax.kernels.matmuls import matmul

_DimensionNumbers = tuple[
    tuple[Sequence[int], Sequence[int]], tuple[Sequence[int], Sequence[int]]
]


def dot_general(
    lhs: Array,
    rhs: Compressed | Array,
    dimension_numbers: _DimensionNumbers,
    precision: Any = None,
    preferred_element_type: Any = None,
    *,
    out_sharding: Any = None,
) -> Array:
    """Contract with an array that may be compressed, as `jax.lax.dot_general` does.

    A compressed array that is contracted along its leading axes, all that count
    inputs, is multiplied by `nmjax.matmul`; so is the transpose of a matrix, contracted
    along its last axis. Anything else is decompressed first: batch dimensions, other
    axes, a `precision` other than the default, a result of another dtype, an
    `out_sharding`.

    Args:
      lhs: dense array.
      rhs: compressed or dense array of the same dtype.
      dimension_numbers: ``((lhs contracting, rhs contracting), (lhs batch, rhs
        batch))``.
      precision: as in `jax.lax.dot_general`.
      preferred_element_type: as in `jax.lax.dot_general`.
      out_sharding: as in `jax.lax.dot_general`.

    Returns:
      The product: batch dimensions, those of lhs, those of rhs.

    Raises:
      TypeError: shapes or dtypes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import formats
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> nm.dot_general(jnp.array([[3.0, 5.0]]), w, (((1,), (0,)), ((), ()))).tolist()
      [[5.0, 6.0]]
    """
    options = {
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        "out_sharding": out_sharding,
    }
    if not isinstance(rhs, Compressed):
        return lax.dot_general(lhs, rhs, dimension_numbers, **options)
    (lhs_axes, rhs_axes), (_, rhs_batch) = dimension_numbers
    plain = (
        precision in (None, lax.Precision.DEFAULT)
        and preferred_element_type in (None, lhs.dtype)
        and out_sharding is None
        and lhs.dtype == rhs.dtype
    )
    pairs = sorted(
        (right % rhs.ndim, left % lhs.ndim)
        for left, right in zip(lhs_axes, rhs_axes, strict=True)
    )
    contracted = [right for right, _ in pairs]
    if not plain or rhs_batch or (matrix := _as_matrix(rhs, contracted)) is None:
        return lax.dot_general(lhs, rhs.todense(), dimension_numbers, **options)
    summed = [left for _, left in pairs]
    lengths = tuple(lhs.shape[axis] for axis in summed)
    if lengths != tuple(rhs.shape[axis] for axis in contracted):
        raise TypeError(
            f"lhs of shape {lhs.shape} cannot be contracted along {tuple(lhs_axes)} "
            f"with a compressed array of shape {rhs.shape} along {tuple(rhs_axes)}"
        )
    free = [axis for axis in range(lhs.ndim) if axis not in summed]
    rows = lhs.transpose(*free, *summed) if free + summed != [*range(lhs.ndim)] else lhs
    kept = [lhs.shape[axis] for axis in free]
    if len(summed) != 1:
        rows = rows.reshape(*kept, math.prod(lengths))
    columns = [rhs.shape[a] for a in range(rhs.ndim) if a not in contracted]
    out = matmul(rows, matrix)
    return out if len(columns) == 1 else out.reshape(*kept, *columns)


def _as_matrix(w: Compressed, contracted: list[int]) -> Compressed | None:
    """See an array as the matrix (contracted axes, others), or give None."""
    if w.stack_shape or not contracted:
        return None
    if w.ndim == 2 and contracted == [1]:
        transposed = w.transposed
        return None if transposed is None else transposed.matrix
    inputs = math.prod(w.shape[: len(contracted)])
    matrix = w.matrix
    leading = contracted == [*range(len(contracted))]
    if matrix is None or not leading or matrix.shape[0] != inputs:
        return None
    return matrix


def conv_general_dilated(
    lhs: Array,
    rhs: Compressed | Array,
    window_strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    lhs_dilation: Sequence[int] | None = None,
    rhs_dilation: Sequence[int] | None = None,
    dimension_numbers: Any = None,
    feature_group_count: int = 1,
    batch_group_count: int = 1,
    precision: Any = None,
    preferred_element_type: Any = None,
    **options: Any,
) -> Array:
    """Convolve with a kernel that may be compressed, as `jax.lax` does.

    A kernel of one position (1x1), without groups, dilation of the input or padding,
    is multiplied by `nmjax.matmul`. Others are decompressed.

    Args:
      lhs: dense input.
      rhs: compressed or dense kernel of the same dtype. To be multiplied as a matrix it
        must have its inputs and outputs last, as Flax has them (HWIO).
      window_strides: steps of the window, one for each spatial axis.
      padding: ``"SAME"``, ``"VALID"`` or a pair for each spatial axis.
      lhs_dilation: None, or steps that the input is spread by.
      rhs_dilation: None, or steps that the kernel is spread by.
      dimension_numbers: layouts, as ``("NHWC", "HWIO", "NHWC")``.
      feature_group_count: number of groups of channels.
      batch_group_count: number of groups of examples.
      precision: as in `jax.lax.conv_general_dilated`.
      preferred_element_type: as in `jax.lax.conv_general_dilated`.
      **options: others of `jax.lax.conv_general_dilated`.

    Returns:
      The convolution.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import formats
      >>> kernel = jnp.zeros((1, 1, 4, 1)).at[0, 0, 1:3, 0].set(1.0)
      >>> small = formats.NMArray.from_dense(kernel, 2, 4)
      >>> nm.conv_general_dilated(
      ...     jnp.arange(8.0).reshape(1, 2, 1, 4), small, (1, 1), "SAME",
      ...     dimension_numbers=("NHWC", "HWIO", "NHWC"),
      ... ).ravel().tolist()
      [3.0, 11.0]
    """
    arguments = {
        "window_strides": window_strides,
        "padding": padding,
        "lhs_dilation": lhs_dilation,
        "rhs_dilation": rhs_dilation,
        "dimension_numbers": dimension_numbers,
        "feature_group_count": feature_group_count,
        "batch_group_count": batch_group_count,
        "precision": precision,
        "preferred_element_type": preferred_element_type,
        **options,
    }
    if not isinstance(rhs, Compressed):
        return lax.conv_general_dilated(lhs, rhs, **arguments)
    numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
    spatial = len(window_strides)
    window = [rhs.shape[axis] for axis in numbers.rhs_spec[2:]]
    pads = (
        lax.padtype_to_pads(window, window, [1] * spatial, padding)
        if isinstance(padding, str)
        else padding
    )
    pointwise = (
        all(length == 1 for length in window)
        and all(tuple(pad) == (0, 0) for pad in pads)
        and all(step == 1 for step in lhs_dilation or ())
        and feature_group_count == batch_group_count == 1
        and numbers.rhs_spec[:2] == (spatial + 1, spatial)
        and not any(value is not None for value in options.values())
    )
    if not pointwise:
        return lax.conv_general_dilated(lhs, rhs.todense(), **arguments)
    batch, features, *positions = numbers.lhs_spec
    pixels = lhs.transpose(batch, *positions, features)
    if any(step != 1 for step in window_strides):
        steps = [slice(None, None, step) for step in window_strides]
        pixels = pixels[(slice(None), *steps)]
    inputs_last = (((spatial + 1,), (0,)), ((), ()))
    matrix = rhs.matrix
    if matrix is None or matrix.shape != rhs.shape[-2:]:
        dense = rhs.todense().reshape(rhs.shape[-2:])
        out = lax.dot_general(
            pixels, dense, inputs_last, precision, preferred_element_type
        )
    else:
        out = dot_general(
            pixels, matrix, inputs_last, precision, preferred_element_type
        )
    out_batch, out_features, *out_positions = numbers.out_spec
    return jnp.moveaxis(
        out, [*range(spatial + 2)], [out_batch, *out_positions, out_features]
    )
