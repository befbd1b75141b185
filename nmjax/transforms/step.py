"""STEP: dense Adam until its second moment has settled, then masks.

SR-STE was made for SGD. Under Adam, gradients taken through masks make a poor
second moment, and the model loses accuracy. STEP trains dense with plain Adam first
(precondition phase), freezes the second moment once it has stopped changing, and
learns masks with the frozen one (mask-learning phase).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Bool, Float, Int, PyTree

from nmjax.plans import Plan, map_planned
from nmjax.projection import compute_masks
from nmjax.transforms.checks import (
    Scalar,
    Schedule,
    check_at_least,
    check_decay,
    check_eps,
    check_fit,
    check_fraction,
    check_is_plan,
    check_params,
    concrete,
)
from nmjax.transforms.decay import add_pull
from nmjax.transforms.moments import init_adam, moment, precondition, unbias
from nmjax.typing import Params


class ScaleByStepState(NamedTuple):
    """State of `scale_by_step`.

    Attributes:
      count: number of updates so far.
      nu_count: number of updates that the second moment has seen.
      mu: first moment, float32 or wider.
      nu: second moment, frozen in the sparse phase.
      changes: float32 ring buffer with the last mean changes of `nu`;
        `optax.MaskedNode()` where `start` is given.
      sparse: whether the next step is in the sparse phase.
    """

    count: Int[jax.Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    nu_count: Int[jax.Array, "..."]
    mu: PyTree
    nu: PyTree
    changes: Float[jax.Array, "..."] | optax.MaskedNode
    sparse: Bool[jax.Array, "..."]


def scale_by_step(
    plan: Plan,
    decay: Scalar | Schedule = 0.0,
    *,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    start: Scalar | None = None,
    threshold: Scalar | None = None,
    window: int | None = None,
    min_steps: Scalar | None = None,
    max_steps: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Precondition with Adam in two phases (STEP).

    Precondition phase, the model dense: plain Adam,

    .. math::

       m &\leftarrow \beta_1 m + (1 - \beta_1) g, \qquad
       v \leftarrow \beta_2 v + (1 - \beta_2) g^2, \qquad
       u = \hat m / (\sqrt{\hat v} + \epsilon).

    Mask-learning phase, the forward pass masked and the gradient straight-through:
    :math:`v` stays as it was at the end of the first phase, with the bias correction
    of that moment,

    .. math::

       m \leftarrow \beta_1 m + (1 - \beta_1) (g + \lambda (1 - E) W), \qquad
       u = \hat m / (\sqrt{\hat v^*} + \epsilon).

    The switch is automatic (AutoSwitch): with :math:`Z_t` the mean of :math:`|v_t -
    v_{t-1}|` over all weights, masks turn on once the mean of the last `window`
    values of :math:`Z` is below `threshold`. `start` gives the step instead.

    Follow it with the learning rate, and let the forward pass follow its phase::

      tx = optax.chain(nm.scale_by_step(plan), optax.scale_by_learning_rate(1e-3))
      sparse = nm.sparsify(params, plan, active=nm.sparse_phase(state))

    Args:
      plan: plan of the params.
      decay: :math:`\lambda` >= 0, the decay of pruned weights in the second phase, a
        scalar or a schedule; 0 is STEP as published, without SR-STE.
      b1: decay of the first moment, in [0, 1).
      b2: decay of the second moment, in [0, 1).
      eps: added to the denominator.
      start: first step of the mask-learning phase, >= 1; None: automatic.
      threshold: bound on the mean change of the second moment; None: `eps`, as
        published. Not with `start`, as the arguments below.
      window: number of changes averaged; None: ``1 / (1 - b2)`` rounded down.
      min_steps: earliest first step of the mask-learning phase; None: `window`.
      max_steps: latest one, even if the second moment has not settled; None: never.

    Returns:
      A stage that stands where `optax.scale_by_adam` stands. Updates keep their
      dtype; moments are float32 or wider.

    Raises:
      ValueError: an argument is out of range, or belongs to the automatic switch and
        `start` is given; at run time, the plan is of other params or `update` is
        called without params.
      TypeError: `plan` is no plan.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
      >>> tx = nm.scale_by_step(nm.plan(params, {"kernel": nm.NM(2, 4)}), start=1)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(params, state, params)
      >>> bool(nm.sparse_phase(state))
      True

    Reference:
      Lu et al., "STEP: Learning N:M Structured Sparsity Masks from Scratch with
      Precondition", 2023, arXiv 2302.01172 (AutoSwitch with the arithmetic mean).
      Here the first test waits until the window is full, and the frozen moment keeps
      its bias correction, which matters when `start` is small.
    """
    check_is_plan(plan)
    automatic = {
        "threshold": threshold,
        "window": window,
        "min_steps": min_steps,
        "max_steps": max_steps,
    }
    _check_arguments(decay, b1, b2, start, automatic)
    check_eps(eps)
    threshold = eps if threshold is None else threshold

    def init_fn(params: Params) -> ScaleByStepState:
        check_fit(plan, params)
        adam = init_adam(params)
        changes = (
            jnp.zeros(_window(window, b2), jnp.float32)
            if start is None
            else optax.MaskedNode()
        )
        # No array stands in two places of a state: it could not be donated.
        return ScaleByStepState(
            count=jnp.asarray(adam.count),
            nu_count=jnp.zeros([], jnp.int32),
            mu=adam.mu,
            nu=adam.nu,
            changes=changes,
            sparse=jnp.zeros([], bool),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = check_params(params, "nm.scale_by_step")
        pulled = _add_pull(plan, decay, updates, params, state)
        count = jnp.asarray(optax.safe_increment(state.count))
        mu = moment(pulled, state.mu, b1, 1)
        nu = jax.tree.map(
            lambda new, old: jnp.where(state.sparse, old, new),
            moment(updates, state.nu, b2, 2),
            state.nu,
        )
        nu_count = jnp.where(state.sparse, state.nu_count, count)
        second = unbias(nu, b2, nu_count)
        new = precondition(unbias(mu, b1, count), second, eps, like=updates)
        if start is None:
            changes = _record(state, mean_change(nu, state.nu))
            settled = is_settled(changes, count, threshold, min_steps, max_steps)
        else:
            changes, settled = state.changes, count >= start
        sparse = state.sparse | settled
        return new, ScaleByStepState(count, nu_count, mu, nu, changes, sparse)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def mean_change(new: PyTree, old: PyTree) -> Float[jax.Array, "..."]:
    r"""Average the absolute change over all entries of a tree.

    .. math:: Z = d^{-1} \lVert v_t - v_{t-1} \rVert_1

    Args:
      new: tree of arrays :math:`v_t`.
      old: tree of arrays :math:`v_{t-1}` of the same shapes.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import step
      >>> float(step.mean_change(jnp.array([1.0, 4.0]), jnp.array([1.0, 2.0])))
      1.0
    """
    sums = [
        jnp.abs(a - b).sum(dtype=jnp.float32)
        for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True)
    ]
    size = sum(leaf.size for leaf in jax.tree.leaves(new))
    return sum(sums, jnp.zeros([], jnp.float32)) / max(1, size)


