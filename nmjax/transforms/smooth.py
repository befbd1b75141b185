"""S-STE: a continuous projection onto N:M instead of a hard mask.

A hard mask jumps when two weights of a group swap ranks. Soft thresholding subtracts
the largest pruned magnitude from the kept ones first, so that a weight fades to zero
before it is pruned, and a fixed factor per tensor makes up for the lost magnitude.
No decay of pruned weights is needed beside it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, PyTree

from nmjax.masking import nm_mask
from nmjax.patterns import NM
from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.saliency import magnitude
from nmjax.transforms.moments import widen
from nmjax.typing import FloatArray, Params


def soft_threshold(weights: FloatArray, n: int, m: int, axis: int = -2) -> FloatArray:
    r"""Project every group of m weights onto n smoothly.

    With t the (m - n)-th smallest magnitude of the group, the largest one pruned,

    .. math:: S(a)_i = \mathrm{sign}(a_i) \max(|a_i| - t, 0).

    Args:
      weights: floating array.
      n: weights kept in a group (at most: ties with t vanish).
      m: length of a group.
      axis: axis along which groups run.

    Returns:
      An array of the same shape and dtype. A NaN weight makes itself NaN.

    Raises:
      ValueError: the axis does not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import smooth
      >>> w = jnp.array([4.0, -3.0, 2.0, 1.0])
      >>> print(smooth.soft_threshold(w, 2, 4, axis=0))
      [ 2. -1.  0.  0.]

    Reference:
      Hu et al., "S-STE: Continuous Pruning Function for Efficient 2:4 Sparse
      Pre-training", 2024, arXiv 2409.09099 (2:4 there; any n and m here).
    """
    kept = nm_mask(magnitude(weights), n, m, axis)
    axis = axis % weights.ndim
    split = (*weights.shape[:axis], -1, m, *weights.shape[axis + 1 :])
    pruned = jnp.where(kept, 0, jnp.abs(weights)).reshape(split)
    bound = jnp.broadcast_to(pruned.max(axis + 1, keepdims=True), pruned.shape)
    bound = bound.reshape(weights.shape)
    return jnp.where(kept, weights - jnp.sign(weights) * bound, 0)


def smooth_scales(params: Params, plan: Plan) -> PyTree:
    r"""Compute the factor of each tensor that makes up for soft thresholding.

    The factor minimises :math:`\lVert W - \beta S(W) \rVert`,

    .. math:: \beta = \frac{\langle W, S(W) \rangle}{\langle S(W), S(W) \rangle}.

    Call it once, with the params that training starts from, and keep the result:
    as published, it stays fixed during training.

    Args:
      params: tree of weights.
      plan: plan of the params; its patterns must be `nm.NM`.

    Returns:
      A tree with the structure of the params: float32 scalars (one per layer for
      stacked leaves, shaped to broadcast), and `optax.MaskedNode()` at leaves that
      stay dense. A tensor whose projection is zero gets 1.

    Raises:
      TypeError: a pattern is not `nm.NM`.
      ValueError: the plan is of other params.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.array([[4.0], [-3.0], [2.0], [1.0]])}
      >>> scales = nm.smooth_scales(params, nm.plan(params, {"kernel": nm.NM(2, 4)}))
      >>> round(float(scales["kernel"]), 4)  # (4*2 + 3*1) / (2*2 + 1*1)
      2.2

    Reference:
      Hu et al., 2024, arXiv 2409.09099.
    """

    def scale(leaf: LeafPlan, weights: FloatArray) -> Float[jax.Array, "..."]:
        wide = weights.astype(widen(weights.dtype))
        soft = _soft(leaf, weights).astype(wide.dtype)
        axes = tuple(range(leaf.stacked, weights.ndim))
        keep = leaf.stacked > 0
        dot = (wide * soft).sum(axes, keepdims=keep)
        norm = (soft * soft).sum(axes, keepdims=keep)
        return jnp.where(norm > 0, dot / jnp.where(norm > 0, norm, 1), 1)

    return map_planned(scale, plan, params, otherwise=lambda _: optax.MaskedNode())


def smooth_sparsify(params: Params, plan: Plan, scales: PyTree) -> Params:
    r"""Sparsify params smoothly for the forward pass, with a straight-through gradient.

    .. math:: \tilde W = \beta \, S(W), \qquad
       \frac{\partial L}{\partial W} := \frac{\partial L}{\partial \tilde W}

    It takes the place of `nm.sparsify`; the optimizer needs no further stage.

    Args:
      params: tree of dense weights.
      plan: plan of the params; its patterns must be `nm.NM`.
      scales: factors :math:`\beta` by `smooth_scales`.

    Returns:
      Params whose planned leaves are N:M sparse, in their own dtype.

    Raises:
      TypeError: a pattern is not `nm.NM`.
      ValueError: the plan is of other params.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.array([[4.0], [-3.0], [2.0], [1.0]])}
      >>> plan = nm.plan(params, {"kernel": nm.NM(2, 4)})
      >>> scales = nm.smooth_scales(params, plan)
      >>> print(nm.smooth_sparsify(params, plan, scales)["kernel"][:, 0])
      [ 4.4 -2.2  0.   0. ]

    Reference:
      Hu et al., 2024, arXiv 2409.09099. Their unbiased pruning of activation
      gradients and FP8 matmuls save time on GPUs and are left out.
    """

    def smooth(leaf: LeafPlan, weights: FloatArray, scale: Any) -> FloatArray:
        soft = _soft(leaf, jax.lax.stop_gradient(weights))
        return _straight_through(weights, scale.astype(weights.dtype) * soft)

    return map_planned(
        smooth, plan, params, scales, otherwise=lambda weights, _: weights
    )


@jax.custom_jvp
def _straight_through(weights: Any, value: Any) -> Any:
    """Give the value, with the gradient of the weights."""
    del weights
    return value


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    return primals[1], tangents[0]


def _soft(leaf: LeafPlan, weights: FloatArray) -> FloatArray:
    """Project one leaf as its pattern says."""
    if not isinstance(leaf.pattern, NM):
        raise TypeError(
            f"leaf {leaf.path!r}: S-STE projects onto nm.NM patterns, "
            f"got {leaf.pattern}"
        )
    axis = -2 if leaf.pattern.axis is None else leaf.pattern.axis
    if axis >= 0:
        axis += leaf.stacked
    return soft_threshold(weights, leaf.pattern.n, leaf.pattern.m, axis)
