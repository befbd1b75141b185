"""Initial: sparse params to start training from."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from nmjax.patterns import fan_in_axes
from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.projection import apply_masks, compute_masks
from nmjax.typing import Params


def sparse_init(
    key: PRNGKeyArray, params: Params, plan: Plan, *, rescale: bool = False
) -> Params:
    r"""Make freshly initialised params sparse at random positions.

    With `rescale`, the weights of a neuron with dense fan-in F and c active inputs are
    multiplied by

    .. math:: \sqrt{F / c}

    so that its output keeps the variance that the dense initialisation gave it.

    Args:
      key: random key.
      params: freshly initialised dense params.
      plan: plan of the params, any patterns.
      rescale: whether to make up for the smaller fan-in.

    Returns:
      Params, exactly sparse, each leaf in its own dtype. Transforms that hold masks
      (`nm.rigl`, `nm.static`, ...) find these positions again by magnitude.

    Raises:
      ValueError: the plan was made for other params.

    Example:
      >>> import jax
      >>> import nmjax as nm
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> plan = nm.plan(params, nm.FanIn(), density=0.25)
      >>> sparse = nm.sparse_init(jax.random.key(1), params, plan)
      >>> (sparse["kernel"] != 0).sum(0).tolist()
      [4, 4, 4, 4, 4, 4, 4, 4]

    Reference:
      Scaling by the fan-in of each neuron: Evci, Ioannou, Keskin and Dauphin, "Gradient
      Flow in Sparse Neural Networks and How Lottery Tickets Win", 2020, arXiv
      2010.03533.
    """
    order = {leaf.path: i for i, leaf in enumerate(plan.sparse_leaves)}

    def chance(leaf: LeafPlan, weights: Array) -> Array:
        leaf_key = jax.random.fold_in(key, order[leaf.path])
        return jax.random.uniform(leaf_key, weights.shape, jnp.float32)

    scores = map_planned(chance, plan, params, otherwise=lambda *_: optax.MaskedNode())
    masks = compute_masks(params, plan, scores)
    sparse = apply_masks(params, masks)
    if not rescale:
        return sparse

    def scale(leaf: LeafPlan, weights: Array, mask: Array) -> Array:
        axes = fan_in_axes(leaf.path, len(leaf.layer_shape))
        active = jnp.sum(mask, axis=axes, keepdims=True, dtype=jnp.int32)
        dense = weights.size // active.size
        factor = jnp.sqrt(dense / jnp.maximum(active, 1).astype(jnp.float32))
        return (weights.astype(factor.dtype) * factor).astype(weights.dtype)

    return map_planned(scale, plan, sparse, masks, otherwise=lambda weights, _: weights)
