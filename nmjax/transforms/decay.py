"""SR-STE: pull the pruned weights towards zero while training through the mask.

Training with N:M masks keeps dense weights ``W``. The forward pass computes with
``E * W``, where the mask ``E`` is recomputed from ``W`` at every step
(`nm.sparsify`), and the gradient passes straight through to all of ``W``. Alone,
that is the straight-through estimator (STE): pruned weights still move, masks flip
often and training suffers. SR-STE adds ``decay * (1 - E) * W`` to the update, so
that pruned weights fade and masks settle.

Where the stage stands in `optax.chain` matters:

- after whatever averages, unscales, clips or accumulates gradients, because the
  term is no gradient and must not be clipped or scaled with them;
- ``coupled`` and ``hybrid``: before momentum and preconditioner;
- ``decoupled``: last, after the learning rate.

Common weight decay acts on all weights and is another stage
(`optax.add_decayed_weights`); the two add up.
"""

import dataclasses
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
    check_phase,
    concrete,
)
from nmjax.transforms.moments import init_adam, moment, precondition, unbias, widen
from nmjax.typing import FloatArray, Masks, Params

MODES = ("coupled", "decoupled", "hybrid")

_ADAM_DEFAULTS = {"b1": 0.9, "b2": 0.999, "eps": 1e-8}


