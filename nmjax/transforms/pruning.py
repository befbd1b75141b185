"""Pruning: become sparse during training, and stay so.

Each method wraps an inner optimizer and holds masks; `nmjax.transforms.holding` says
what happens in a step. A pruned weight never returns: masks are nested.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from nmjax.paths import is_masked, named_leaves
from nmjax.patterns import NM
from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.projection import compete, compute_masks, keep_all
from nmjax.transforms.checks import check_at_least, check_is_plan
from nmjax.transforms.holding import Memory, Optimizer, hold
from nmjax.transforms.scoring import Saliency, Score
from nmjax.typing import Masks, Params

Shape = Literal["cubic", "linear", "exponential", "cosine"]


def one_shot(
    inner: Optimizer,
    plan: Plan,
    *,
    at: int,
    saliency: Saliency | None = None,
    momentum: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Train dense, prune once, and go on with the mask fixed.

    Args:
      inner: any optax optimizer.
      plan: plan of the params, any patterns.
      at: number of updates after which params are pruned, >= 1. (To prune before the
        first update, start from ``nm.project(params, plan)`` with `nm.static`.)
      saliency: scores from ``(weights, grads)`` of a leaf, higher = kept. Default:
        magnitude of the weights.
      momentum: in [0, 1); above 0 the scores are those of all steps so far, each step
        multiplying the older ones by it: with `saliency.snip`, snip-momentum.

    Returns:
      A transform to use in place of `inner`.

    Raises:
      ValueError: `at` is no integer >= 1.
      TypeError: `plan` is no plan, or `inner` no optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
      >>> tx = nm.one_shot(optax.sgd(0.1), nm.plan(params, nm.NM(2, 4)), at=1)
      >>> grads = {"kernel": jnp.zeros((4, 8))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> optax.apply_updates(params, updates)["kernel"][:, 0].tolist()
      [0.0, 0.0, 3.0, 4.0]

    Reference:
      The basic recipe: Mishra et al., 2021, arXiv 2104.08378.
    """
    check_at_least("at", at, 1)
    score = Score(plan, saliency, momentum)
    return hold(inner, plan, _OneShot(score, at), "nm.one_shot")


