"""N:M masks: n kept entries in every group of m neighbours, without a sort."""

from functools import reduce

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Integer, Shaped

from nmjax.masks.ordering import (
    as_axis,
    as_scores,
    check_multiple,
    check_n_of_m,
    order_keys,
    split_axis,
)

__all__ = ["nm_mask", "vnm_mask"]

LARGEST_CODE = 8  # groups up to this size are coded as the bits of one integer


def nm_mask(
    scores: Shaped[ArrayLike, "..."], n: int, m: int, axis: int = -2
) -> Bool[Array, "..."]:
    r"""Keep the n highest scores in every group of m consecutive entries along axis.

    An entry is kept when fewer than n entries of its group are ahead of it:

    .. math:: E_i = \Big[\sum_{j < i} [s_j \ge s_i] + \sum_{j > i} [s_j > s_i] < n\Big]

    so exactly n entries are kept and ties keep the lowest index.

    Args:
      scores: Real floating array of any rank. Higher is kept; NaN counts as the
        highest score of all, ``-0.0`` as equal to ``0.0``.
      n: Entries KEPT in every group, ``1 <= n <= m``.
      m: Group size, at most 64. It must divide the length of axis.
      axis: The axis the groups run along. The default is the fan-in of a Flax Dense
        kernel ``(in, out)`` and the input channels of an HWIO convolution kernel.

    Returns:
      Boolean mask of the shape of scores, True = kept.

    Raises:
      TypeError: If scores are not real floats, or n or m is not an int.
      ValueError: If ``1 <= n <= m <= 64`` does not hold, axis is out of range or its
        length is not a multiple of m.

    >>> import jax.numpy as jnp
    >>> import nmjax as nm
    >>> nm.nm_mask(jnp.array([0.5, 0.1, 0.3, 0.2]), 2, 4, axis=0).astype(int).tolist()
    [1, 0, 1, 0]

    Reference: Zhou et al. 2021, Learning N:M fine-grained structured sparse neural
    networks from scratch, arXiv:2102.04010, section 3.1 (N is KEPT there, too).
    """
    scores = as_scores(scores)
    check_n_of_m(n, m)
    axis = as_axis(axis, scores.shape)
    check_multiple(scores.shape, axis, m)
    return keep_highest(order_keys(scores), n, m, axis)


def vnm_mask(
    scores: Shaped[ArrayLike, "..."],
    v: int,
    n: int,
    m: int,
    axis: int = -2,
    vector_axis: int = -1,
) -> Bool[Array, "..."]:
    r"""Keep n of 4 shared positions out of every m, in blocks of v vectors (V:N:M).

    In each block of m entries along axis and v along vector_axis, the four positions
    of axis with the highest float32 sum of scores over the v are chosen; then every
    one of the v keeps its n highest scores among these four. The density is n / m,
    and after removing the other positions an n:4 pattern remains for the hardware.

    Args:
      scores: Real floating array of rank 2 or more; order as in `nm_mask`.
      v: Vectors that share one choice of positions; divides vector_axis.
      n: Entries KEPT of the four chosen, ``1 <= n <= 4``.
      m: Group size along axis, ``4 <= m <= 64``; divides axis.
      axis: The axis the groups of m run along.
      vector_axis: The axis the v vectors of a block lie along.

    Returns:
      Boolean mask of the shape of scores, True = kept.

    Raises:
      TypeError: If scores are not real floats, or v, n or m is not an int.
      ValueError: If the counts are out of range, an axis is out of range or named
        twice, or a length is not a multiple of its group.

    >>> import jax.numpy as jnp
    >>> import nmjax as nm
    >>> scores = jnp.array([[9.0, 1, 2, 3, 4, 0, 0, 0], [1.0, 5, 4, 0, 6, 9, 0, 0]])
    >>> nm.vnm_mask(scores, 2, 2, 8, axis=1, vector_axis=0).astype(int).tolist()
    [[1, 0, 0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 1, 0, 0]]

    Reference: Castro et al. 2023, VENOM: a vectorized N:M format for unleashing the
    power of sparse tensor cores, arXiv:2310.02065, section 3.
    """
    scores = as_scores(scores)
    check_n_of_m(n, m)
    check_n_of_m(1, v, largest=np.iinfo(np.int32).max)
    if n > 4 or m < 4:
        raise ValueError(
            f"v:n:m = {v}:{n}:{m} is not possible: n of 4 chosen positions are kept "
            "out of every m, so n <= 4 <= m must hold"
        )
    axis = as_axis(axis, scores.shape)
    vector_axis = as_axis(vector_axis, scores.shape, "vector_axis")
    if axis == vector_axis:
        raise ValueError(f"axis and vector_axis are both {axis}; they must differ")
    check_multiple(scores.shape, axis, m)
    check_multiple(scores.shape, vector_axis, v, "v")
    blocks = split_axis(scores, vector_axis, v)
    moved = axis + (vector_axis < axis)
    wide = jnp.promote_types(scores.dtype, jnp.float32)
    sums = jnp.sum(blocks.astype(wide), axis=vector_axis + 1, keepdims=True)
    chosen = keep_highest(order_keys(sums), 4, m, moved)
    keys = order_keys(blocks)
    # Below every score, and still one above the lowest integer: see _accumulate_rank.
    lowest = jnp.asarray(jnp.iinfo(keys.dtype).min + 1, keys.dtype)
    keys = jnp.where(chosen, keys, lowest)
    return keep_highest(keys, n, m, moved).reshape(scores.shape)


