"""Projection: apply a plan to params.

Compute masks, make params exactly sparse, or use them sparse in the forward pass
with straight-through gradients.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, PyTree

from nmjax.masking import global_topk_mask, topk_mask
from nmjax.masking.selection import Count
from nmjax.paths import is_masked, named_leaves
from nmjax.plans import LeafPlan, Plan, map_planned, matching_leaves
from nmjax.saliency import magnitude
from nmjax.typing import Masks, Params


def compute_masks(params: Params, plan: Plan, scores: PyTree | None = None) -> Masks:
    r"""Compute the mask of every sparse leaf from its scores.

    Args:
      params: the tree that the plan was made for.
      plan: says which pattern each leaf holds.
      scores: tree with the paths of `params`; the higher, the sooner kept. Dense
        leaves may be `optax.MaskedNode()`. Default: magnitude, :math:`|w|`.

    Returns:
      A tree with the structure of `params`: bool arrays, True = kept, and
      `optax.MaskedNode()` for dense leaves. Each mask depends on its own leaf alone
      (on all, for leaves with a global density).

    Raises:
      ValueError: the plan was made for other params, or scores have other paths or
        shapes.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.tile(jnp.arange(4.0)[:, None], (1, 8))}
      >>> masks = nm.compute_masks(params, nm.plan(params, nm.NM(2, 4)))
      >>> masks["kernel"][:, 0].tolist()
      [False, False, True, True]
    """
    scores = params if scores is None else scores
    by_magnitude = scores is params

    def leaf_scores(leaf_plan: LeafPlan, leaf: Any, score: Any) -> Array:
        if is_masked(score) or jnp.shape(score) != leaf_plan.shape:
            raise ValueError(
                f"leaf {leaf_plan.path!r} of shape {leaf_plan.shape} has no scores of "
                f"that shape: got {score if is_masked(score) else jnp.shape(score)}"
            )
        return magnitude(leaf) if by_magnitude else score

    shared = {}
    if plan.global_budget is not None:
        found = map_planned(
            lambda plan_, leaf, score: (
                leaf_scores(plan_, leaf, score)
                if plan_.is_global
                else optax.MaskedNode()
            ),
            plan,
            params,
            scores,
            otherwise=lambda *_: optax.MaskedNode(),
        )
        competing = {p: s for p, s in named_leaves(found)[0] if not is_masked(s)}
        missing = [
            leaf.path
            for leaf in plan.leaves
            if leaf.is_global and leaf.path not in competing
        ]
        if missing:
            raise ValueError(
                f"leaf {missing[0]!r} shares a global budget but is not among these "
                "params; give all leaves of the budget to one transform"
            )
        shared = compete(plan, competing, plan.global_budget)

    def leaf_mask(leaf_plan: LeafPlan, leaf: Any, score: Any) -> Array:
        if leaf_plan.is_global:
            return shared[leaf_plan.path]
        return leaf_plan.pattern.mask(
            leaf_scores(leaf_plan, leaf, score), leaf_plan.budget, leaf_plan.stacked
        )

    return map_planned(
        leaf_mask, plan, params, scores, otherwise=lambda *_: optax.MaskedNode()
    )


def keep_all(params: Params, plan: Plan) -> Masks:
    """Make masks that keep every weight, to prune from.

    Args:
      params: the tree that the plan was made for.
      plan: its sparse leaves get a mask.

    Returns:
      A tree with the structure of `params`: bool arrays, all True, laid out as the
      weights are, and `optax.MaskedNode()` for dense leaves.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import projection
      >>> params = {"kernel": jnp.zeros((2, 2))}
      >>> plan = nm.plan(params, nm.Unstructured(), density=0.5)
      >>> projection.keep_all(params, plan)["kernel"].tolist()
      [[True, True], [True, True]]
    """
    return map_planned(
        # From the weights, so that the mask inherits their sharding.
        lambda _, weights: jnp.isnan(weights) | True,
        plan,
        params,
        otherwise=lambda _: optax.MaskedNode(),
    )


def compete(
    plan: Plan,
    scores: Mapping[str, Array],
    budget: Count,
    most: Mapping[str, Count] | None = None,
) -> dict[str, Array]:
    r"""Share one budget out between leaves by their scores, within their limits.

    Every leaf keeps its best scores up to its least count in any case, and none beyond
    its largest; between them, the best of all leaves win.

    Args:
      plan: says the limits of each leaf.
      scores: path -> scores; the higher, the sooner kept.
      budget: number of weights that all leaves keep together, may be traced.
      most: path -> largest counts in place of the plan's, may be traced.

    Returns:
      Path -> mask. Their counts add up to `budget` exactly, also where the largest
      counts leave no room for it: then these give way.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import projection
      >>> params = {"a": jnp.array([[4.0, 3.0]]), "b": jnp.array([[2.0, 1.0]])}
      >>> density = nm.global_(0.5, min_density=0.5)
      >>> plan = nm.plan(params, {"": nm.Unstructured()}, density=density)
      >>> projection.compete(plan, params, 2)["b"].tolist()
      [[True, False]]
    """
    limited = {}
    for path, score in scores.items():
        limits = plan.by_path[path].limits
        if limits is None or limits == (0, score.size):
            limited[path] = score
        else:
            high = limits[1] if most is None else most[path]
            limited[path] = _limit(score, limits[0], high)
    return dict(global_topk_mask(limited, budget))


def _limit(score: Array, low: int, high: Count) -> Array:
    """Lift the best `low` scores above all others, put those after `high` below."""
    kind = jnp.finfo(score.dtype)
    # NaN ranks above inf; of the others only what may be kept stays in between.
    lifted = jnp.asarray(jnp.nan, score.dtype)
    top = jnp.where(jnp.isnan(score), jnp.asarray(jnp.inf, score.dtype), score)
    beyond = jnp.minimum(top, jnp.asarray(kind.min, score.dtype))
    score = jnp.where(topk_mask(score, high), top, beyond)
    return jnp.where(topk_mask(score, low), lifted, score) if low else score


def apply_masks(params: Params, masks: Masks) -> Params:
    r"""Set every weight that a mask drops to exactly zero.

    .. math:: \tilde w_i = w_i \text{ if } e_i \text{ else } 0

    A selection, not a product, so that an inf or NaN that is dropped leaves no trace.

    Args:
      params: tree of arrays.
      masks: tree with the same paths, bool arrays or `optax.MaskedNode()`.

    Returns:
      The params, each leaf in its own dtype.

    Raises:
      ValueError: a mask has another path or shape than its leaf.
      TypeError: a mask is not bool.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> nm.apply_masks(params, {"w": jnp.array([True, False])})["w"].tolist()
      [1.0, 0.0]
    """
    return _map_masked(_select, params, masks)


def project(params: Params, plan_or_masks: Plan | Masks) -> Params:
    """Make params exactly sparse: keep what the masks keep, zero the rest.

    With a plan, masks are computed from the magnitude of the params: one-shot
    magnitude pruning.

    Args:
      params: tree of arrays.
      plan_or_masks: a plan made for these params, or a tree of masks.

    Returns:
      The projected params. They have no gradient to dropped weights; for training
      with straight-through gradients use `nm.sparsify`.

    Raises:
      ValueError: plan or masks do not belong to these params.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
      >>> nm.project(params, nm.plan(params, nm.NM(2, 4)))["kernel"][:, 0].tolist()
      [0.0, 0.0, 3.0, 4.0]
    """
    return apply_masks(params, _masks_of(params, plan_or_masks))


def sparsify(
    params: Params,
    plan_or_masks: Plan | Masks,
    *,
    active: bool | Bool[Array, ""] = True,
) -> Params:
    r"""Make params sparse in the forward pass, with straight-through gradients.

    .. math:: \tilde W = E \odot W, \qquad
       \frac{\partial L}{\partial W} := \frac{\partial L}{\partial \tilde W}

    The gradient reaches every weight, dropped ones too, so that they can return.

    Args:
      params: dense (latent) params.
      plan_or_masks: a plan (masks are recomputed from the magnitude of `params`), or
        a tree of masks, for example `nm.masks(state)`.
      active: False leaves params as they are, for dense phases; may be traced, for
        example `nm.sparse_phase(state)`.

    Returns:
      Params for the forward pass, each leaf in its own dtype.

    Raises:
      ValueError: plan or masks do not belong to these params.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
      >>> plan = nm.plan(params, nm.NM(2, 4))
      >>> loss = lambda p: nm.sparsify(p, plan)["kernel"].sum()
      >>> float(loss(params)), float(jax.grad(loss)(params)["kernel"].min())
      (56.0, 1.0)

    Reference:
      Straight-through estimator: Bengio, Leonard and Courville, 2013, arXiv
      1308.3432. For N:M masks: Zhou et al., 2021, arXiv 2102.04010.
    """
    masks = _masks_of(params, plan_or_masks)
    if active is not True:
        dense = jnp.logical_not(active)
        masks = jax.tree.map(lambda mask: mask | dense, masks)
    return _map_masked(_straight_through, params, masks)


def _select(weights: Array, mask: Array) -> Array:
    return jnp.where(mask, weights, jnp.zeros((), weights.dtype))


@jax.custom_jvp
def _straight_through(weights: Array, mask: Array) -> Array:
    return _select(weights, mask)


@_straight_through.defjvp
def _straight_through_jvp(primals: Any, tangents: Any) -> Any:
    return _straight_through(*primals), tangents[0]


def _masks_of(params: Params, plan_or_masks: Plan | Masks) -> Masks:
    if isinstance(plan_or_masks, Plan):
        return compute_masks(params, plan_or_masks)
    return plan_or_masks


def _map_masked(
    fn: Callable[[Array, Array], Array], params: Params, masks: Masks
) -> Params:
    """Map over leaves that have a mask; leave the others as they are."""
    pairs, treedef = named_leaves(params)
    out = []
    for (path, leaf), mask in zip(pairs, matching_leaves(pairs, masks), strict=True):
        if is_masked(leaf) or is_masked(mask):
            out.append(leaf)
            continue
        if jnp.result_type(mask) != jnp.bool_:
            raise TypeError(
                f"mask of leaf {path!r} has dtype {jnp.result_type(mask)}, must be bool"
            )
        if jnp.shape(mask) != jnp.shape(leaf):
            raise ValueError(
                f"mask of leaf {path!r} has shape {jnp.shape(mask)}, the leaf has "
                f"shape {jnp.shape(leaf)}"
            )
        out.append(fn(leaf, mask))
    return jax.tree.unflatten(treedef, out)
