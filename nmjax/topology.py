"""Topology: how a sparse layer drops weights and grows others.

Pure functions of one layer: weights, mask and gradients in, the new mask out. They
know nothing of optimizers; `nmjax.transforms` calls them at the right steps.

The layout is Flax's: the last axis counts neurons, all others are their inputs.
Counts are integers and conserved; ties keep the lowest index. A weight that has just
been dropped may come straight back, and then keeps its value.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from nmjax.masking import topk_mask
from nmjax.masking.counting import count_true, select_highest
from nmjax.masking.ordering import explicit_sharding, order_keys
from nmjax.saliency import magnitude
from nmjax.typing import FloatArray, MaskArray

Fraction = float | int | Float[Array, ""]


def drop_count(active: Int[Array, ""], drop_fraction: Fraction) -> Int[Array, ""]:
    r"""Count the weights that a layer drops.

    .. math:: n_{drop} = \lfloor n_{active} \, f \rfloor

    in float32, where a product less than 1/1000 below an integer counts as that
    integer, so that 10 weights at 0.7 give 7.

    Args:
      active: number of active weights.
      drop_fraction: f in [0, 1], may be traced.

    Returns:
      An int32 between 0 and `active`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import topology
      >>> int(topology.drop_count(jnp.array(10), 0.7))
      7
    """
    _check_fraction(drop_fraction)
    share = active.astype(jnp.float32) * jnp.asarray(drop_fraction).astype(jnp.float32)
    return jnp.clip(jnp.floor(share + 1e-3).astype(jnp.int32), 0, active)


def keep_largest(
    weights: FloatArray, mask: MaskArray, drop_fraction: Fraction
) -> tuple[MaskArray, Int[Array, ""]]:
    """Drop the smallest active weights of a layer.

    Args:
      weights: weights of any shape.
      mask: active weights, of the same shape.
      drop_fraction: fraction of the active weights to drop, in [0, 1].

    Returns:
      The mask of the weights that stay, and the number dropped.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import topology
      >>> weights, mask = jnp.array([3.0, -1.0, 2.0, 0.0]), jnp.array([1, 1, 1, 0]) == 1
      >>> kept, dropped = topology.keep_largest(weights, mask, 0.34)
      >>> kept.tolist(), int(dropped)
      ([True, False, True, False], 1)
    """
    active = _count(mask)
    dropped = drop_count(active, drop_fraction)
    return topk_mask(score_active(weights, mask), active - dropped), dropped


def regrow(
    kept: MaskArray, growth: FloatArray, choose: Callable[[FloatArray], MaskArray]
) -> MaskArray:
    """Fill up a mask by growth scores, as a pattern allows.

    Args:
      kept: weights that stay in any case; no more than the pattern has room for.
      growth: the higher, the sooner a weight is grown; NaN counts as the largest
        finite score.
      choose: turns scores into the mask of the pattern, for example
        ``lambda scores: nm.nm_mask(scores, 2, 4)``.

    Returns:
      The mask, `kept` included.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import topology
      >>> kept = jnp.array([True, False, False, False])
      >>> growth = jnp.array([0.0, 1.0, 3.0, 2.0])
      >>> topology.regrow(kept, growth, lambda s: nm.nm_mask(s, 2, 4, 0)).tolist()
      [True, False, True, False]
    """
    largest = jnp.asarray(jnp.finfo(growth.dtype).max, growth.dtype)
    finite = jnp.where(jnp.isnan(growth), largest, jnp.minimum(growth, largest))
    return choose(jnp.where(kept, jnp.asarray(jnp.inf, growth.dtype), finite))


def rigl_update(
    weights: FloatArray, mask: MaskArray, grads: FloatArray, *, drop_fraction: Fraction
) -> MaskArray:
    r"""Drop by magnitude, grow by gradient (RigL).

    With :math:`n_{drop} = \lfloor f \, n_{active} \rfloor`: keep the
    :math:`n_{active} - n_{drop}` largest :math:`|w|` of the active weights, then grow
    the :math:`n_{drop}` largest :math:`|g|` among all positions not kept.

    Args:
      weights: weights of one layer, any shape.
      mask: its active weights.
      grads: dense gradient of the loss with respect to the masked weights, averaged
        over replicas and microbatches BEFORE this call.
      drop_fraction: f in [0, 1], may be traced.

    Returns:
      The new mask, with as many active weights as the old one.

    Raises:
      ValueError: shapes differ, or `drop_fraction` is outside [0, 1].

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> weights = jnp.array([[3.0, 1.0], [0.0, 0.0]])
      >>> mask = jnp.array([[True, True], [False, False]])
      >>> grads = jnp.array([[0.0, 0.0], [1.0, 5.0]])
      >>> nm.rigl_update(weights, mask, grads, drop_fraction=0.5).tolist()
      [[True, False], [False, True]]

    Reference:
      Evci et al., "Rigging the Lottery: Making All Tickets Winners", 2020, arXiv
      1911.11134, algorithm 1.
    """
    _check_shapes(weights, mask, grads)
    kept, _ = keep_largest(weights, mask, drop_fraction)
    active = _count(mask)
    return regrow(kept, jnp.abs(grads), lambda scores: topk_mask(scores, active))


def set_update(
    key: PRNGKeyArray, weights: FloatArray, mask: MaskArray, *, drop_fraction: Fraction
) -> MaskArray:
    """Drop by magnitude, grow at random (SET).

    Args:
      key: random key.
      weights: weights of one layer, any shape.
      mask: its active weights.
      drop_fraction: fraction of the active weights that is dropped and regrown, in
        [0, 1]; may be traced.

    Returns:
      The new mask, with as many active weights as the old one. Weights just dropped
      may be grown again, like any other position that is not kept.

    Raises:
      ValueError: shapes differ, or `drop_fraction` is outside [0, 1].

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nmjax as nm
      >>> weights = jax.random.normal(jax.random.key(0), (8, 8))
      >>> mask = nm.topk_mask(jnp.abs(weights), 16)
      >>> new = nm.set_update(jax.random.key(1), weights, mask, drop_fraction=0.3)
      >>> int(new.sum()), int((mask & new).sum()) >= 12
      (16, True)

    Reference:
      Mocanu et al., 2018, arXiv 1707.04780. Deviation: SET as published drops the
      smallest positive and the largest negative weights; here the smallest in
      magnitude, as in later work.
    """
    _check_shapes(weights, mask, weights)
    kept, _ = keep_largest(weights, mask, drop_fraction)
    active = _count(mask)
    chance = random_scores(key, mask)
    return regrow(kept, chance, lambda scores: topk_mask(scores, active))


def random_scores(key: PRNGKeyArray, mask: MaskArray) -> Float[Array, "..."]:
    """Draw scores to grow at random.

    They are positive floats with 30 random bits, where a uniform number has 23: then
    ties are rare, which cost time, even among millions of weights.

    Args:
      key: random key.
      mask: array whose shape the scores have; on an Explicit mesh also its sharding.

    Returns:
      float32 scores, the same on every mesh.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nmjax import topology
      >>> scores = topology.random_scores(jax.random.key(0), jnp.zeros((64, 64), bool))
      >>> len(set(scores.ravel().tolist()))
      4096
    """
    bits = jax.random.bits(
        key, mask.shape, jnp.uint32, out_sharding=explicit_sharding(mask)
    )
    smallest = jnp.uint32(0x00800000)  # the pattern of the smallest normal number
    return lax.bitcast_convert_type((bits >> 2) + smallest, jnp.float32)


def srigl_update(
    weights: FloatArray,
    mask: MaskArray,
    grads: FloatArray,
    *,
    budget: int,
    drop_fraction: Fraction,
    gamma_sal: float | int | None = None,
) -> MaskArray:
    r"""Drop and grow with constant fan-in and neuron ablation (SRigL).

    With budget :math:`B`, neurons :math:`o` of dense fan-in :math:`F`, and
    :math:`n_{drop} = \lfloor f \, n_{active} \rfloor`:

    1. A weight is salient if it is among the :math:`n_{active} - n_{drop}` largest
       :math:`|w|` of the active weights of the layer, or among the :math:`n_{drop}`
       largest :math:`|g|` of all its positions.
    2. A neuron with fewer salient weights than :math:`\max(1, \lfloor \gamma_{sal}
       \lfloor B / o \rfloor \rfloor)` is ablated. At least :math:`\max(1, \lfloor B /
       F \rfloor)` neurons survive: if fewer would, the threshold falls to the count
       of the neuron at that rank. An ablated neuron can come back at a later update.
    3. The survivors share the budget: their fan-in is :math:`k' = \min(F, \lfloor B /
       o_{alive} \rfloor)`.
    4. Each survivor keeps its active weights that are salient by :math:`|w|` (at most
       :math:`k'`, largest first) and grows by :math:`|g|` up to exactly :math:`k'`.

    Args:
      weights: weights of one layer; the last axis counts neurons, all others are
        fan-in.
      mask: its active weights.
      grads: dense gradient of the loss with respect to the masked weights, averaged
        over replicas and microbatches BEFORE this call.
      budget: B, the number of weights the layer may keep.
      drop_fraction: f in [0, 1], may be traced.
      gamma_sal: share of the fan-in that must be salient for a neuron to survive
        (published: 0.3 for CNNs, 0.95 for ViTs); from 1 on, the number itself. None:
        no ablation.

    Returns:
      The new mask: exactly k' weights in each surviving neuron, none in the others.

    Raises:
      ValueError: shapes differ, an argument is out of range, or the budget is
        smaller than one weight per neuron.

    Example:
      >>> import jax
      >>> import nmjax as nm
      >>> weights, grads = jax.random.normal(jax.random.key(0), (2, 8, 4))
      >>> mask = nm.fan_in_mask(abs(weights), 2)
      >>> new = nm.srigl_update(weights, mask, grads, budget=8, drop_fraction=0.3)
      >>> new.sum(0).tolist()
      [2, 2, 2, 2]

    Reference:
      Lasby, Golubeva, Evci, Nica and Ioannou, "Dynamic Sparse Training with
      Structured Sparsity", 2024, arXiv 2305.02299, section 3.1.
    """
    _check_shapes(weights, mask, grads)
    neurons = weights.shape[-1]
    inputs = weights.size // max(1, neurons)
    if not neurons <= budget <= weights.size:
        raise ValueError(
            f"budget={budget} of a layer of shape {weights.shape} must be between one "
            f"weight per neuron ({neurons}) and all weights ({weights.size})"
        )
    kept, dropped = keep_largest(weights, mask, drop_fraction)
    grown = jnp.abs(grads)
    if gamma_sal is None:
        alive = jnp.ones((neurons,), bool)
    else:
        salient = kept | topk_mask(grown, dropped)
        counts = count_true(salient, tuple(range(salient.ndim - 1)))
        least = _ablation_threshold(gamma_sal, budget // neurons)
        guard = max(1, budget // inputs)
        alive = counts >= jnp.minimum(least, _count_at_rank(counts, guard, inputs))
    fan_in = jnp.minimum(inputs, budget // jnp.sum(alive, dtype=jnp.int32))
    inward = tuple(range(weights.ndim - 1))
    keys = _first_kept_then_grown(kept, weights, grown)
    [mask] = select_highest([keys], fan_in, inward)
    return mask & alive


def _count(mask: MaskArray) -> Int[Array, ""]:
    return count_true(mask, tuple(range(mask.ndim)))


def _ablation_threshold(gamma_sal: float | int, fan_in: int) -> int:
    """Count the salient weights that a neuron needs."""
    if not gamma_sal >= 0:
        raise ValueError(f"gamma_sal={gamma_sal!r} must be >= 0, or None")
    share = gamma_sal if gamma_sal >= 1 else gamma_sal * fan_in
    return max(1, int(share + 1e-9))


def _count_at_rank(
    counts: Int[Array, " neurons"], rank: int, largest: int
) -> Int[Array, ""]:
    """Give the count of the neuron at a rank, 1 being the fullest.

    By bisection over the count, so that only numbers cross devices.
    """
    bits = largest.bit_length()

    def halve(i: Array, low: Array) -> Array:
        middle = low + lax.shift_left(jnp.int32(1), bits - 1 - i)
        enough = jnp.sum(counts >= middle, dtype=jnp.int32) >= rank
        return jnp.where(enough, middle, low)

    return lax.fori_loop(jnp.int32(0), jnp.int32(bits), halve, jnp.int32(0))


def _first_kept_then_grown(
    kept: MaskArray, weights: FloatArray, growth: FloatArray
) -> Integer[Array, "..."]:
    """Order all weights: the kept ones by magnitude, then the others by growth."""
    dtypes = {weights.dtype, growth.dtype}
    common = jnp.float64 if jnp.dtype(jnp.float64) in dtypes else jnp.float32
    dtype = weights.dtype if len(dtypes) == 1 else common
    stay, grow = (order_keys(jnp.abs(a).astype(dtype)) for a in (weights, growth))
    # Keys of magnitudes start at 0 and end just above infinity's, which is less than
    # half of all integers.
    lowest = jnp.asarray(jnp.iinfo(grow.dtype).min, grow.dtype)
    infinity = order_keys(jnp.asarray(jnp.inf, dtype))
    grow = lowest + jnp.minimum(grow, infinity - 1)
    return jnp.where(kept, lowest + infinity + stay, grow)


def score_active(weights: FloatArray, mask: MaskArray) -> FloatArray:
    """Score by magnitude, below every magnitude where the mask is False.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import topology
      >>> weights, mask = jnp.array([-2.0, 3.0]), jnp.array([True, False])
      >>> topology.score_active(weights, mask).tolist()
      [2.0, -1.0]
    """
    return jnp.where(mask, magnitude(weights), jnp.asarray(-1, weights.dtype))


def _check_shapes(weights: Array, mask: Array, grads: Array) -> None:
    if not weights.shape == mask.shape == grads.shape:
        raise ValueError(
            f"weights, mask and grads must have one shape, got {weights.shape}, "
            f"{mask.shape} and {grads.shape}"
        )


def _check_fraction(drop_fraction: Fraction) -> None:
    if isinstance(drop_fraction, int | float) and not 0 <= drop_fraction <= 1:
        raise ValueError(f"drop_fraction={drop_fraction!r} must be in [0, 1]")
