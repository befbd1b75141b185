"""Scoring: what pruning ranks weights by, at one step or over all steps so far."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.saliency import magnitude
from nmjax.transforms.holding import Memory
from nmjax.typing import Masks, Params

Saliency: TypeAlias = Callable[[Array, Array], Array]
"""Scores of a leaf from its weights and gradients, higher = kept."""


@dataclasses.dataclass(frozen=True, eq=False)
class Score:
    """Scores of active weights; inactive ones lie below all of them."""

    plan: Plan
    saliency: Saliency | None
    momentum: float

    def __post_init__(self) -> None:
        """Check the momentum."""
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum!r} must be in [0, 1)")

    @property
    def memory(self) -> Memory | None:
        """The running scores, where there is momentum."""
        if self.momentum == 0:
            return None
        return Memory(
            lambda _: lambda total, w, g: self.momentum * total + self._now(w, g),
            lasts=True,
        )

    def __call__(self, params: Params, masks: Masks, signal: PyTree) -> PyTree:
        """Score by gradients, or take the scores that were remembered."""

        def one(leaf: LeafPlan, w: Array, mask: Array, s: Array) -> Float[Array, "..."]:
            score = self._now(w, s) if self.momentum == 0 else s
            return jnp.where(mask, score, jnp.asarray(-jnp.inf, score.dtype))

        return map_planned(
            one,
            self.plan,
            params,
            masks,
            signal,
            otherwise=lambda *_: optax.MaskedNode(),
        )

    def _now(self, weights: Array, grads: Array) -> Array:
        return (
            magnitude(weights)
            if self.saliency is None
            else self.saliency(weights, grads)
        )