class SRSTEState(NamedTuple):
    """State of `srste` where it needs one.

    Attributes:
      count: number of updates so far.
      masks: masks of the next step where `refresh` is given, else
        `optax.MaskedNode()`.
      sparse: whether the next step is in the sparse phase where `start` or `stop` is
        given, else `optax.MaskedNode()`.
    """

    count: Int[jax.Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    masks: Masks
    sparse: Bool[jax.Array, "..."] | optax.MaskedNode


class SRSTEHybridState(NamedTuple):
    """State of `srste` in hybrid mode.

    Attributes:
      adam: first moment `mu` of the gradient and second moment `nu` of the update,
        both float32 or wider.
      phase: an `SRSTEState`, or `optax.EmptyState()` where none is needed.
    """

    adam: optax.ScaleByAdamState
    phase: SRSTEState | optax.EmptyState


@dataclasses.dataclass(frozen=True, eq=False)
class _Settings:
    """The arguments of `srste` that decide when and how strongly weights are pulled."""

    plan: Plan
    decay: Scalar | Schedule
    learning_rate: Scalar | Schedule | None
    start: Scalar | None
    stop: Scalar | None
    refresh: Scalar | None

    @property
    def has_phases(self) -> bool:
        return self.start is not None or self.stop is not None

    @property
    def has_state(self) -> bool:
        scheduled = callable(self.decay) or callable(self.learning_rate)
        return scheduled or self.has_phases or self.refresh is not None


def srste(
    plan: Plan,
    decay: Scalar | Schedule = 2e-4,
    *,
    mode: str = "coupled",
    learning_rate: Scalar | Schedule | None = None,
    b1: Scalar = 0.9,
    b2: Scalar = 0.999,
    eps: Scalar = 1e-8,
    start: Scalar | None = None,
    stop: Scalar | None = None,
    refresh: Scalar | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Add the decay of pruned weights to the updates (SR-STE).

    With mask :math:`E`, weights :math:`W`, straight-through gradient :math:`g` (not
    masked) and decay :math:`\lambda`, the three modes emit

    .. math::

       \text{coupled:}\quad & u = g + \lambda (1 - E) W \\
       \text{decoupled:}\quad & u = g' - \eta \lambda (1 - E) W \\
       \text{hybrid:}\quad & u = \frac{r}{\sqrt{\hat v} + \epsilon}, \qquad
         r = \hat m + \lambda (1 - E) W, \qquad
         v \leftarrow \beta_2 v + (1 - \beta_2) r^2

    - ``coupled`` is the published rule. It stands before the optimizer:
      ``optax.chain(nm.srste(plan), optax.sgd(0.1, momentum=0.9))``.
    - ``decoupled`` keeps the term out of Adam's moments, as AdamW does with weight
      decay. It stands last and needs the learning rate :math:`\eta`:
      ``optax.chain(optax.adam(lr), nm.srste(plan, mode="decoupled",
      learning_rate=lr))``. :math:`g'` is the finished update.
    - ``hybrid`` (AST) IS the Adam preconditioner: ``optax.chain(nm.srste(plan,
      mode="hybrid"), optax.scale_by_learning_rate(lr))``. The first moment
      :math:`\hat m` averages the gradient alone; the second one averages what is
      applied. Leaves that the plan leaves dense get plain Adam. Moments are float32
      or wider whatever the dtype of the params.

    ``decay=0`` is the plain straight-through estimator. The forward pass is
    `nm.sparsify`; masks are magnitude masks of the weights that `update` is given,
    the same as in the forward pass, so nothing has to be stored: the stage has no
    state unless a schedule, a phase or `refresh` asks for one.

    Phases: the sparse phase is ``start <= step < stop``, steps counted from 0 in
    updates. Before it is a dense warm-up, after it a dense fine-tuning; there the
    stage adds nothing. The forward pass follows with ``nm.sparsify(params, plan,
    active=nm.sparse_phase(state))``.

    Refresh: masks are kept in the state (made by `init`) and recomputed by every
    `refresh`-th update, from the params which that update is given, for example with
    `nm.TransposableNM(2, 4)` and ``refresh=40``. The forward pass reads them with
    ``nm.sparsify(params, nm.masks(state))``.

    Args:
      plan: plan of the params.
      decay: :math:`\lambda`, a scalar >= 0 or a schedule from step to scalar (AST
        raises it linearly from 0).
      mode: ``"coupled"``, ``"decoupled"`` or ``"hybrid"``.
      learning_rate: :math:`\eta` of decoupled mode, a scalar or a schedule; there
        only.
      b1: decay of the first moment, in [0, 1); hybrid mode only.
      b2: decay of the second moment, in [0, 1); hybrid mode only.
      eps: added to the denominator, >= 0; hybrid mode only.
      start: first step of the sparse phase; None: 0.
      stop: first step after the sparse phase; None: never.
      refresh: number of updates between two computations of the masks, >= 1; None:
        at every step, and nothing is stored.

    Returns:
      A stage for `optax.chain`. Updates keep their dtype; the term is computed in
      float32 or wider. Pruned weights are selected, not multiplied by a mask, so
      that an infinite kept weight gives no NaN.

    Raises:
      ValueError: an argument is out of range or belongs to another mode; at run
        time, the plan is of other params or `update` is called without params.
      TypeError: `plan` is no plan.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.array([[4.0], [3.0], [2.0], [1.0]])}
      >>> tx = nm.srste(nm.plan(params, {"kernel": nm.NM(2, 4)}), decay=0.5)
      >>> grads = {"kernel": jnp.ones((4, 1))}
      >>> updates, _ = tx.update(grads, tx.init(params), params)
      >>> updates["kernel"][:, 0].tolist()
      [1.0, 1.0, 2.0, 1.5]

    Reference:
      Coupled: Zhou et al., 2021, arXiv 2102.04010. Refresh and dense fine-tuning: Hu
      et al., 2024, arXiv 2404.01847. Hybrid: Huang et al., 2024, arXiv 2407.20584;
      their code divides all of :math:`r`, decay included, by :math:`1 - \beta_1^t`
      and takes :math:`v` of the uncorrected :math:`r`, which makes the first steps
      :math:`1 / (1 - \beta_1)` times as long. Here only :math:`m` is corrected.
    """
    check_is_plan(plan)
    _check_arguments(decay, mode, learning_rate, b1, b2, eps)
    check_phase(start, stop)
    check_at_least("refresh", refresh, 1)
    settings = _Settings(plan, decay, learning_rate, start, stop, refresh)
    if mode == "hybrid":
        return _hybrid(settings, b1, b2, eps)

    def init_fn(params: Params) -> SRSTEState | optax.EmptyState:
        return _init_phase(settings, params)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = check_params(params, "nm.srste")
        updates = _add_pull(settings, updates, state, params)
        return updates, _next_phase(settings, state, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def add_pull(
    update: FloatArray,
    weights: FloatArray,
    kept: Bool[jax.Array, "..."],
    strength: Scalar,
) -> FloatArray:
    r"""Add a multiple of the pruned weights to an update.

    .. math:: u + s \, (1 - E) W

    Args:
      update: u, floating array of any shape.
      weights: W, of the same shape.
      kept: E, bool mask of the same shape, True = kept.
      strength: s, scalar.

    Returns:
      The sum, computed in float32 or wider, in the update's dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import decay
      >>> w, mask = jnp.array([jnp.inf, 2.0]), jnp.array([True, False])
      >>> print(decay.add_pull(jnp.zeros(2), w, mask, 0.5))
      [0. 1.]
    """
    dtype = widen(update.dtype)
    pruned = jnp.where(kept, 0, weights).astype(dtype)
    pull = jnp.asarray(strength).astype(dtype) * pruned
    return (update.astype(dtype) + pull).astype(update.dtype)


def _check_arguments(decay, mode, learning_rate, b1, b2, eps) -> None:
    """Check the arguments that decide on the rule."""
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(MODES)}")
    check_decay(decay)
    if mode == "decoupled" and learning_rate is None:
        raise ValueError(
            "mode='decoupled' needs learning_rate: give the one of the optimizer "
            "before it, a scalar or a schedule"
        )
    if mode != "decoupled" and learning_rate is not None:
        raise ValueError(
            f"learning_rate={learning_rate!r} belongs to mode='decoupled'; in "
            f"mode={mode!r} the stages after this one apply it"
        )
    for name, value in {"b1": b1, "b2": b2, "eps": eps}.items():
        given = isinstance(value, float | int) and value != _ADAM_DEFAULTS[name]
        if mode != "hybrid" and given:
            raise ValueError(
                f"{name}={value!r} belongs to mode='hybrid'; in mode={mode!r} give it "
                "to the optimizer of the chain"
            )
    check_fraction("b1", b1)
    check_fraction("b2", b2)
    check_eps(eps)


def _init_phase(settings: _Settings, params: Params) -> SRSTEState | optax.EmptyState:
    """Make the state, if one is needed."""
    check_fit(settings.plan, params)
    if not settings.has_state:
        return optax.EmptyState()
    count = jnp.zeros([], jnp.int32)
    kept = optax.MaskedNode()
    if settings.refresh is not None:
        # optax.tree.map_params calls init with a tree that has no leaves.
        empty = not jax.tree.leaves(params)
        kept = params if empty else compute_masks(params, settings.plan)
    return SRSTEState(count, kept, _is_sparse(settings, count))


def _is_sparse(
    settings: _Settings, count: jax.Array
) -> Bool[jax.Array, "..."] | optax.MaskedNode:
    """Tell whether a step is in the sparse phase."""
    if not settings.has_phases:
        return optax.MaskedNode()
    flag = jnp.ones([], bool)
    if settings.start is not None:
        flag = flag & (count >= settings.start)
    if settings.stop is not None:
        flag = flag & (count < settings.stop)
    return flag


def _next_phase(
    settings: _Settings, state: SRSTEState | optax.EmptyState, params: Params
) -> SRSTEState | optax.EmptyState:
    """Advance the state by one update."""
    if isinstance(state, optax.EmptyState):
        return state
    count = jnp.asarray(optax.safe_increment(state.count))
    kept = state.masks
    if settings.refresh is not None:
        kept = jax.lax.cond(
            count % settings.refresh == 0,
            lambda params, _: compute_masks(params, settings.plan),
            lambda _, kept: kept,
            params,
            kept,
        )
    return SRSTEState(count, kept, _is_sparse(settings, count))


def _at_step(
    value: Scalar | Schedule, state: SRSTEState | optax.EmptyState
) -> Float[jax.Array, "..."]:
    """Give the value of a scalar or a schedule at this step."""
    if callable(value):
        assert isinstance(state, SRSTEState)
        value = value(state.count)
    return jnp.asarray(value).astype(jnp.float32)


def _add_pull(
    settings: _Settings,
    updates: PyTree,
    state: SRSTEState | optax.EmptyState,
    params: Params,
) -> PyTree:
    """Add the decay of pruned weights to all updates of sparse leaves."""
    if concrete(settings.decay) == 0:
        check_fit(settings.plan, params)
        return updates
    strength = _at_step(settings.decay, state)
    if settings.learning_rate is not None:
        strength = -_at_step(settings.learning_rate, state) * strength
    if settings.refresh is None:
        kept = compute_masks(params, settings.plan)
    else:
        assert isinstance(state, SRSTEState)
        kept = state.masks
    if settings.has_phases:
        assert isinstance(state, SRSTEState)
        assert not isinstance(state.sparse, optax.MaskedNode)
        dense = jnp.logical_not(state.sparse)
        kept = jax.tree.map(lambda mask: mask | dense, kept)
    return map_planned(
        lambda leaf, w, u, mask: add_pull(u, w, mask, strength),
        settings.plan,
        params,
        updates,
        kept,
        otherwise=lambda w, u, _: u,
    )


def _hybrid(
    settings: _Settings, b1: Scalar, b2: Scalar, eps: Scalar
) -> optax.GradientTransformationExtraArgs:
    """Build the preconditioner of AST."""

    def init_fn(params: Params) -> SRSTEHybridState:
        return SRSTEHybridState(init_adam(params), _init_phase(settings, params))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        params = check_params(params, "nm.srste")
        check_fit(settings.plan, params)
        count = jnp.asarray(optax.safe_increment(state.adam.count))
        mu = moment(updates, state.adam.mu, b1, 1)
        mean = unbias(mu, b1, count)
        applied = _add_pull(settings, mean, state.phase, params)
        # Where nothing is pulled, the second moment is Adam's: of the gradient.
        seen = map_planned(
            lambda leaf, w, u, g: u,
            settings.plan,
            params,
            applied,
            updates,
            otherwise=lambda w, u, g: g,
        )
        nu = moment(seen, state.adam.nu, b2, 2)
        new = precondition(applied, unbias(nu, b2, count), eps, like=updates)
        adam = optax.ScaleByAdamState(count, mu, nu)
        return new, SRSTEHybridState(adam, _next_phase(settings, state.phase, params))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