def gradual(
    inner: Optimizer,
    plan: Plan,
    *,
    start: int,
    stop: int,
    every: int = 100,
    shape: Shape = "cubic",
    initial_density: float = 1.0,
    saliency: Saliency | None = None,
    momentum: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Raise sparsity step by step (gradual magnitude pruning).

    With sparsity :math:`s_i` at step :math:`t_0`, :math:`s_f` at step :math:`t_1` and
    progress :math:`x = (t - t_0) / (t_1 - t_0)`, the sparsity at a pruning step is

    .. math::

       \text{cubic:}\quad & s_f + (s_i - s_f) (1 - x)^3 \\
       \text{linear:}\quad & s_f + (s_i - s_f) (1 - x) \\
       \text{cosine:}\quad & s_f + (s_i - s_f) \tfrac{1}{2} (1 + \cos \pi x) \\
       \text{exponential:}\quad & 1 - d_i (d_f / d_i)^x, \quad d = 1 - s

    Each leaf ends at the density that the plan gives it. Leaves with a global density
    (`nm.global_`, which can limit the density of a leaf) compete for one budget at
    every step.

    Args:
      inner: any optax optimizer.
      plan: plan of the params, with patterns that have a budget: `Unstructured`,
        `FanIn`, `Block`, `Channel`.
      start: t_0, step from which sparsity rises.
      stop: t_1, step at which it is final, > start.
      every: steps between two prunings; the last one is at `stop`.
      shape: how sparsity rises.
      initial_density: :math:`1 - s_i`, in (0, 1].
      saliency: scores from ``(weights, grads)`` of a leaf, higher = kept. Default:
        magnitude of the weights.
      momentum: in [0, 1); above 0 the scores are those of all steps so far, each step
        multiplying the older ones by it: with `saliency.snip`, snip-momentum.

    Returns:
      A transform to use in place of `inner`.

    Raises:
      ValueError: an argument is out of range, or a leaf has a pattern of fixed density
        (use `nm.progressive_nm`).
      TypeError: `plan` is no plan, or `inner` no optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.arange(1.0, 65.0).reshape(8, 8)}
      >>> plan = nm.plan(params, nm.Unstructured(), density=0.25)
      >>> tx = nm.gradual(optax.sgd(0.1), plan, start=0, stop=4, every=1)
      >>> state, grads = tx.init(params), {"kernel": jnp.zeros((8, 8))}
      >>> kept = []
      >>> for _ in range(4):
      ...     _, state = tx.update(grads, state, params)
      ...     kept.append(int(nm.masks(state)["kernel"].sum()))
      >>> kept
      [36, 22, 17, 16]

    Reference:
      Zhu and Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878, equation 1.
    """
    check_is_plan(plan)
    check_at_least("start", start, 0)
    check_at_least("every", every, 1)
    if stop <= start:
        raise ValueError(f"stop={stop} must come after start={start}")
    if shape not in _SHAPES:
        raise ValueError(f"shape={shape!r} must be one of {', '.join(_SHAPES)}")
    if not 0 < initial_density <= 1:
        raise ValueError(f"initial_density={initial_density!r} must be in (0, 1]")
    for leaf in plan.sparse_leaves:
        if (
            leaf.budget is None
            and not leaf.is_global
            and not hasattr(leaf.pattern, "density")
        ):
            raise ValueError(
                f"leaf {leaf.path!r}: {leaf.pattern} has a fixed density; use "
                "nm.progressive_nm for a ladder of n:m patterns"
            )
    score = Score(plan, saliency, momentum)
    rise = _Gradual(score, start, stop, every, shape, initial_density)
    return hold(inner, plan, rise, "nm.gradual")


def progressive_nm(
    inner: Optimizer,
    plan: Plan,
    ladder: Mapping[int, int],
    *,
    saliency: Saliency | None = None,
    momentum: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """Go down a ladder of n:m patterns, each nested in the one before.

    Args:
      inner: any optax optimizer.
      plan: plan of the params, whose sparse leaves hold one `NM` pattern: the last
        rung.
      ladder: from step to n, n falling: ``{0: 3, 1000: 2}`` prunes to 3:4 before the
        first update and to 2:4 after update 1000. Before the first rung, params are
        dense.
      saliency: scores from ``(weights, grads)`` of a leaf, higher = kept. Default:
        magnitude of the weights. The rung at step 0 always goes by magnitude.
      momentum: in [0, 1); above 0 the scores are those of all steps so far, each step
        multiplying the older ones by it: with `saliency.snip`, snip-momentum.

    Returns:
      A transform to use in place of `inner`.

    Raises:
      ValueError: the ladder does not fall to the plan's n, or a leaf holds another
        pattern.
      TypeError: `plan` is no plan, or `inner` no optimizer.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
      >>> plan = nm.plan(params, nm.NM(2, 4))
      >>> tx = nm.progressive_nm(optax.sgd(0.1), plan, {0: 3, 1: 2})
      >>> state = tx.init(params)
      >>> int(nm.masks(state)["kernel"][:, 0].sum())
      3
      >>> _, state = tx.update({"kernel": jnp.zeros((4, 8))}, state, params)
      >>> int(nm.masks(state)["kernel"][:, 0].sum())
      2

    Reference:
      The progressive recipe: NVIDIA, "Structured Sparsity in the NVIDIA Ampere
      Architecture and Applications in Search Engines", 2023.
    """
    check_is_plan(plan)
    steps, counts = sorted(ladder), [ladder[step] for step in sorted(ladder)]
    for leaf in plan.sparse_leaves:
        if not isinstance(leaf.pattern, NM):
            raise ValueError(
                f"leaf {leaf.path!r}: nm.progressive_nm needs NM leaves, not "
                f"{leaf.pattern}"
            )
        if not counts or leaf.pattern.n != counts[-1]:
            raise ValueError(
                f"leaf {leaf.path!r}: the ladder {dict(ladder)} must end at the plan's "
                f"n={leaf.pattern.n}"
            )
        if counts[0] > leaf.pattern.m:
            raise ValueError(
                f"leaf {leaf.path!r}: n={counts[0]} of the ladder is above "
                f"m={leaf.pattern.m}"
            )
    for step in steps:
        check_at_least("step of the ladder", step, 0)
    if any(b >= a for a, b in zip(counts, counts[1:], strict=False)):
        raise ValueError(f"the ladder {dict(ladder)} must fall from step to step")
    score = Score(plan, saliency, momentum)
    rungs = _Ladder(score, tuple(steps), tuple(counts))
    return hold(inner, plan, rungs, "nm.progressive_nm")


_SHAPES: dict[str, Callable[[Array, float, float], Array]] = {
    "cubic": lambda x, first, last: last + (first - last) * (1 - x) ** 3,
    "linear": lambda x, first, last: last + (first - last) * (1 - x),
    "cosine": lambda x, first, last: (
        last + (first - last) * 0.5 * (1 + jnp.cos(jnp.pi * x))
    ),
    "exponential": lambda x, first, last: first * (last / first) ** x,
}
"""Density at progress x; as functions of density, all but the last equal those of
sparsity."""


@dataclasses.dataclass(frozen=True, eq=False)
class _Pruning:
    """What all of them share: they start dense and prune by scores."""

    score: Score
    key = None

    @property
    def plan(self) -> Plan:
        return self.score.plan

    @property
    def apart(self) -> bool:
        return self.plan.global_budget is None

    @property
    def memory(self) -> Memory | None:
        return self.score.memory

    def start(self, params: Params) -> Masks:
        return keep_all(params, self.plan)


@dataclasses.dataclass(frozen=True, eq=False)
class _OneShot(_Pruning):
    """Dense masks until one step, the plan's from then on."""

    at: int

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        return count == self.at

    def change(
        self, count: Int[Array, ""], key: Any, params: Params, masks: Masks, grads: Any
    ) -> Masks:
        scores = self.score(params, masks, grads)
        return compute_masks(params, self.plan, scores)


