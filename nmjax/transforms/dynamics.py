"""Dynamics: when layers drop and grow, whatever the rule."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int

from nmjax import schedules
from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.projection import compute_masks
from nmjax.transforms.holding import Memory
from nmjax.typing import Masks, Params

Rule = Callable[..., Array]


@dataclasses.dataclass(frozen=True, eq=False)
class DynamicTopology:
    """Drop and grow every `delta_t` steps until `stop`.

    Attributes:
      plan: plan of the params.
      rule: one layer's update, called as ``rule(leaf_plan, key, weights, mask, grads,
        drop_fraction)``.
      drop: schedule from step to drop fraction.
      delta_t: steps between two changes.
      stop: no change from this step on.
      accumulate: gradients summed before a change.
      key: random key, or None.
      apart: True, each leaf changes by itself.
    """

    plan: Plan
    rule: Rule
    drop: schedules.Schedule
    delta_t: int
    stop: int
    accumulate: int = 1
    key: Any = None
    apart: bool = True

    def start(self, params: Params) -> Masks:
        """Choose magnitude masks."""
        return compute_masks(params, self.plan)

    @property
    def memory(self) -> Memory | None:
        """The sum of the last `accumulate` gradients, where that is above 1."""
        if self.accumulate == 1:
            return None

        def add(count: Array) -> Callable[[Array, Array, Array], Array]:
            soon = jnp.zeros([], bool)
            for ahead in range(self.accumulate):
                soon = soon | self.due(count + ahead)
            return lambda total, _, grads: jnp.where(soon, total + grads, total)

        return Memory(add, lasts=False)

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Tell whether masks change after update number `count`."""
        return (count % self.delta_t == 0) & (count < self.stop)

    def change(
        self, count: Int[Array, ""], key: Any, params: Params, masks: Masks, grads: Any
    ) -> Masks:
        """Drop and grow in every sparse leaf."""
        fraction = self.drop(count)
        order = {leaf.path: i for i, leaf in enumerate(self.plan.sparse_leaves)}

        def one(leaf: LeafPlan, weights: Array, mask: Array, grad: Array) -> Array:
            leaf_key = (
                None if key is None else jax.random.fold_in(key, order[leaf.path])
            )
            return self.rule(leaf, leaf_key, weights, mask, grad, fraction)

        return map_planned(
            one,
            self.plan,
            params,
            masks,
            grads,
            otherwise=lambda *_: optax.MaskedNode(),
        )