def is_settled(
    changes: Float[jax.Array, "window"],
    count: Int[jax.Array, ""],
    threshold: Scalar,
    min_steps: Scalar | None = None,
    max_steps: Scalar | None = None,
) -> Bool[jax.Array, ""]:
    """Decide whether the next step is the first one with masks.

    Args:
      changes: the last mean changes of the second moment, in any order.
      count: number of updates so far.
      threshold: bound on their mean.
      min_steps: earliest first step with masks; None: no bound.
      max_steps: latest first step with masks; None: no bound.

    Returns:
      True if the window is full, its mean below the threshold and `min_steps` reached,
      or if `max_steps` is reached.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import step
      >>> bool(step.is_settled(jnp.array([0.1, 0.3]), jnp.array(2), 0.25))
      True
    """
    bound = jnp.asarray(threshold).astype(jnp.float32)
    settled = (count >= changes.size) & (changes.mean() < bound)
    if min_steps is not None:
        settled = settled & (count >= min_steps)
    if max_steps is not None:
        settled = settled | (count >= max_steps)
    return settled


def _check_arguments(decay, b1, b2, start, automatic) -> None:
    """Check arguments, as far as they are known."""
    check_decay(decay)
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    check_at_least("start", start, 1)
    if start is not None:
        for name, value in automatic.items():
            if value is not None:
                raise ValueError(
                    f"{name}={value!r} belongs to the automatic switch, but "
                    f"start={start!r} is given: give one of them"
                )
    for name in ("window", "min_steps", "max_steps"):
        check_at_least(name, automatic[name], 1)
    first, last = concrete(automatic["min_steps"]), concrete(automatic["max_steps"])
    if first is not None and last is not None and first > last:
        raise ValueError(f"min_steps={first:g} is above max_steps={last:g}")
    bound = concrete(automatic["threshold"])
    if bound is not None and not bound > 0:
        raise ValueError(f"threshold={bound!r} must be > 0")


def _window(window: int | None, b2: Scalar) -> int:
    """Give the length of the ring buffer, which must be known now."""
    known = concrete(b2 if window is None else window)
    if known is None:
        raise ValueError(
            "the window of nm.scale_by_step is a shape and cannot be a traced value: "
            "give window and optax.inject_hyperparams(..., static_args='window')"
        )
    # 1 / (1 - 0.999) is 999.9... in floating point.
    return max(1, math.floor(1 / (1 - known) + 1e-3)) if window is None else int(known)


def _record(
    state: ScaleByStepState, change: Float[jax.Array, ""]
) -> Float[jax.Array, "window"]:
    """Write the newest change into the ring buffer, in the first phase."""
    assert isinstance(state.changes, jax.Array)
    at = state.count % state.changes.shape[0]
    return jnp.where(state.sparse, state.changes, state.changes.at[at].set(change))


def _add_pull(
    plan: Plan,
    decay: Scalar | Schedule,
    updates: PyTree,
    params: Params,
    state: ScaleByStepState,
) -> PyTree:
    """Add the decay of pruned weights in the sparse phase."""
    if concrete(decay) == 0:
        check_fit(plan, params)
        return updates
    strength = decay(state.count) if callable(decay) else decay
    dense = jnp.logical_not(state.sparse)
    return map_planned(
        lambda leaf, w, u, kept: add_pull(u, w, kept | dense, strength),
        plan,
        params,
        updates,
        compute_masks(params, plan),
        otherwise=lambda w, u, _: u,
    )