@dataclasses.dataclass(frozen=True, eq=False)
class _Gradual(_Pruning):
    """Densities that fall from step to step."""

    start_step: int
    stop: int
    every: int
    shape: str
    initial: float

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        regular = (count - self.start_step) % self.every == 0
        within = (count >= self.start_step) & (count < self.stop)
        return (regular & within) | (count == self.stop)

    def change(
        self, count: Int[Array, ""], key: Any, params: Params, masks: Masks, grads: Any
    ) -> Masks:
        scores = self.score(params, masks, grads)
        shared: Mapping[str, Array] = {}
        if self.plan.global_budget is not None:
            competing = {
                path: score
                for path, score in named_leaves(scores)[0]
                if not is_masked(score) and self.plan.by_path[path].is_global
            }
            size = sum(score.size for score in competing.values())
            budget = self._budget(count, size, self.plan.global_budget)
            most = {
                path: self._budget(count, score.size, self._most(path))
                for path, score in competing.items()
            }
            shared = compete(self.plan, competing, budget, most)

        def one(leaf: LeafPlan, score: Array) -> Array:
            if leaf.is_global:
                return shared[leaf.path]
            size = leaf.size // leaf.layers
            final = leaf.pattern.kept(leaf.layer_shape, leaf.budget)
            budget = self._budget(count, size, final)
            return leaf.pattern.mask(score, budget, leaf.stacked)

        return map_planned(
            one, self.plan, scores, otherwise=lambda *_: optax.MaskedNode()
        )

    def _most(self, path: str) -> int:
        """Give the largest number of weights that a leaf keeps in the end."""
        leaf = self.plan.by_path[path]
        return leaf.size if leaf.limits is None else leaf.limits[1]

    def _budget(self, count: Array, size: int, final: int) -> Int[Array, ""]:
        """Give the number of weights of a layer that are kept at a step."""
        span = self.stop - self.start_step
        x = jnp.clip((count - self.start_step).astype(jnp.float32) / span, 0.0, 1.0)
        density = _SHAPES[self.shape](x, self.initial, final / size)
        now = jnp.floor(density * size + 0.5).astype(jnp.int32)
        return jnp.where(count >= self.stop, final, jnp.clip(now, final, size))


@dataclasses.dataclass(frozen=True, eq=False)
class _Ladder(_Pruning):
    """One n:m pattern after the other."""

    steps: tuple[int, ...]
    counts: tuple[int, ...]

    def start(self, params: Params) -> Masks:
        masks = super().start(params)
        if self.steps[0] == 0:
            by_magnitude = Score(self.plan, None, 0.0)
            scores = by_magnitude(params, masks, params)
            return self._rung(self.counts[0], scores)
        return masks

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        flag = jnp.zeros([], bool)
        for step in self.steps:
            flag = flag | (count == step)
        return flag

    def change(
        self, count: Int[Array, ""], key: Any, params: Params, masks: Masks, grads: Any
    ) -> Masks:
        scores = self.score(params, masks, grads)
        # The rung of a step is the last one that is not after it.
        rung = sum((count >= step).astype(jnp.int32) for step in self.steps) - 1
        branches = [lambda s, n=n: self._rung(n, s) for n in self.counts]
        return jax.lax.switch(jnp.clip(rung, 0), branches, scores)

    def _rung(self, n: int, scores: PyTree) -> Masks:
        def one(leaf: LeafPlan, score: Array) -> Array:
            assert isinstance(leaf.pattern, NM)
            pattern = dataclasses.replace(leaf.pattern, n=n)
            return pattern.mask(score, None, leaf.stacked)

        return map_planned(
            one, self.plan, scores, otherwise=lambda *_: optax.MaskedNode()
        )
