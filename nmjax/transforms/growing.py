"""Dynamic sparse training: drop and grow weights while training.

SET, RigL and SRigL wrap an inner optimizer and change masks every `delta_t` steps.
`nmjax.transforms.holding` says what happens in a step, `nmjax.topology` how a layer
drops and grows. The optimizer steps first; the change of topology comes after it, on
the same batch, as in SRigL's code. (RigL's code replaces the gradient step by the
change of topology at those steps.)

Params must be sparse from the start: make them so with `nm.sparse_init` or
`nm.project`. The starting masks are the plan's magnitude masks of the params that
`init` is given, so that params which are exactly sparse keep their own positions.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, PRNGKeyArray

from nmjax import schedules, topology
from nmjax.budgets import FanIn, Unstructured
from nmjax.patterns import NM
from nmjax.plans import LeafPlan, Plan
from nmjax.transforms.checks import check_at_least, check_is_plan
from nmjax.transforms.dynamics import DynamicTopology
from nmjax.transforms.holding import Optimizer, hold

Drop = schedules.Scalar | schedules.Schedule


def set_(
    inner: Optimizer,
    plan: Plan,
    *,
    total_steps: int,
    key: PRNGKeyArray,
    drop_fraction: Drop = 0.3,
    delta_t: int = 100,
    stop: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Drop by magnitude and grow at random around an inner optimizer (SET).

    Every `delta_t` steps, each layer drops the fraction f of its active weights with
    the smallest :math:`|w|` and grows as many at random, as its pattern allows: see
    `nm.set_update`.

    Args:
      inner: any optax optimizer.
      plan: plan of the params: `Unstructured`, `FanIn` or `NM` leaves.
      total_steps: number of updates of the whole training.
      key: random key for growth.
      drop_fraction: constant f in [0, 1], or a schedule from step to f.
      delta_t: steps between two changes of topology, >= 1.
      stop: no change from this step on. Default: 75 % of `total_steps`.

    Returns:
      A transform to use in place of `inner`. Its state has the masks (`nm.masks`).

    Raises:
      ValueError: an argument is out of range, or the plan has a pattern that the
        method cannot grow.
      TypeError: `plan` is no plan, or `inner` no optimizer.

    Example:
      >>> import jax, optax
      >>> import nmjax as nm
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> plan = nm.plan(params, nm.Unstructured(), density=0.25)
      >>> params = nm.project(params, plan)
      >>> tx = nm.set_(optax.sgd(0.1), plan, total_steps=100, key=jax.random.key(1))
      >>> int(nm.masks(tx.init(params))["kernel"].sum())
      32

    Reference:
      Mocanu et al., 2018, arXiv 1707.04780.
    """
    _check_patterns(plan, (Unstructured, FanIn, NM), "nm.set_")
    drop = drop_fraction
    if not callable(drop):
        drop = schedules.constant_drop(drop)

    def rule(leaf, key, weights, mask, grads, fraction):
        del grads
        kept, _ = _keep(leaf, weights, mask, fraction)
        return _regrow(leaf, kept, topology.random_scores(key, mask))

    stop = _check_steps(total_steps, delta_t, stop, 1)
    changes = DynamicTopology(plan, rule, drop, delta_t, stop, key=key)
    return hold(inner, plan, changes, "nm.set_")


