"""N:M masks: n kept entries in every group of m neighbours, without a sort."""

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Shaped

from nmjax.masking.ordering import (
    as_axis,
    as_scores,
    check_multiple,
    check_n_of_m,
    order_keys,
    split_axis,
    sum_dtype,
)
from nmjax.masking.ranking import keep_highest

__all__ = ["nm_mask", "vnm_mask"]


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
    networks from scratch, arXiv:2102.04010 (N is KEPT there, too).
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
    power of sparse tensor cores, arXiv:2310.02065.
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
    wide = blocks.astype(sum_dtype(scores.dtype))
    sums = jnp.sum(wide, axis=vector_axis + 1, keepdims=True)
    chosen = keep_highest(order_keys(sums), 4, m, moved)
    keys = order_keys(blocks)
    # Below every score, and still one above the lowest integer: see keep_highest.
    lowest = jnp.asarray(jnp.iinfo(keys.dtype).min + 1, keys.dtype)
    keys = jnp.where(chosen, keys, lowest)
    return keep_highest(keys, n, m, moved).reshape(scores.shape)
