"""Transposable N:M masks: n kept entries in every row and column of m x m blocks."""

import itertools
from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Shaped

from nmjax.masking.ordering import (
    as_axes,
    as_scores,
    check_multiple,
    check_n_of_m,
    merge_axis,
    order_keys,
    split_axis,
    sum_dtype,
)
from nmjax.masking.ranking import rank_in_groups, stop_fusion

__all__ = ["transposable_nm_mask"]

SWEEPS = 4  # passes over all pairs of rows in the general search


def transposable_nm_mask(
    scores: Shaped[ArrayLike, "..."],
    n: int,
    m: int,
    axes: tuple[int, int] = (-2, -1),
) -> Bool[Array, "..."]:
    r"""Keep n entries in every row and every column of each m x m block.

    .. math:: \max_E \sum_{ij} E_{ij} s_{ij} \quad \text{with} \quad
        \sum_i E_{ij} = \sum_j E_{ij} = n

    so that the mask is N:M along both axes, and the transposed kernel of the backward
    pass is N:M as well. Counts are always exact. The sum is the highest possible for
    m = 4 (2:4 is the best of all 90 patterns) and m = 2. For other m the mask is a
    local optimum that no exchange between two rows improves, or close to one. On blocks
    of absolute normal values, its kept sum is below the best (by linear programming) by

    ====  ====  ====  ====  ====  ====  =====  =====
    1:8   2:8   4:8   1:16  4:16  8:16  4:32   16:32
    1.6%  0.7%  0.4%  3.1%  0.6%  0.3%  1.1%   0.2%
    ====  ====  ====  ====  ====  ====  =====  =====

    Args:
      scores: Real floating array of rank 2 or more. Sums are taken in float32, or in
        float64 for float64 scores. ``+inf`` counts as a finite score larger than
        the sum of all finite ones of a block, NaN as one larger still. float32 scores
        below 1e-34 count as 0.
      n: Entries KEPT in every row and column of a block, ``1 <= n <= m``.
      m: Block size, at most 64. It must divide the lengths of both axes.
      axes: The two axes that blocks extend along.

    Returns:
      Boolean mask of the shape of scores, True = kept. Of patterns with equal sums a
      fixed one is chosen, the same in every run and on every device.

    Raises:
      TypeError: If scores are not real floats, or n or m is not an int.
      ValueError: If ``1 <= n <= m <= 64`` does not hold, axes are not two different
        axes in range, or a length is not a multiple of m.

    >>> import jax.numpy as jnp
    >>> import nmjax as nm
    >>> scores = jnp.array([[9, 8, 1, 2], [1, 7, 9, 1], [2, 1, 8, 7], [9, 1, 3, 9.0]])
    >>> nm.transposable_nm_mask(scores, 2, 4).astype(int).tolist()
    [[1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 1], [1, 0, 0, 1]]

    Reference: Hubara et al. 2021, Accelerated sparse neural training: a provable and
    efficient method to find N:M transposable masks, arXiv:2102.08124.
    """
    scores = as_scores(scores)
    check_n_of_m(n, m)
    block_axes = as_axes(axes, scores.shape)
    if len(block_axes) != 2:
        raise ValueError(f"axes={axes} must name two axes")
    for axis in block_axes:
        check_multiple(scores.shape, axis, m)
    if n == m:
        return jnp.ones_like(scores, bool)
    first, second = sorted(block_axes)
    return _search(scores, n, m, first, second)


@partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _search(scores: Array, n: int, m: int, first: int, second: int) -> Array:
    """Split both axes in place and search every m x m block."""
    # One axis at a time: an Explicit mesh does not take two in one reshape.
    blocks = split_axis(split_axis(_finite_scores(scores), second, m), first, m)
    inner = (first + 1, second + 2)
    find = _best_pattern if m == 4 else _exchange_rows
    return merge_axis(merge_axis(find(blocks, n, inner), first), second)


def _finite_scores(scores: Array) -> Array:
    """Scale scores so that sums stay finite, and give inf and NaN large values."""
    wide = sum_dtype(scores.dtype)
    scores = scores.astype(wide)
    largest = float(jnp.finfo(wide).max)
    scaled = jnp.clip(scores * 2.0**-12, -largest * 2.0**-8, largest * 2.0**-8)
    return jnp.where(scores != scores, largest * 2.0**-4, scaled)