def rigl(
    inner: Optimizer,
    plan: Plan,
    *,
    total_steps: int,
    drop_fraction: Drop = 0.3,
    delta_t: int = 100,
    stop: int | None = None,
    accumulate: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""Drop by magnitude and grow by gradient around an inner optimizer (RigL).

    Every `delta_t` steps, each layer drops the fraction f of its active weights with
    the smallest :math:`|w|` and grows as many with the largest dense gradient
    :math:`|g|`: see `nm.rigl_update`. With `NM` and `FanIn` leaves the drop is the
    same, layer-wise, and growth fills every group to exactly n of m, every neuron to
    its fan-in.

    Args:
      inner: any optax optimizer.
      plan: plan of the params: `Unstructured`, `FanIn` or `NM` leaves.
      total_steps: number of updates of the whole training.
      drop_fraction: f at step 0, in [0, 1], from where it falls along half a cosine
        to 0 at `stop`; or a schedule from step to f.
      delta_t: steps between two changes of topology, >= 1.
      stop: no change from this step on. Default: 75 % of `total_steps`.
      accumulate: number of last gradients summed for growth, <= `delta_t`; above 1
        the state holds one more array per sparse leaf.

    Returns:
      A transform to use in place of `inner`. Give it the gradient with respect to the
      sparse params, not masked, and averaged over replicas.

    Raises:
      ValueError: an argument is out of range, or the plan has a pattern that the
        method cannot grow.
      TypeError: `plan` is no plan, or `inner` no optimizer.

    Example:
      >>> import jax, optax
      >>> import nmjax as nm
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> plan = nm.plan(params, nm.Unstructured(), density=0.25)
      >>> params = nm.project(params, plan)
      >>> tx = nm.rigl(optax.sgd(0.1), plan, total_steps=1000)
      >>> state = tx.init(params)
      >>> grads = {"kernel": jax.random.normal(jax.random.key(1), (16, 8))}
      >>> updates, state = tx.update(grads, state, params)
      >>> int((optax.apply_updates(params, updates)["kernel"] != 0).sum())
      32

    Reference:
      Evci et al., 2020, arXiv 1911.11134, algorithm 1.
    """
    _check_patterns(plan, (Unstructured, FanIn, NM), "nm.rigl")
    stop = _check_steps(total_steps, delta_t, stop, accumulate)

    def rule(leaf, key, weights, mask, grads, fraction):
        del key
        kept, _ = _keep(leaf, weights, mask, fraction)
        return _regrow(leaf, kept, jnp.abs(grads))

    drop = _cosine(drop_fraction, stop)
    changes = DynamicTopology(plan, rule, drop, delta_t, stop, accumulate)
    return hold(inner, plan, changes, "nm.rigl")


def srigl(
    inner: Optimizer,
    plan: Plan,
    *,
    total_steps: int,
    gamma_sal: float | None = 0.3,
    exempt: str | Sequence[str] = (),
    drop_fraction: Drop = 0.3,
    delta_t: int = 100,
    stop: int | None = None,
    accumulate: int = 1,
) -> optax.GradientTransformationExtraArgs:
    r"""RigL with constant fan-in and neuron ablation (SRigL).

    Every `delta_t` steps, each `FanIn` leaf changes by `nm.srigl_update`: neurons with
    too few salient weights are ablated, and the survivors' fan-in grows so that the
    layer keeps its budget. `NM` leaves drop layer-wise and regrow to n of m, as in
    `nm.rigl`.

    Args:
      inner: any optax optimizer.
      plan: plan of the params: `FanIn` or `NM` leaves.
      total_steps: number of updates of the whole training.
      gamma_sal: share of the fan-in that must be salient for a neuron to survive
        (published: 0.3 for CNNs, 0.95 for ViTs); from 1 on, the number of weights
        itself. None: no ablation.
      exempt: regex or regexes of leaves whose neurons are never ablated. Name the
        output layer here, if it is sparse: its neurons are classes.
      drop_fraction: f at step 0, in [0, 1], from where it falls along half a cosine
        to 0 at `stop`; or a schedule from step to f.
      delta_t: steps between two changes of topology, >= 1.
      stop: no change from this step on. Default: 75 % of `total_steps`.
      accumulate: number of last gradients summed for growth, <= `delta_t`.

    Returns:
      A transform to use in place of `inner`.

    Raises:
      ValueError: an argument is out of range, `exempt` matches no leaf, or the plan
        has a pattern that the method cannot grow.
      TypeError: `plan` is no plan, or `inner` no optimizer.

    Example:
      >>> import jax, optax
      >>> import nmjax as nm
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (16, 8))}
      >>> plan = nm.plan(params, nm.FanIn(), density=nm.erk(0.25))
      >>> params = nm.project(params, plan)
      >>> tx = nm.srigl(optax.sgd(0.1, momentum=0.9), plan, total_steps=1000)
      >>> nm.masks(tx.init(params))["kernel"].sum(0).tolist()
      [4, 4, 4, 4, 4, 4, 4, 4]

    Reference:
      Lasby et al., 2024, arXiv 2305.02299.
    """
    _check_patterns(plan, (FanIn, NM), "nm.srigl")
    stop = _check_steps(total_steps, delta_t, stop, accumulate)
    spared = _matching(plan, exempt)

    def rule(leaf, key, weights, mask, grads, fraction):
        del key
        if isinstance(leaf.pattern, NM):
            kept, _ = _keep(leaf, weights, mask, fraction)
            return _regrow(leaf, kept, jnp.abs(grads))
        gamma = None if leaf.path in spared else gamma_sal
        return _srigl_leaf(leaf, weights, mask, grads, fraction, gamma)

    drop = _cosine(drop_fraction, stop)
    changes = DynamicTopology(plan, rule, drop, delta_t, stop, accumulate)
    return hold(inner, plan, changes, "nm.srigl")


def _keep(leaf: LeafPlan, weights: Array, mask: Array, fraction: Any) -> Any:
    """Drop the smallest weights of every layer of a leaf."""
    keep: Any = topology.keep_largest
    for _ in range(leaf.stacked):
        keep = jax.vmap(keep, in_axes=(0, 0, None))
    return keep(weights, mask, fraction)


def _regrow(leaf: LeafPlan, kept: Array, growth: Array) -> Array:
    """Fill every layer of a leaf up, as its pattern allows."""
    return topology.regrow(
        kept, growth, lambda s: leaf.pattern.mask(s, leaf.budget, leaf.stacked)
    )


def _srigl_leaf(
    leaf: LeafPlan, weights: Array, mask: Array, grads: Array, fraction: Any, gamma: Any
) -> Array:
    """Update a leaf, its neuron axes merged into one."""
    assert isinstance(leaf.pattern, FanIn)
    assert leaf.budget is not None or leaf.pattern.density is not None
    inputs, neurons = _fan_in_shape(leaf)
    fan_in = leaf.pattern.fan_in(leaf.layer_shape, leaf.budget)
    budget = leaf.budget if leaf.budget is not None else fan_in * neurons

    def update(w: Array, e: Array, g: Array, f: Array) -> Array:
        return topology.srigl_update(
            w, e, g, budget=budget, drop_fraction=f, gamma_sal=gamma
        )

    for _ in range(leaf.stacked):
        update = jax.vmap(update, in_axes=(0, 0, 0, None))
    shape = (*leaf.shape[: leaf.stacked], *inputs, neurons)
    w, e, g = (array.reshape(shape) for array in (weights, mask, grads))
    return update(w, e, g, fraction).reshape(leaf.shape)


def _fan_in_shape(leaf: LeafPlan) -> tuple[tuple[int, ...], int]:
    """Split a layer's shape into its inputs and its number of neurons."""
    assert isinstance(leaf.pattern, FanIn)
    shape = leaf.layer_shape
    axes = {a % len(shape) for a in (leaf.pattern.neuron_axes or (-1,))}
    trailing = set(range(len(shape) - len(axes), len(shape)))
    if axes != trailing:
        raise ValueError(
            f"leaf {leaf.path!r}: nm.srigl needs the neurons on the last axes, got "
            f"neuron_axes={leaf.pattern.neuron_axes} of shape {shape}"
        )
    return shape[: len(shape) - len(axes)], leaf.pattern.neurons(shape)


