"""Fixed masks: train with the positions that params start with."""

import dataclasses
from typing import Any

import optax
from jaxtyping import Array, Int

from nmjax.plans import Plan
from nmjax.projection import compute_masks
from nmjax.transforms.holding import Optimizer, hold
from nmjax.typing import Masks, Params


def static(inner: Optimizer, plan: Plan) -> optax.GradientTransformationExtraArgs:
    """Keep the masks that training starts with.

    Args:
      inner: any optax optimizer.
      plan: plan of the params, any patterns. The masks are the magnitude masks of the
        params that `init` is given: after `nm.sparse_init` a fixed random mask, after
        dense training one-shot pruning with retraining.

    Returns:
      A transform to use in place of `inner`.

    Raises:
      TypeError: `plan` is no plan, or `inner` no optimizer.

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
    return hold(inner, plan, _Fixed(plan), "nm.static")


@dataclasses.dataclass(frozen=True, eq=False)
class _Fixed:
    """Masks that never change."""

    plan: Plan
    accumulate: int = 1
    key: Any = None

    def start(self, params: Params) -> Masks:
        return compute_masks(params, self.plan)

    def due(self, count: Int[Array, ""]) -> bool:
        return False

    def change(
        self, count: Int[Array, ""], key: Any, params: Params, masks: Masks, grads: Any
    ) -> Masks:
        return masks
