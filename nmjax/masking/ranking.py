"""How the n highest keys of every group of m are found, without a sort.

Groups are taken apart into lanes: lane i holds entry i of every group, so that all
groups are ranked at once by a handful of element-wise integer operations. The kept
entries of a group become the bits of one small integer, and a second pass expands it.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Integer

from nmjax.masking.ordering import split_axis

LARGEST_PAIRWISE = 8  # comparing all pairs of lanes grows with m * m
LARGEST_CODE = 16  # bits of a code


@partial(jax.jit, static_argnums=(1, 2, 3))
def keep_highest(
    keys: Integer[Array, "..."], n: int, m: int, axis: int
) -> Bool[Array, "..."]:
    """Mark the n highest keys of every m along a checked, non-negative axis.

    Ties keep the lowest index. No key may be the lowest integer of its dtype.
    """
    if n == m:
        return jnp.ones_like(keys, dtype=bool)
    if m > LARGEST_CODE:
        return rank_in_groups(keys, m, axis) < n
    groups = split_axis(keys, axis, m)
    lanes = [lax.index_in_dim(groups, i, axis + 1, keepdims=False) for i in range(m)]
    # Shifts along the last axis are slower in 8 bits; elsewhere they save memory.
    dtype = jnp.uint8 if m <= 8 and axis < keys.ndim - 1 else jnp.uint16
    if n == 1:
        code = _code_of_highest(lanes, dtype)
    elif m <= LARGEST_PAIRWISE:
        code = _code_by_pairs(lanes, n, dtype)
    else:
        code = _code_by_threshold(lanes, n, dtype)
    code = jnp.expand_dims(stop_fusion(code, lanes[0]), axis + 1)
    position = lax.broadcasted_iota(code.dtype, groups.shape, axis + 1)
    return ((code >> position) & 1).astype(bool).reshape(keys.shape)


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
    never_negative = lane.astype(jnp.int32) & jnp.int32(0x7FFFFFFF)
    one = 1 + lax.shift_right_logical(never_negative, jnp.int32(31))
    return lax.div(values, one.astype(values.dtype))


def _bit(flag: Array, index: int, dtype: DTypeLike) -> Array:
    return jnp.where(flag, jnp.asarray(1 << index, dtype), jnp.asarray(0, dtype))


def _code_of_highest(lanes: list[Array], dtype: DTypeLike) -> Array:
    """Code the highest of all lanes; n = 1 needs only one comparison per lane."""
    highest = lanes[0]
    code = jnp.full(highest.shape, 1, dtype)
    for i, lane in enumerate(lanes[1:], start=1):
        higher = lane > highest
        highest = jnp.where(higher, lane, highest)
        code = jnp.where(higher, jnp.asarray(1 << i, dtype), code)
    return code


def _code_by_pairs(lanes: list[Array], n: int, dtype: DTypeLike) -> Array:
    """Code the lanes that fewer than n others are ahead of."""
    wide = lanes[0].dtype
    ahead = {}
    for i in range(len(lanes)):
        for j in range(i):
            ahead[j, i] = (lanes[j] >= lanes[i]).astype(wide)  # ties: lower index
            ahead[i, j] = 1 - ahead[j, i]
    bits = []
    for i in range(len(lanes)):
        rank = reduce(jnp.add, [ahead[j, i] for j in range(len(lanes)) if j != i])
        bits.append(_bit(rank < n, i, dtype))
    return reduce(jnp.bitwise_or, bits)


def _code_by_threshold(lanes: list[Array], n: int, dtype: DTypeLike) -> Array:
    """Code the lanes above the n-th highest, and the first ones equal to it."""
    threshold = _highest_but(lanes, n - 1)
    above, reaching = jnp.asarray(0, dtype), jnp.asarray(0, dtype)
    for i, lane in enumerate(lanes):
        above |= _bit(lane > threshold, i, dtype)
        reaching |= _bit(lane >= threshold, i, dtype)
    equal = reaching ^ above
    missing = n - lax.population_count(above)
    code = above
    for i in range(n):
        first = equal & -equal
        code |= jnp.where(missing > i, first, jnp.asarray(0, dtype))
        equal ^= first
    return code


def _highest_but(lanes: list[Array], index: int) -> Array:
    """Find the entry at index in descending order by Batcher's merging network.

    Only the comparators, and of these only the outputs, that reach the wanted entry
    are built.
    """
    needed, kept = {index}, []
    for low, high in reversed(_merging_network(len(lanes))):
        outputs = (low in needed, high in needed)
        if any(outputs):
            needed |= {low, high}
            kept.append((low, high, outputs))
    wires: list = list(lanes)
    for low, high, (wants_max, wants_min) in reversed(kept):
        first, second = wires[low], wires[high]
        wires[low] = jnp.maximum(first, second) if wants_max else None
        wires[high] = jnp.minimum(first, second) if wants_min else None
    return wires[index]


def _merging_network(size: int) -> list[tuple[int, int]]:
    """List the comparators of Batcher's odd-even merge sort, for any size."""
    comparators = []
    run = 1
    while run < size:
        step = run
        while step >= 1:
            for start in range(step % run, size - step, 2 * step):
                for i in range(start, min(start + step, size - step)):
                    if i // (2 * run) == (i + step) // (2 * run):
                        comparators.append((i, i + step))
            step //= 2
        run *= 2
    return comparators


def rank_in_groups(keys: Array, m: int, axis: int) -> Array:
    """Count the entries of the own group that are ahead of every entry.

    The graph grows with m only, so that large groups still compile fast.
    """
    index = lax.broadcasted_iota(jnp.int32, keys.shape, axis)
    position = split_axis(lax.rem(index, jnp.int32(m)), axis, m)
    groups = split_axis(keys, axis, m)
    rank = jnp.zeros(groups.shape, keys.dtype)
    for j in range(m):
        lane = lax.slice_in_dim(groups, j, j + 1, axis=axis + 1)
        # lane >= own key for entries after j (a tie keeps j), lane > own key before it.
        # No key is the lowest integer, so the difference does not wrap around.
        later = (position > j).astype(keys.dtype)
        rank += jnp.greater(lane, groups - later).astype(keys.dtype)
    return rank.reshape(keys.shape)