def _check_patterns(plan: Any, allowed: tuple[type, ...], name: str) -> None:
    """Raise where a method cannot grow a leaf's pattern."""
    check_is_plan(plan)
    for leaf in plan.sparse_leaves:
        if not isinstance(leaf.pattern, allowed):
            names = ", ".join(kind.__name__ for kind in allowed)
            raise ValueError(
                f"leaf {leaf.path!r}: {name} grows {names} leaves, not {leaf.pattern}"
            )
        if leaf.is_global:
            raise ValueError(
                f"leaf {leaf.path!r}: {name} needs a budget per leaf; give the plan "
                "density=nm.uniform(...), nm.er(...) or nm.erk(...)"
            )


def _check_steps(
    total_steps: int, delta_t: int, stop: int | None, accumulate: int
) -> int:
    """Check the steps of a method, and give the step at which it stops."""
    check_at_least("total_steps", total_steps, 1)
    check_at_least("delta_t", delta_t, 1)
    check_at_least("stop", stop, 0)
    check_at_least("accumulate", accumulate, 1)
    if accumulate > delta_t:
        raise ValueError(
            f"accumulate={accumulate} gradients do not fit between two changes of "
            f"topology, delta_t={delta_t} steps apart"
        )
    return total_steps * 3 // 4 if stop is None else stop


def _cosine(drop: Drop, stop: int) -> schedules.Schedule:
    if callable(drop):
        return drop
    return schedules.cosine_drop(drop, max(1, stop))


def _matching(plan: Plan, regexes: str | Sequence[str]) -> set[str]:
    """Find the sparse leaves that regexes name."""
    found: set[str] = set()
    for regex in (regexes,) if isinstance(regexes, str) else regexes:
        paths = {
            leaf.path for leaf in plan.sparse_leaves if re.search(regex, leaf.path)
        }
        if not paths:
            raise ValueError(f"exempt={regex!r} matches no sparse leaf of the plan")
        found |= paths
    return found
