"""Group lasso: push whole blocks or channels of weights towards zero together."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from nmjax.budgets import Block, Channel
from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.transforms.checks import (
    Scalar,
    Schedule,
    check_fit,
    check_is_plan,
    check_params,
    concrete,
)
from nmjax.transforms.moments import widen
from nmjax.typing import FloatArray, Params


def group_lasso(
    plan: Plan, alpha: Scalar | Schedule
) -> optax.GradientTransformationExtraArgs:
    r"""Add the gradient of a group lasso penalty.

    With the penalty :math:`\alpha \sum_B \lVert W_B \rVert_2` over the blocks or
    channels B of the plan's patterns,

    .. math:: u_i = g_i + \alpha \, \frac{w_i}{\lVert W_{B(i)} \rVert_2}

    and a group that is all zero adds nothing. Place it before the optimizer, and let a
    pruning method wrap both: ``nm.gradual(optax.chain(nm.group_lasso(plan, 1e-3),
    optax.sgd(0.1)), plan, ...)``. Then a step goes in the order of block pruning:
    gradients of pruned blocks are set to zero, the penalty is added, the optimizer
    steps, weights are pruned by block.

    Args:
      plan: plan of the params; its sparse leaves hold `Block` or `Channel` patterns.
      alpha: strength of the penalty, >= 0, or a schedule from step to strength.

    Returns:
      A stage for `optax.chain`, without state unless `alpha` is a schedule. Norms are
      computed in float32, updates keep the dtype of the gradients.

    Raises:
      ValueError: `alpha` is negative, or a leaf holds a pattern without groups.
      TypeError: `plan` is no plan.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.array([[3.0, 4.0], [0.0, 0.0]])}
      >>> plan = nm.plan(params, nm.Block(2, 1), density=0.5)
      >>> tx = nm.group_lasso(plan, 0.5)
      >>> grads = {"kernel": jnp.zeros((2, 2))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> [[round(u, 2) for u in row] for row in updates["kernel"].tolist()]
      [[0.3, 0.4], [0.0, 0.0]]

    Reference:
      Wen, Wu, Wang, Chen and Li, "Learning Structured Sparsity in Deep Neural
      Networks", 2016, arXiv 1608.03665.
    """
    check_is_plan(plan)
    strength = concrete(alpha)
    if alpha is None or (strength is not None and not strength >= 0):
        raise ValueError(f"alpha={alpha!r} must be >= 0, or a schedule")
    for leaf in plan.sparse_leaves:
        if not isinstance(leaf.pattern, Block | Channel):
            raise ValueError(
                f"leaf {leaf.path!r}: nm.group_lasso needs groups of weights, as "
                f"nm.Block and nm.Channel have them, not {leaf.pattern}"
            )

    def init_fn(params: Params) -> optax.EmptyState | optax.ScaleByScheduleState:
        check_fit(plan, params)
        if callable(alpha):
            return optax.ScaleByScheduleState(jnp.zeros([], jnp.int32))
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = check_params(params, "nm.group_lasso")
        now = jnp.asarray(alpha(state.count) if callable(alpha) else alpha)
        now = now.astype(jnp.float32)
        updates = map_planned(
            lambda leaf, w, g: add_pull(g, w, leaf, now),
            plan,
            params,
            updates,
            otherwise=lambda _, g: g,
        )
        if callable(alpha):
            count = jnp.asarray(optax.safe_increment(state.count))
            state = optax.ScaleByScheduleState(count)
        return updates, state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def add_pull(
    grads: FloatArray, weights: FloatArray, leaf: LeafPlan, alpha: Float[Array, "..."]
) -> FloatArray:
    """Add the pull of the penalty on one leaf to its gradients.

    Args:
      grads: gradients of the leaf.
      weights: its weights, of the same shape.
      leaf: its plan, with a `Block` or `Channel` pattern.
      alpha: strength of the penalty, a scalar.

    Returns:
      The sum, in the dtype of `grads`.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax.transforms import lasso
      >>> weights = jnp.array([[3.0, 4.0]])
      >>> plan = nm.plan({"kernel": weights}, nm.Block(2, 1), density=1.0)
      >>> pull = lasso.add_pull(0 * weights, weights, plan.leaves[0], jnp.array(5.0))
      >>> [round(p, 4) for p in pull[0].tolist()]
      [3.0, 4.0]
    """
    assert isinstance(leaf.pattern, Block | Channel)
    wide = weights.astype(widen(weights.dtype))
    norms = jnp.sqrt(leaf.pattern.group_sums(jnp.square(wide), leaf.stacked))
    zero = norms == 0
    unit = jnp.where(zero, 0, wide / jnp.where(zero, 1, norms))
    pull = alpha.astype(wide.dtype) * unit
    return (grads.astype(wide.dtype) + pull).astype(grads.dtype)
