"""Masks that keep or drop whole blocks and whole channels."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Shaped

from nmjax.masking.ordering import (
    as_axes,
    as_axis,
    as_count,
    as_scores,
    check_multiple,
    merge_axis,
    split_axis,
    sum_dtype,
)
from nmjax.masking.selection import Count, topk_mask

__all__ = ["block_mask", "block_sums", "channel_mask"]


def block_mask(
    scores: Shaped[ArrayLike, "..."],
    k: Count,
    block: tuple[int, ...],
    axes: tuple[int, ...] = (-2, -1),
    batch_axes: int | tuple[int, ...] = (),
) -> Bool[Array, "..."]:
    r"""Keep exactly k whole blocks of every slice.

    The score of a block is the float32 sum of its entries, and the k highest are kept:

    .. math:: S_B = \sum_{i \in B} s_i, \quad E_i = [B(i) \in \text{top}_k(S)]

    Args:
      scores: Real floating array. Higher is kept; a block with a NaN ranks highest.
      k: Blocks kept per slice of batch_axes, an int or a traced integer scalar.
      block: Length of a block along each of axes, for example (4, 1) or (4, 16).
      axes: The axes that blocks extend along. Along any other axis a block has
        length 1.
      batch_axes: Axes whose every position chooses its own k blocks, for example the
        layer axis of scanned layers. They must not be in axes.

    Returns:
      Boolean mask of the shape of scores, True = kept. Ties keep the block that comes
      first in row-major order.

    Raises:
      TypeError: If scores are not real floats or k is not an integer.
      ValueError: If block and axes differ in length, an axis is out of range, named
        twice or in batch_axes, a length is not a multiple of its block, or k is not
        between 0 and the number of blocks.

    >>> import jax.numpy as jnp
    >>> import nmjax as nm
    >>> scores = jnp.array([[1.0, 5.0, 2.0], [2.0, 1.0, 2.0]])
    >>> nm.block_mask(scores, 2, (2, 1)).astype(int).tolist()
    [[0, 1, 1], [0, 1, 1]]
    """
    scores = as_scores(scores)
    shape = scores.shape
    lengths = _block_lengths(shape, block, axes)
    batch = as_axes(batch_axes, shape, "batch_axes")
    if shared := sorted(set(as_axes(axes, shape, "axes")) & set(batch)):
        raise ValueError(f"axes {shared} are both in axes and in batch_axes")
    grid = tuple(size // length for size, length in zip(shape, lengths, strict=True))
    chosen_along = tuple(axis for axis in range(len(shape)) if axis not in batch)
    blocks = math.prod(grid[axis] for axis in chosen_along)
    k = as_count(k, blocks, "number of blocks of a slice")
    wide, inner = _split_blocks(scores, lengths)
    mask = topk_mask(jnp.sum(wide, axis=inner), k, chosen_along)
    return _merge_blocks(jnp.expand_dims(mask, inner) & jnp.ones_like(wide, bool))


def block_sums(
    values: Shaped[ArrayLike, "..."],
    block: tuple[int, ...],
    axes: tuple[int, ...] = (-2, -1),
) -> Float[Array, "..."]:
    r"""Give every entry the float32 sum of its block.

    .. math:: t_i = \sum_{j \in B(i)} v_j

    Args:
      values: Real floating array.
      block: Length of a block along each of axes.
      axes: The axes that blocks extend along; along any other a block has length 1.

    Returns:
      Array of the shape of values, float32 (float64 for float64 values).

    Raises:
      TypeError: If values are not real floats.
      ValueError: If block and axes differ in length, an axis is out of range or named
        twice, or a length is not a multiple of its block.

    >>> import jax.numpy as jnp
    >>> from nmjax import masking
    >>> masking.block_sums(jnp.array([[1.0, 2.0], [3.0, 4.0]]), (1, 2)).tolist()
    [[3.0, 3.0], [7.0, 7.0]]
    """
    values = as_scores(values)
    wide, inner = _split_blocks(values, _block_lengths(values.shape, block, axes))
    sums = jnp.sum(wide, axis=inner, keepdims=True)
    # From the values, so that the sums inherit their sharding.
    return _merge_blocks(jnp.where(jnp.ones_like(wide, bool), sums, wide))


def _block_lengths(
    shape: tuple[int, ...], block: tuple[int, ...], axes: tuple[int, ...]
) -> list[int]:
    """Give the length of a block along every axis."""
    axes = as_axes(axes, shape, "axes")
    if len(block) != len(axes):
        raise ValueError(
            f"block={tuple(block)} has {len(block)} lengths for {len(axes)} axes {axes}"
        )
    lengths = [1] * len(shape)
    for axis, length in zip(axes, block, strict=True):
        if length < 1:
            raise ValueError(f"block={tuple(block)} must have lengths of 1 or more")
        check_multiple(shape, axis, length, "block length ")
        lengths[axis] = length
    return lengths


def _split_blocks(values: Array, lengths: list[int]) -> tuple[Array, tuple[int, ...]]:
    """Give every axis of a block an axis of its own, in a dtype to add up in."""
    # One axis at a time: an Explicit mesh does not take two in one reshape.
    wide = values.astype(sum_dtype(values.dtype))
    for axis in reversed(range(values.ndim)):
        wide = split_axis(wide, axis, lengths[axis])
    return wide, tuple(range(1, wide.ndim, 2))


def _merge_blocks(wide: Array) -> Array:
    """Undo `_split_blocks`."""
    for axis in range(wide.ndim // 2):
        wide = merge_axis(wide, axis)
    return wide


def channel_mask(
    scores: Shaped[ArrayLike, "..."],
    k: Count,
    axis: int = -1,
    batch_axes: int | tuple[int, ...] = (),
) -> Bool[Array, "..."]:
    """Keep exactly k whole channels along one axis.

    The score of a channel is the float32 sum of its entries.

    Args:
      scores: Real floating array. Higher is kept; a channel with a NaN ranks highest.
      k: Channels kept per slice of batch_axes, an int or a traced integer scalar.
      axis: The axis that numbers the channels.
      batch_axes: Axes whose every position chooses its own k channels.

    Returns:
      Boolean mask of the shape of scores, True = kept. Ties keep the lowest channel.

    Raises:
      TypeError: If scores are not real floats or k is not an integer.
      ValueError: If an axis is out of range or in batch_axes, or k is not between 0
        and the number of channels.

    >>> import jax.numpy as jnp
    >>> import nmjax as nm
    >>> scores = jnp.array([[1.0, 5.0, 2.0], [2.0, 1.0, 2.0]])
    >>> nm.channel_mask(scores, 2).astype(int).tolist()
    [[0, 1, 1], [0, 1, 1]]
    """
    scores = as_scores(scores)
    shape = scores.shape
    axis = as_axis(axis, shape)
    batch = as_axes(batch_axes, shape, "batch_axes")
    if axis in batch:
        raise ValueError(f"axis {axis} is also in batch_axes={batch}")
    k = as_count(k, shape[axis], "number of channels")
    others = tuple(i for i in range(len(shape)) if i != axis and i not in batch)
    wide = scores.astype(sum_dtype(scores.dtype))
    sums = jnp.sum(wide, axis=others, keepdims=True)
    return topk_mask(sums, k, axis) & jnp.ones_like(scores, bool)
