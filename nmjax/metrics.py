"""Metrics: how sparse the masks are, how fast they change and what they keep.

`density`, `sad`, `flip_rate`, `overlap` and `kept_magnitude` take arrays or trees and
give one scalar; `per_leaf` gives one for each leaf. `explore` collects the positions
that a training has used so far. `nm.tracker` measures at every step of a training.

Kept weights and flips are counted in integers, exactly for any number of weights,
and become float32 only in the last division. Trees of masks hold bool arrays,
True = kept, and `optax.MaskedNode()` at leaves that stay dense; those do not count.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from nmjax.masking.ordering import count_shards, split_axis
from nmjax.pairing import check_bool, leaf_name, pair, pair_masks, pair_params
from nmjax.paths import is_masked, named_leaves
from nmjax.typing import Masks, Params

INT32_MAX = 2**31 - 1
"""The largest count that `sad` can give."""

# Counts are added in limbs of this many bits.
_LIMB = 8


def density(masks: Masks) -> Float[Array, ""]:
    r"""Give the kept fraction of a mask, or of all masks of a tree together.

    .. math:: d = \frac{1}{n} \sum_i e_i

    Args:
      masks: a bool array or a tree of them.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      TypeError: a mask is not bool.
      ValueError: there is no mask, or none with an entry.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import metrics
      >>> float(metrics.density(jnp.array([True, False, False, False])))
      0.25
    """
    leaves = pair(masks=masks)
    for path, (mask,) in leaves.items():
        check_bool(path, mask)
    size = sum(mask.size for (mask,) in leaves.values())
    return _divide([_count(mask) for (mask,) in leaves.values()], size)


def density_all(params: Params, masks: Masks) -> Float[Array, ""]:
    r"""Give the kept fraction of all params, where dense leaves keep everything.

    .. math:: d = 1 - \frac{1}{n_\mathrm{all}} \sum_i (1 - e_i)

    Args:
      params: the tree; every leaf counts, biases and norm scales too.
      masks: bool arrays, or `optax.MaskedNode()` for dense leaves.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      TypeError: a mask is not bool.
      ValueError: a mask fits no leaf; or there is no mask.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import metrics
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(32)}
      >>> masks = nm.compute_masks(params, nm.plan(params, nm.NM(2, 4)))
      >>> float(metrics.density(masks)), float(metrics.density_all(params, masks))
      (0.5, 0.75)
    """
    pair_params(params, masks)
    size = _total_size(masks) / _total_size(params)
    return 1.0 - (1.0 - density(masks)) * size


def sad(old: Masks, new: Masks) -> Int[Array, ""]:
    r"""Count the mask entries that changed: the sparse architecture divergence.

    .. math:: \mathrm{SAD} = \lVert E_\mathrm{new} - E_\mathrm{old} \rVert_1

    As published: not normalised, and a weight that leaves plus one that comes count
    as two. `flip_rate` is the same divided by the size.

    Args:
      old: masks before; a bool array or a tree of them.
      new: masks after, of the same paths and shapes.

    Returns:
      int32 scalar, exact.

    Raises:
      TypeError: a mask is not bool.
      ValueError: the masks differ in paths or shapes; or they have more than
        2**31 - 1 entries, which int32 cannot count.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import metrics
      >>> old, new = jnp.array([True, False]), jnp.array([False, True])
      >>> int(metrics.sad(old, new)), float(metrics.flip_rate(old, new))
      (2, 1.0)

    Reference:
      Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
      Scratch", 2021, arXiv 2102.04010.
    """
    leaves = pair_masks(old, new)
    size = sum(mask.size for _, mask in leaves.values())
    if size > INT32_MAX:
        raise ValueError(
            f"the masks have {size} entries; an int32 counts to {INT32_MAX}. Use "
            "flip_rate, which is exact at any size, or per_leaf(sad, old, new)"
        )
    return _as_int([_count(before != after) for before, after in leaves.values()])


def flip_rate(old: Masks, new: Masks) -> Float[Array, ""]:
    r"""Give the fraction of mask entries that changed: SAD divided by the size.

    .. math:: r = \frac{1}{n} \lVert E_\mathrm{new} - E_\mathrm{old} \rVert_1

    Between consecutive steps it shows the health of a sparse training; compare with
    the flip rate that dense training has for the masks of its weights.

    Args:
      old: masks before; a bool array or a tree of them.
      new: masks after, of the same paths and shapes.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      TypeError: a mask is not bool.
      ValueError: the masks differ in paths or shapes, or have no entry.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import metrics
      >>> old = jnp.array([True, True, False, False])
      >>> float(metrics.flip_rate(old, jnp.array([True, False, True, False])))
      0.5

    Reference:
      Hu et al., "Accelerating Transformer Pre-training with 2:4 Sparsity", 2024,
      arXiv 2404.01847.
    """
    leaves = pair_masks(old, new)
    size = sum(mask.size for _, mask in leaves.values())
    return _divide([_count(before != after) for before, after in leaves.values()], size)


def overlap(old: Masks, new: Masks) -> Float[Array, ""]:
    r"""Give the share of the kept weights that stayed.

    .. math:: \frac{\sum_i e_i^\mathrm{old} e_i^\mathrm{new}}{\sum_i e_i^\mathrm{old}}

    Old masks that keep nothing have nothing to lose: the result is 1.

    Args:
      old: masks before; a bool array or a tree of them.
      new: masks after, of the same paths and shapes.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      TypeError: a mask is not bool.
      ValueError: the masks differ in paths or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import metrics
      >>> old = jnp.array([True, True, False, False])
      >>> float(metrics.overlap(old, jnp.array([True, False, True, True])))
      0.5
    """
    leaves = pair_masks(old, new)
    stayed = add_counts([_count(before & after) for before, after in leaves.values()])
    kept = add_counts([_count(before) for before, _ in leaves.values()])
    return jnp.where(kept == 0, 1.0, stayed / jnp.where(kept == 0, 1.0, kept))


def explore(explored: Masks, masks: Masks) -> Masks:
    r"""Add the positions that masks keep to those explored so far.

    .. math:: U_t = U_{t-1} \lor E_t, \qquad R_s = \frac{1}{n} \sum_i u_i

    The density of the result, ``density(explored)``, is the in-time
    over-parameterisation rate :math:`R_s` (ITOP) of the sparse leaves. Start with a
    training's first masks.

    Args:
      explored: positions kept at some time; a bool array or a tree of them.
      masks: the masks now, of the same paths and shapes.

    Returns:
      A tree with the structure of `masks`, dense leaves `optax.MaskedNode()`.

    Raises:
      TypeError: a mask is not bool.
      ValueError: the masks differ in paths or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import metrics
      >>> explored = jnp.array([True, False, False, False])
      >>> explored = metrics.explore(explored, jnp.array([False, True, False, False]))
      >>> float(metrics.density(explored))
      0.5

    Reference:
      Liu, Yin, Mocanu and Pechenizkiy, "Do We Actually Need Dense
      Over-Parameterization? In-Time Over-Parameterization in Sparse Training", 2021,
      arXiv 2102.02887.
    """
    leaves = pair_masks(explored, masks)
    pairs, treedef = named_leaves(masks)
    union = [
        mask if is_masked(mask) else jnp.logical_or(*leaves[path])
        for path, mask in pairs
    ]
    return jax.tree.unflatten(treedef, union)


def kept_magnitude(params: Params, masks: Masks) -> Float[Array, ""]:
    r"""Give the part of the weights' magnitude that the masks keep.

    .. math:: \frac{\sum_i e_i |w_i|}{\sum_i |w_i|}

    Weights that are all zero lose nothing: the result is 1. A weight that is NaN or
    infinite makes it NaN. Sums are accumulated in float32, or in float64 for float64
    weights.

    Args:
      params: a floating point array, or a tree; leaves without a mask do not count.
      masks: bool array, or a tree of them with the paths of `params`.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      TypeError: a mask is not bool, or a weight with a mask is not floating point.
      ValueError: masks and params differ in paths or shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import metrics
      >>> weights, mask = jnp.array([3.0, -1.0]), jnp.array([True, False])
      >>> float(metrics.kept_magnitude(weights, mask))
      0.75
    """
    leaves = pair_params(params, masks)
    return _ratio([_magnitudes(path, *leaf) for path, leaf in leaves.items()])


def per_leaf(metric: Callable[..., Array], *trees: PyTree) -> dict[str, Array]:
    """Apply a metric to every leaf by itself.

    Args:
      metric: a function of this module, or another one of arrays.
      *trees: what the metric takes, for example ``old, new`` or ``params, masks``.
        The arrays of the last tree decide which leaves count.

    Returns:
      Path name, as in the plan, -> the metric of that leaf.

    Raises:
      ValueError: another tree lacks a leaf of the last, or has another shape there.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import metrics
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}
      >>> masks = nm.compute_masks(params, nm.plan(params, nm.NM(1, 4)))
      >>> float(metrics.per_leaf(metrics.density, masks)["kernel"])
      0.25
    """
    named = {f"tree {i}": tree for i, tree in enumerate(trees)}
    return {path: metric(*leaf) for path, leaf in pair(**named).items()}


def _count(mask: Any) -> Int[Array, "..."]:
    """Count True entries: an int32 array whose sum is the count.

    Leading axes are kept where a sum over them could pass 2**31 - 1.
    """
    mask, keep = jnp.asarray(mask), 0
    while math.prod(mask.shape[keep:]) > INT32_MAX:
        keep += 1
    axes = tuple(range(keep, mask.ndim))
    return jnp.sum(_add_bytes(mask), axis=axes, dtype=jnp.int32)


def _add_bytes(mask: Array) -> Array:
    """Add 16 entries at a time as bytes, where an axis can be split.

    XLA on CPUs writes a mask out as int32 before it adds it up; with bytes it does
    not, and the count is many times as fast.
    """
    # The highest power of two splits best where the axis is sharded, too.
    for axis in sorted(
        range(mask.ndim), key=lambda i: -(mask.shape[i] & -mask.shape[i])
    ):
        length = mask.shape[axis]
        if length % (16 * count_shards(mask, axis)) == 0:
            parts = split_axis(mask, axis, 16)
            return jnp.sum(parts, axis=axis + 1, dtype=jnp.uint8)
    return mask


def _as_int(parts: Sequence[Array]) -> Int[Array, ""]:
    """Add counts whose sum is known to fit an int32."""
    return functools.reduce(jnp.add, [jnp.sum(p, dtype=jnp.int32) for p in parts])


def add_counts(parts: Sequence[Array]) -> Float[Array, ""]:
    """Add counts exactly, and round once, to float32.

    The sum is held as high * 2**8 + low.

    Args:
      parts: int32 arrays without negative entries, with at most 2**23 entries and a
        sum below 2**39, all together.

    Returns:
      float32 scalar.

    Raises:
      ValueError: there are more entries.
    """
    if (entries := sum(part.size for part in parts)) > 2 ** (31 - _LIMB):
        raise ValueError(f"{entries} partial counts are too many to be added")
    low = _as_int([part & (2**_LIMB - 1) for part in parts])
    high = _as_int([part >> _LIMB for part in parts]) + (low >> _LIMB)
    low = (low & (2**_LIMB - 1)).astype(jnp.float32)
    return high.astype(jnp.float32) * 2.0**_LIMB + low


def _divide(parts: Sequence[Array], size: int) -> Float[Array, ""]:
    """Divide the sum of counts by a size."""
    if size == 0:
        raise ValueError(
            "the masks have no entries; a fraction of nothing is undefined"
        )
    if size > 2 ** (31 + _LIMB):
        raise ValueError(f"masks with {size} entries are too large to be counted")
    return add_counts(parts) / float(size)


def _total_size(params: Params) -> int:
    """Count the entries of all leaves."""
    return sum(leaf.size for _, leaf in named_leaves(params)[0] if not is_masked(leaf))


def _magnitudes(path: str, weights: Any, mask: Any) -> tuple[Array, Array]:
    """Sum the magnitude of the kept and of all weights."""
    dtype = jnp.result_type(weights)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"{leaf_name(path)} has dtype {dtype}, must be floating point")
    wide = dtype if jnp.finfo(dtype).bits > 32 else jnp.float32
    size = jnp.abs(weights).astype(wide)
    kept = jnp.where(mask, size, jnp.zeros((), wide))
    return jnp.sum(kept).astype(jnp.float32), jnp.sum(size).astype(jnp.float32)


def _ratio(sums: Sequence[tuple[Array, Array]]) -> Float[Array, ""]:
    """Divide the kept magnitude by all of it; 1 where there is none."""
    kept, total = (
        functools.reduce(jnp.add, column) for column in zip(*sums, strict=True)
    )
    return jnp.where(total == 0, 1.0, kept / jnp.where(total == 0, 1.0, total))