def _first_best(candidates: list[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Return the highest sum and its code; the first of equal ones."""
    while len(candidates) > 1:
        winners = []
        for i in range(0, len(candidates) - 1, 2):
            (low, low_code), (high, high_code) = candidates[i : i + 2]
            better = high > low
            code = jnp.where(better, high_code, low_code)
            winners.append((jnp.where(better, high, low), code))
        candidates = winners + candidates[len(winners) * 2 :]
    return candidates[0]


def _best_pattern(blocks: Array, n: int, inner: tuple[int, int]) -> Array:
    """Try all patterns of 4 x 4 with n kept per row and column.

    The search is factored over row pairs: for every way two rows can fill the columns
    the best of both halves is found once, and only halves that fit are added.
    """
    rows, columns = inner
    lines = [lax.index_in_dim(blocks, r, rows, keepdims=False) for r in range(4)]
    lanes = [
        [lax.index_in_dim(line, c, columns - 1, keepdims=False) for c in range(4)]
        for line in lines
    ]
    choices = list(itertools.combinations(range(4), n))
    sums = [
        [reduce(jnp.add, [row[c] for c in kept]) for kept in choices] for row in lanes
    ]

    def half(upper: int, lower: int) -> dict:
        found: dict = {}
        for (i, first), (j, second) in itertools.product(enumerate(choices), repeat=2):
            filled = tuple((c in first) + (c in second) for c in range(4))
            code = sum(1 << c for c in first) | sum(16 << c for c in second)
            total = sums[upper][i] + sums[lower][j]
            found.setdefault(filled, []).append((total, jnp.int32(code)))
        return {filled: _first_best(list_) for filled, list_ in found.items()}

    top, bottom = half(0, 1), half(2, 3)
    candidates = []
    for filled, (total, code) in top.items():
        missing = tuple(n - count for count in filled)
        if missing in bottom:
            rest, rest_code = bottom[missing]
            candidates.append((total + rest, code | (rest_code << 8)))
    _, code = _first_best(candidates)
    bits = lax.bitcast_convert_type(lanes[0][0].astype(jnp.float32), jnp.int32)
    code = jnp.expand_dims(stop_fusion(code, bits), (rows, columns))
    position = 4 * lax.broadcasted_iota(jnp.int32, blocks.shape, rows)
    position += lax.broadcasted_iota(jnp.int32, blocks.shape, columns)
    return ((code >> position) & 1).astype(bool)


def _exchange_rows(blocks: Array, n: int, inner: tuple[int, int]) -> Array:
    """Improve a cyclic pattern by exchanging kept columns between pairs of rows.

    For two rows the best way to share the columns that only one of them keeps is
    exact: the first row takes those with the largest difference of scores. Every
    exchange leaves all row and column counts as they are. A round pairs every row
    with one other; m - 1 rounds, by the circle method, meet all pairs.
    """
    m = blocks.shape[inner[0]]
    scores = jnp.moveaxis(blocks, inner, (0, 1))
    row = lax.broadcasted_iota(jnp.int32, scores.shape, 0)
    column = lax.broadcasted_iota(jnp.int32, scores.shape, 1)
    mask = lax.rem(column - row + m, jnp.int32(m)) < n
    mask |= scores != scores  # never, but it gives the mask the sharding of the scores
    if m % 2:  # an empty row sits out in turn: it has nothing to exchange
        pad = [(0, 1, 0)] + [(0, 0, 0)] * (scores.ndim - 1)
        scores = lax.pad(scores, jnp.zeros((), scores.dtype), pad)
        mask = lax.pad(mask, jnp.zeros((), bool), pad)
    half = scores.shape[0] // 2

    def exchange(_, state):
        scores, mask = state
        upper, lower = mask[:half], mask[half:][::-1]
        free = upper ^ lower
        keys = order_keys(scores[:half] - scores[half:][::-1])
        last = jnp.asarray(jnp.iinfo(keys.dtype).min + 1, keys.dtype)
        keys = jnp.where(free, keys, last)
        keys = stop_fusion(keys, keys)
        rank = stop_fusion(rank_in_groups(keys, m, 1), keys)
        taken = jnp.sum(upper & free, axis=1, keepdims=True, dtype=rank.dtype)
        shared, taken = upper & lower, free & (rank < taken)
        mask = jnp.concatenate([shared | taken, (shared | (free & ~taken))[::-1]])
        return _turn(scores), _turn(mask)

    rounds = SWEEPS * (scores.shape[0] - 1)
    _, mask = lax.fori_loop(0, rounds, exchange, (scores, mask))
    return jnp.moveaxis(mask[:m], (0, 1), inner)


def _turn(rows: Array) -> Array:
    """Move every row but the first one seat on, as in a round-robin tournament."""
    return jnp.concatenate([rows[:1], rows[-1:], rows[1:-1]])