def keep_highest(
    keys: Integer[Array, "..."], n: int, m: int, axis: int
) -> Bool[Array, "..."]:
    """Mark the n highest keys of every m along a checked, non-negative axis.

    Small groups are ranked lane by lane into one bit code per group, which a second
    pass expands: the fastest form, but its size grows with m * m. Larger groups
    compare every entry with each of the m lanes in turn, which stays small.
    """
    if n == m:
        return jnp.ones_like(keys, dtype=bool)
    if m <= LARGEST_CODE:
        return _expand_code(_group_code(keys, n, m, axis), keys.shape, m, axis)
    return _accumulate_rank(keys, m, axis) < n


def stop_fusion(
    values: Integer[Array, "..."], lane: Integer[Array, "..."]
) -> Integer[Array, "..."]:
    """Return values, behind an operation that XLA will not compute twice.

    XLA:CPU fuses a value per group into its consumer and then computes it again for
    every entry of the group (3 to 8 times slower along the last axis), and
    `lax.optimization_barrier` does not keep it from doing so. It never repeats an
    integer division, since that is expensive. The divisor here is 1, which XLA's
    graph passes cannot see and its code generator can, so the division costs nothing.

    Args:
      values: Integers computed once per group.
      lane: Integers of the same shape that depend on the same data, entry by entry.
        A value taken from one place of the array would need a collective when the
        array is sharded; the group's own lane does not.
    """
    one = 1 + lax.shift_right_logical(
        lane.astype(jnp.int32) & jnp.int32(0x7FFFFFFF), jnp.int32(31)
    )
    return lax.div(values, one.astype(values.dtype))


def _group_code(keys: Array, n: int, m: int, axis: int) -> Array:
    """Code the kept entries of every group as the bits of one integer."""
    groups = split_axis(keys, axis, m)
    lanes = [lax.index_in_dim(groups, i, axis + 1, keepdims=False) for i in range(m)]
    ahead = {}
    for i in range(m):
        for j in range(i):
            ahead[j, i] = (lanes[j] >= lanes[i]).astype(keys.dtype)  # ties: lower index
            ahead[i, j] = 1 - ahead[j, i]
    bits = []
    for i in range(m):
        rank = sum(ahead[j, i] for j in range(m) if j != i)
        bits.append((rank < n).astype(jnp.int16) << i)
    return stop_fusion(reduce(jnp.bitwise_or, bits), lanes[0])


def _expand_code(code: Array, shape: tuple[int, ...], m: int, axis: int) -> Array:
    """Spread the bits of every group's code over its m entries."""
    split = shape[:axis] + (shape[axis] // m, m) + shape[axis + 1 :]
    position = lax.broadcasted_iota(code.dtype, split, axis + 1)
    bits = jnp.expand_dims(code, axis + 1) >> position
    return (bits & 1).astype(bool).reshape(shape)


def _accumulate_rank(keys: Array, m: int, axis: int) -> Array:
    """Count the entries of the own group that are ahead of every entry."""
    index = lax.broadcasted_iota(jnp.int32, keys.shape, axis)
    position = split_axis(lax.rem(index, jnp.int32(m)), axis, m)
    groups = split_axis(keys, axis, m)
    rank = jnp.zeros(groups.shape, keys.dtype)
    for j in range(m):
        lane = lax.slice_in_dim(groups, j, j + 1, axis=axis + 1)
        # lane >= own key for entries after j (a tie keeps j), lane > own key before it.
        # No key is the lowest integer, so the difference does not wrap around.
        later = (position > j).astype(keys.dtype)
        rank = rank + lax.gt(lane, groups - later).astype(keys.dtype)
    return rank.reshape(keys.shape)
