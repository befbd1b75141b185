"""Fixed masks: train with the positions that params start with."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import optax
from jaxtyping import Array, Int

from nmjax.paths import is_masked
from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.projection import apply_masks, compute_masks
from nmjax.transforms.holding import Optimizer, hold
from nmjax.typing import Masks, Params


def static(
    inner: Optimizer, plan: Plan, *, masks: Masks | None = None
) -> optax.GradientTransformationExtraArgs:
    """Keep the masks that training starts with.

    Args:
      inner: any optax optimizer.
      plan: plan of the params, any patterns.
      masks: masks to hold, with the paths of the params; they may keep other counts
        than the plan, as those of `nm.rewind` do. Default: the magnitude masks of the
        params that `init` is given: after `nm.sparse_init` a fixed random mask, after
        dense training one-shot pruning with retraining.

    Returns:
      A transform to use in place of `inner`.

    Raises:
      TypeError: `plan` is no plan, `inner` no optimizer, or a mask is not bool.
      ValueError: `init` is given params that the plan or the masks do not fit.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
      >>> plan = nm.plan(params, nm.NM(2, 4))
      >>> params = nm.project(params, plan)
      >>> tx = nm.static(optax.sgd(0.1), plan)
      >>> grads = {"kernel": jnp.ones((4, 8))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> [round(u, 1) for u in updates["kernel"][:, 0].tolist()]
      [0.0, 0.0, -0.1, -0.1]

    Reference:
      One-shot pruning and retraining with a fixed mask: Mishra et al., 2021, arXiv
      2104.08378.
    """
    return hold(inner, plan, _Fixed(plan, masks), "nm.static")


@dataclasses.dataclass(frozen=True, eq=False)
class _Fixed:
    """Masks that never change."""

    plan: Plan
    masks: Masks | None
    memory: None = None
    key: Any = None
    apart: bool = True

    def start(self, params: Params) -> Masks:
        if self.masks is None:
            return compute_masks(params, self.plan)
        apply_masks(params, self.masks)  # checks that they fit
        return map_planned(
            lambda leaf, _, mask: _given(leaf, mask),
            self.plan,
            params,
            self.masks,
            otherwise=lambda _, mask: mask,
        )

    def due(self, count: Int[Array, ""]) -> bool:
        return False

    def change(
        self, count: Int[Array, ""], key: Any, params: Params, masks: Masks, grads: Any
    ) -> Masks:
        return masks


def _given(leaf: LeafPlan, mask: Any) -> Array:
    """Copy a mask: donation fails where two states share a buffer."""
    if is_masked(mask):
        raise ValueError(
            f"leaf {leaf.path!r} is {leaf.pattern} in the plan, but nm.static was "
            "given no mask for it"
        )
    return jnp.copy(mask)
