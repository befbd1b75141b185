"""Exact selection of the k highest keys by counting: no sort, no gather.

The k-th highest key is found digit by digit, as in a radix sort that never moves its
input: with the higher digits known, the next one is bisected by counting the keys at
or above a candidate. Counts are the only values that cross devices. One digit has 8
bits, so that the eight counts of its bisection read one byte per entry.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Integer

from nmjax.masking.ordering import count_shards, explicit_sharding, split_axis
from nmjax.masking.ranking import stop_fusion

DIGIT = 8  # bits
PART = 16  # entries that are counted in one int8 before they are added up
SMALL = 2**15  # entries below which parts do not pay
_UNSIGNED = {2: jnp.uint16, 4: jnp.uint32, 8: jnp.uint64}

Counter = Callable[[Sequence[Array]], Array]


@partial(jax.jit, static_argnums=2)
def select_highest(
    keys: Sequence[Integer[Array, "..."]],
    k: Integer[Array, ""],
    axes: tuple[int, ...] | None,
) -> list[Bool[Array, "..."]]:
    """Mark the k highest keys: over all arrays together, or along axes of one.

    Ties keep the array that comes first and in it the lowest row-major index.

    Args:
      keys: Signed integers of one dtype; one array if axes is not None.
      k: Keys to mark, or keys to mark in every slice along axes.
      axes: Non-negative axes in ascending order, or None.
    """
    axes_of = [tuple(range(key.ndim)) if axes is None else axes for key in keys]
    sizes = [
        math.prod(key.shape[axis] for axis in along)
        for key, along in zip(keys, axes_of, strict=True)
    ]
    total = sum(sizes)
    if total > np.iinfo(np.int32).max:
        raise ValueError(
            f"k entries are chosen among {total}, but counts are 32-bit integers: at "
            "most 2**31 - 1 entries can be ranked together; choose per leaf or axis"
        )

    def count(flags: Sequence[Array]) -> Array:
        counts = [
            count_true(flag, along) for flag, along in zip(flags, axes_of, strict=True)
        ]
        found = sum(counts[1:], counts[0])
        return found if axes is None else jnp.expand_dims(found, axes)

    unsigned = _UNSIGNED[keys[0].dtype.itemsize]
    lowest = jnp.asarray(jnp.iinfo(keys[0].dtype).min, keys[0].dtype)
    shifted = [lax.bitcast_convert_type(key ^ lowest, unsigned) for key in keys]
    firsts = [total - sum(sizes[:i]) for i in range(len(sizes))]

    def ranks(threshold: Array) -> list[Array]:
        """Rank ties, from the first index on, below all keys above the threshold."""
        found = []
        for key, along, first in zip(shifted, axes_of, firsts, strict=True):
            rank = jnp.uint32(first) - _row_major_index(key, along)
            rank = jnp.where(key == threshold, rank, jnp.uint32(0))
            found.append(jnp.where(key > threshold, jnp.uint32(2**32 - 1), rank))
        return found

    everything = count([key == key for key in keys])
    threshold, bound = _find_bounds(shifted, ranks, total, k, everything, count)

    def keep_reaching() -> list[Array]:
        return [key >= threshold for key in shifted]

    def break_ties() -> list[Array]:
        # A slice that needs no ranks keeps everything from the threshold on.
        return [rank >= jnp.maximum(bound, 1) for rank in ranks(threshold)]

    return lax.cond(jnp.all(bound == 0), keep_reaching, break_ties)


def _find_bounds(
    keys: Sequence[Array],
    ranks: Callable[[Array], Sequence[Array]],
    total: int,
    k: Array,
    everything: Array,
    count: Counter,
) -> tuple[Array, Array]:
    """Find the largest threshold that k keys or more reach, and a bound for ties.

    The digits of the ranks follow those of the keys, in one loop: that is half the
    program to compile. It stops at the first digit where exactly k entries of every
    slice reach what is known.
    """
    dtype = keys[0].dtype
    ties = -(-total.bit_length() // DIGIT)
    digits = ties + dtype.itemsize * 8 // DIGIT

    def unfinished(state):
        digit, _, _, reached = state
        return (digit >= 0) & jnp.any(reached != k)

    def find_digit(state):
        digit, threshold, bound, reached = state
        among_ties = digit < ties
        shift = jnp.where(among_ties, digit, digit - ties) * DIGIT
        values = lax.cond(
            among_ties,
            lambda: [_digit_above(rank, bound, shift) for rank in ranks(threshold)],
            lambda: [_digit_above(key, threshold, shift) for key in keys],
        )

        def halve(i, state):
            low, reached = state
            half = jnp.int32(2 ** (DIGIT - 1))
            middle = low + lax.shift_right_logical(half, i)
            found = count([value >= middle.astype(jnp.int8) for value in values])
            enough = found >= k
            return jnp.where(enough, middle, low), jnp.where(enough, found, reached)

        lowest = jnp.zeros_like(reached) - 2 ** (DIGIT - 1)
        low, reached = lax.fori_loop(
            jnp.int32(0), jnp.int32(DIGIT), halve, (lowest, reached)
        )
        found = low - lowest

        def extend(known: Array, here: Array) -> Array:
            grown = lax.shift_left(found.astype(known.dtype), shift.astype(known.dtype))
            return jnp.where(here, known | grown, known)

        threshold = extend(threshold, ~among_ties)
        return digit - 1, threshold, extend(bound, among_ties), reached

    start = (
        jnp.int32(digits - 1),
        jnp.zeros_like(everything, dtype),
        jnp.zeros_like(everything, jnp.uint32),
        everything,
    )
    _, threshold, bound, _ = lax.while_loop(unfinished, find_digit, start)
    return threshold, bound


def _digit_above(keys: Array, threshold: Array, shift: Array) -> Array:
    """Return the digit at shift of keys with the prefix of threshold, as int8 - 128.

    Keys with a higher prefix count as the highest digit and keys with a lower one as
    the lowest, which no bisection asks for.
    """
    shift = shift.astype(keys.dtype)
    keys, threshold = keys >> shift, threshold >> shift
    beyond = jnp.minimum(keys - threshold, jnp.asarray(2**DIGIT - 1, keys.dtype))
    digit = jnp.where(keys < threshold, jnp.zeros_like(keys), beyond)
    return lax.bitcast_convert_type(digit.astype(jnp.uint8) ^ 128, jnp.int8)


def _row_major_index(like: Array, axes: tuple[int, ...]) -> Array:
    def along(axis: int) -> Array:
        return lax.broadcasted_iota(
            jnp.uint32, like.shape, axis, out_sharding=explicit_sharding(like)
        )

    index = along(axes[0])
    for axis in axes[1:]:
        index = index * jnp.uint32(like.shape[axis]) + along(axis)
    return index


def count_true(
    flags: Bool[Array, "..."], axes: tuple[int, ...]
) -> Integer[Array, "..."]:
    """Count the True entries along axes as int32.

    XLA:CPU adds int32 one by one. Parts of 16 entries are added in int8 and 16 of
    these in int16 first, which it does 32 and 16 at a time. One axis is split in place
    for it, such that a shard holds whole parts and nothing but counts is communicated.
    """
    last = flags.ndim - 1
    parts = flags.astype(jnp.int8)
    split = None
    if flags.size >= SMALL:
        rows = sorted(set(axes) - {last}, key=lambda axis: -flags.shape[axis])
        split = next((a for a in rows if _has_parts(flags, a, PART)), None)
        if split is not None:
            parts = _add_up(split_axis(parts, split, PART), split + 1)
        elif last in axes:  # vectors of neighbours stay innermost
            widths = [w for w in (64, 32, 16) if _has_parts(flags, last, PART * w)]
            if widths:
                split = last
                parts = split_axis(parts, last, PART * widths[0])
                parts = split_axis(parts, last + 1, widths[0])
                parts = _add_up(parts, last + 1)
                axes = (*axes, last + 1)
    if split is not None and _has_parts(parts, split, PART):
        parts = split_axis(parts.astype(jnp.int16), split, PART)
        parts = _add_up(parts, split + 1)
    return jnp.sum(parts, axis=axes, dtype=jnp.int32)


def _add_up(parts: Array, axis: int) -> Array:
    sums = jnp.sum(parts, axis=axis, dtype=parts.dtype)
    return stop_fusion(sums, sums)


def _has_parts(x: Array, axis: int, part: int) -> bool:
    """Tell whether axis splits into parts so that every shard holds whole ones."""
    groups, rest = divmod(x.shape[axis], part)
    even = groups % 16 == 0 and groups % count_shards(x, axis) == 0
    return rest == 0 and groups > 0 and even
