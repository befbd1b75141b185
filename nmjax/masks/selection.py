"""Exact top-k masks by bisection on the bit pattern: no sort, no gather.

The threshold is found bit by bit by counting. Counts are the only values that cross
devices, so a sharded array is never gathered.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Integer, PyTree, Shaped

from nmjax.masks.ordering import as_axes, as_count, as_scores, order_keys

__all__ = ["fan_in_mask", "global_topk_mask", "topk_mask"]

Count = int | np.integer | Integer[ArrayLike, ""]


def topk_mask(
    scores: Shaped[ArrayLike, "..."],
    k: Count,
    axis: int | tuple[int, ...] | None = None,
) -> Bool[Array, "..."]:
    r"""Keep exactly the k highest scores of every slice.

    .. math:: E = [s > t] \lor ([s = t] \land i < b),
        \quad t = \max \{ t : \#(s \ge t) \ge k \}

    where the index bound b breaks ties in favour of the lowest (row-major) index.

    Args:
      scores: Real floating array of any rank. Higher is kept; NaN counts as the
        highest score of all, ``-0.0`` as equal to ``0.0``.
      k: Entries kept in every slice, an int or a (possibly traced) integer scalar.
        A traced k is not checked; out of range it acts like the nearest bound.
      axis: The axis or axes that the k entries are chosen along, for every position
        of the other axes on its own. None chooses among all entries.

    Returns:
      Boolean mask of the shape of scores, True = kept.

    Raises:
      TypeError: If scores are not real floats or k is not an integer.
      ValueError: If k is not between 0 and the slice size, an axis is out of range
        or named twice, or a slice has 2**31 entries or more.

    >>> import jax.numpy as jnp
    >>> import nmjax as nm
    >>> scores = jnp.array([[0.3, 0.1, 0.2], [0.9, 0.2, 0.4]])
    >>> nm.topk_mask(scores, 2).astype(int).tolist()
    [[0, 0, 0], [1, 0, 1]]
    >>> nm.topk_mask(scores, 1, axis=1).astype(int).tolist()
    [[1, 0, 0], [1, 0, 0]]
    """
    scores = as_scores(scores)
    shape = scores.shape
    axes = tuple(range(len(shape))) if axis is None else as_axes(axis, shape, "axis")
    if not axes and shape:
        raise ValueError(f"axis={axis} names no axis of shape {shape} to choose along")
    k = as_count(k, math.prod(shape[a] for a in axes), "size of a slice")
    if scores.size == 0:
        return jnp.zeros(shape, bool)
    if not shape:
        return topk_mask(scores.reshape(1), k)[0]
    [mask] = _select([order_keys(scores)], k, axes)
    return mask


def global_topk_mask(tree: PyTree, k: Count) -> PyTree:
    """Keep exactly the k highest scores over all leaves of a tree together.

    Ties keep the leaf that comes first, and in it the lowest row-major index.

    Args:
      tree: Pytree of real floating arrays; `optax.MaskedNode` leaves pass through.
      k: Entries kept in all, an int or a (possibly traced) integer scalar.

    Returns:
      Tree of boolean masks of the same structure.

    Raises:
      TypeError: If a leaf is not a real floating array or k is not an integer.
      ValueError: If k is not between 0 and the number of scores, or the tree has
        2**31 scores or more.

    >>> import jax.numpy as jnp
    >>> import nmjax as nm
    >>> scores = {"a": jnp.array([0.3, 0.9]), "b": jnp.array([0.5, 0.1, 0.7])}
    >>> masks = nm.global_topk_mask(scores, 2)
    >>> masks["a"].astype(int).tolist(), masks["b"].astype(int).tolist()
    ([0, 1], [0, 0, 1])
    """
    paths, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = []
    for path, leaf in paths:
        try:
            leaves.append(as_scores(leaf))
        except TypeError as error:
            raise TypeError(f"leaf {jax.tree_util.keystr(path)}: {error}") from error
    k = as_count(k, sum(leaf.size for leaf in leaves), "number of scores in the tree")
    full = [leaf for leaf in leaves if leaf.size]
    found = iter(())
    if full:
        dtypes = {leaf.dtype for leaf in full}
        # Leaves of different dtypes compete in one that holds all of them exactly.
        common = jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32
        wide = dtypes.pop() if len(dtypes) == 1 else common
        keys = [
            order_keys(leaf.astype(wide)).reshape(leaf.shape or (1,)) for leaf in full
        ]
        found = iter(_select(keys, k, None))
    masks = [
        next(found).reshape(leaf.shape) if leaf.size else jnp.zeros(leaf.shape, bool)
        for leaf in leaves
    ]
    return jax.tree.unflatten(structure, masks)


def fan_in_mask(
    scores: Shaped[ArrayLike, "..."], k: Count, neuron_axes: int | tuple[int, ...] = -1
) -> Bool[Array, "..."]:
    """Keep exactly k incoming weights of every neuron (constant fan-in).

    Args:
      scores: Real floating array; order and ties as in `topk_mask`.
      k: Incoming weights kept per neuron, an int or a traced integer scalar.
      neuron_axes: The axes that number the neurons; all others are fan-in. The
        default fits Flax Dense ``(in, out)`` and HWIO convolution kernels.

    Returns:
      Boolean mask of the shape of scores, True = kept.

    Raises:
      TypeError: If scores are not real floats or k is not an integer.
      ValueError: If k is not between 0 and the fan-in, an axis is out of range or
        named twice, or no axis is left for the fan-in.

    >>> import jax.numpy as jnp
    >>> import nmjax as nm
    >>> scores = jnp.array([[0.3, 0.1], [0.9, 0.2], [0.5, 0.4]])
    >>> nm.fan_in_mask(scores, 2).astype(int).tolist()
    [[0, 0], [1, 1], [1, 1]]

    Reference: Lasby et al. 2023, Dynamic sparse training with structured sparsity,
    arXiv:2305.02299, section 3.
    """
    scores = as_scores(scores)
    neurons = as_axes(neuron_axes, scores.shape, "neuron_axes")
    fan_in = tuple(axis for axis in range(scores.ndim) if axis not in neurons)
    if not fan_in:
        raise ValueError(
            f"neuron_axes={neuron_axes} leaves no fan-in axis of shape {scores.shape}"
        )
    return topk_mask(scores, k, fan_in)


def _select(
    keys: Sequence[Array], k: int | Array, axes: tuple[int, ...] | None
) -> list[Array]:
    """Select the k highest keys: over all arrays together, or along axes of one."""
    if axes is None:
        sizes = [key.size for key in keys]
        axes_of = [tuple(range(key.ndim)) for key in keys]
    else:
        sizes = [math.prod(keys[0].shape[axis] for axis in axes)]
        axes_of = [axes]
    total = sum(sizes)
    if total > np.iinfo(np.int32).max:
        raise ValueError(
            f"k entries are chosen among {total}, but counts are 32-bit integers: at "
            "most 2**31 - 1 entries can be ranked together; choose per leaf or axis"
        )
    k = jnp.asarray(k, jnp.int32)

    def count(flags: Sequence[Array]) -> Array:
        counts = [
            jnp.sum(flag, axis=axis, keepdims=axes is not None, dtype=jnp.int32)
            for flag, axis in zip(flags, axes_of, strict=True)
        ]
        return sum(counts[1:], counts[0])

    zero = count([key != key for key in keys])
    width = 8 * keys[0].dtype.itemsize
    threshold, reached = _bisect(keys, k, zero, total, width, count)
    above = [key > threshold for key in keys]
    equal = [key == threshold for key in keys]

    def break_ties() -> list[Array]:
        ranks = _reversed_indices(keys, axes_of, sizes)
        tied = [
            jnp.where(a, total, jnp.where(e, rank, -1))
            for a, e, rank in zip(above, equal, ranks, strict=True)
        ]
        bound, _ = _bisect(tied, k, zero, total, 32, count)
        return [(rank >= bound) & (rank >= 0) for rank in tied]

    def keep_equal() -> list[Array]:
        return [a | e for a, e in zip(above, equal, strict=True)]

    return lax.cond(jnp.all(reached == k), keep_equal, break_ties)


def _bisect(
    keys: Sequence[Array],
    k: Array,
    zero: Array,
    total: int,
    width: int,
    count: Callable[[Sequence[Array]], Array],
) -> tuple[Array, Array]:
    """Find the largest threshold with at least k keys at or above it, and its count."""
    dtype = keys[0].dtype

    def body(i, state):
        low, reached = state
        step = jnp.asarray(1, dtype) << (width - 1 - i).astype(dtype)
        # The first step adds half the range to the lowest integer and gives 0.
        middle = low + step
        found = count([key >= middle for key in keys])
        enough = found >= k
        return jnp.where(enough, middle, low), jnp.where(enough, found, reached)

    low = zero.astype(dtype) + jnp.asarray(jnp.iinfo(dtype).min, dtype)
    return lax.fori_loop(0, width, body, (low, zero + total))


def _reversed_indices(
    keys: Sequence[Array], axes_of: Sequence[tuple[int, ...]], sizes: Sequence[int]
) -> list[Array]:
    """Number the entries of every slice from the last to the first, across arrays."""
    left, indices = sum(sizes) - 1, []
    for key, axes, size in zip(keys, axes_of, sizes, strict=True):
        index = jnp.zeros(key.shape, jnp.int32)
        for axis in axes:
            step = lax.broadcasted_iota(jnp.int32, key.shape, axis)
            index = index * key.shape[axis] + step
        indices.append(left - index)
        left -= size
    return indices
