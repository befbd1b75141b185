"""Exact top-k masks by bisection on the bit pattern: no sort, no gather.

The threshold is found bit by bit by counting. Counts are the only values that cross
devices, so a sharded array is never gathered.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Integer, PyTree, Shaped

from nmjax.masking.counting import select_highest
from nmjax.masking.ordering import as_axes, as_count, as_scores, order_keys

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
    whole = None if len(axes) == len(shape) else tuple(sorted(axes))
    [mask] = select_highest([order_keys(scores)], jnp.asarray(k, jnp.int32), whole)
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
        found = iter(select_highest(keys, jnp.asarray(k, jnp.int32), None))
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
