"""Hold masks around an inner optimizer: the mechanism of all hard methods.

A hard method keeps the params exactly sparse after every step. That takes the first
word and the last: the inner optimizer sees masked gradients, so that its moments stay
zero where a weight is inactive, while growth reads the raw ones; and its updates are
projected afterwards. Stages of a chain share no state, so the method WRAPS the inner
optimizer, as `optax.MultiSteps` does.

Order of one update, with masks E and a topology rule:

1. the inner optimizer steps on ``E * g``, from moments and params that are zero
   outside of E;
2. the result is projected: ``u`` where active, ``-p`` elsewhere, in the params' dtype;
3. at the steps the rule names, new masks E' are chosen from the params AFTER this
   step and the raw gradient of this step;
4. dropped weights get ``-p``, grown ones start at 0;
5. moments are zero from then on wherever a weight was not active before and after.

Most moments of inactive weights stay zero by themselves, since gradients, moments and
params are zero there; `nmjax.transforms.zeros` finds those that do not, and only they
are set to zero again.

Forward passes need no mask: the params themselves are sparse, and a zero weight still
has a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Int, PyTree

from nmjax.paths import is_masked
from nmjax.plans import Plan, matching_leaves, named_leaves
from nmjax.transforms.checks import check_fit, check_is_plan, check_params
from nmjax.transforms.clearing import (
    clear,
    clear_tree,
    find_moments,
    find_restless,
    map_held,
    project_updates,
    reset_moments,
    select,
)
from nmjax.typing import Masks, Params

Optimizer: TypeAlias = optax.GradientTransformation | optax.MultiSteps


class HeldState(NamedTuple):
    """State of a transform that holds masks.

    Attributes:
      count: number of updates so far.
      masks: active weights after these updates; see `nm.masks`.
      inner: state of the inner optimizer.
      growth: what is remembered of the raw gradients for the next change of topology
        (see `Memory`), or `optax.MaskedNode()`.
      key: random key of the next change, or `optax.MaskedNode()`.
    """

    count: Int[Array, "..."]  # pyright: ignore[reportIncompatibleMethodOverride]
    masks: Masks
    inner: optax.OptState
    growth: PyTree
    key: Any


class Memory(NamedTuple):
    """What is remembered of gradients between changes: an array per sparse leaf.

    Attributes:
      add: ``add(count)`` gives the function ``(total, weights, grads) -> total`` of
        one leaf at that update; totals start at zero.
      lasts: whether totals go on after a change of topology, or start again.
    """

    add: Callable[[Array], Callable[[Array, Array, Array], Array]]
    lasts: bool


@runtime_checkable
class Topology(Protocol):
    """How and when masks change.

    Attributes:
      memory: what a change is decided by in place of the gradients of its step, or
        None.
      key: random key to start from, or None.
      apart: whether the masks of different leaves are chosen independently.
    """

    @property
    def apart(self) -> bool:
        """Whether leaves change independently; `change` may see one at a time."""
        ...

    @property
    def memory(self) -> Memory | None:
        """What is remembered of gradients, or None."""
        ...

    @property
    def key(self) -> Any:
        """Random key, or None."""
        ...

    def start(self, params: Params) -> Masks:
        """Choose the masks to start with."""
        ...

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Tell whether masks change after an update; `count` includes that update."""
        ...

    def change(
        self, count: Int[Array, ""], key: Any, params: Params, masks: Masks, grads: Any
    ) -> Masks:
        """Choose new masks."""
        ...


def hold(
    inner: Optimizer,
    plan: Plan,
    topology: Topology,
    name: str,
) -> optax.GradientTransformationExtraArgs:
    """Wrap an inner optimizer so that params stay exactly sparse.

    Args:
      inner: any optax optimizer; its updates are what gets applied.
      plan: plan of the params.
      topology: chooses masks at the start and at the steps that are due.
      name: the public name of the method, for messages.

    Returns:
      A transform whose `update` also takes ``topology=True`` or ``False`` (a Python
      bool) to force a change or to leave it out, for callers that jit two steps.
    """
    check_is_plan(plan)
    if not hasattr(inner, "init") or not hasattr(inner, "update"):
        raise TypeError(f"inner of {name} must be an optax optimizer, got {inner!r}")
    if isinstance(inner, optax.MultiSteps):
        inner = inner.gradient_transformation()
    inner = optax.with_extra_args_support(inner)
    decide = topology

    def init_fn(params: Params) -> HeldState:
        check_fit(plan, params)
        empty = not jax.tree.leaves(params)  # the placeholder of optax's map_params
        masks = params if empty else decide.start(params)
        growth = optax.MaskedNode()
        if decide.memory is not None:
            growth = params if empty else _zeros_where_held(params, masks)
        # A copy: who donates the state keeps the key that the method was made with.
        key = optax.MaskedNode() if decide.key is None else jnp.copy(decide.key)
        count = jnp.zeros([], jnp.int32)
        return HeldState(count, masks, inner.init(params), growth, key)

    def update_fn(updates, state, params=None, *, topology=None, **extra_args):
        params = check_params(params, name)
        check_fit(plan, params)
        grads, masks = updates, state.masks
        places = find_moments(inner, state.inner, params, masks)
        inputs = (
            clear_tree(grads, masks),
            reset_moments(state.inner, params, masks, places),
            clear_tree(params, masks),
        )
        updates, inner_state = inner.update(*inputs, **extra_args)
        restless = find_restless(
            lambda *trees: inner.update(*trees, **extra_args)[1], *inputs, places
        )
        inner_state = reset_moments(inner_state, params, masks, restless)
        updates = project_updates(updates, params, masks)
        count = jnp.asarray(optax.safe_increment(state.count))
        growth = _remember(decide.memory, state, params, grads, count)
        state = HeldState(count, masks, inner_state, growth, state.key)
        due = decide.due(count) if topology is None else topology
        if due is False:
            return updates, state
        return _change(decide, due, params, grads, updates, state, places)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _change(
    topology: Topology,
    due: Bool[Array, ""] | bool,
    params: Params,
    grads: PyTree,
    updates: PyTree,
    state: HeldState,
    places: list[list[int]],
) -> tuple[PyTree, HeldState]:
    """Choose new masks if they are due, and let updates and state follow.

    Every leaf has a condition of its own where masks are chosen leaf by leaf, so that
    the gradients and temporary arrays of different leaves need not live at once. What
    a condition hands through unchanged is not copied.
    """
    pairs, treedef = named_leaves(params)
    weights = [leaf for _, leaf in pairs]
    memory = topology.memory
    signal = matching_leaves(pairs, grads if memory is None else state.growth)
    forgets = memory is not None and not memory.lasts
    use, next_key = _split(state.key)
    steps, masks = (matching_leaves(pairs, tree) for tree in (updates, state.masks))
    inner_leaves, inner_def = jax.tree.flatten(state.inner)

    def tree_of(group: list[int], leaves: list[Array]) -> PyTree:
        found: list[Any] = [optax.MaskedNode()] * len(pairs)
        for i, leaf in zip(group, leaves, strict=True):
            found[i] = leaf
        return jax.tree.unflatten(treedef, found)

    held = [i for i, mask in enumerate(masks) if not is_masked(mask)]
    for group in [[i] for i in held] if topology.apart else [held]:

        def change(operands, group=group):
            weights, steps, masks, signal = operands
            stepped = [w + step for w, step in zip(weights, steps, strict=True)]
            trees = (tree_of(group, leaves) for leaves in (stepped, masks, signal))
            tree = topology.change(state.count, use, *trees)
            leaves = matching_leaves(pairs, tree)
            totals = [jnp.zeros_like(s) for s in signal if forgets]
            return [leaves[i] for i in group], totals

        def keep(operands):
            _, _, masks, signal = operands
            return masks, [s for s in signal if forgets]

        for i in group:
            # The condition needs the updates as arrays: do not compute them twice.
            steps[i] = lax.optimization_barrier(steps[i])
        columns = (weights, steps, masks, signal)
        operands = tuple([column[i] for i in group] for column in columns)
        chosen, totals = _if(due, change, keep, operands)
        for i, mask in zip(group, chosen, strict=True):
            masks[i] = mask
            steps[i] = select(mask, steps[i], 0 - weights[i])
            # Grown weights had no moments: only those of dropped ones remain.
            moments = mask, [inner_leaves[place] for place in places[i]]
            moments = _if(due, _clear_all, lambda operands: operands[1], moments)
            for place, moment in zip(places[i], moments, strict=True):
                inner_leaves[place] = moment
        for i, total in zip(group, totals, strict=False):
            signal[i] = total

    key = state.key
    if not is_masked(key):
        key = _if(due, lambda _: next_key, lambda _: state.key, ())
    steps, masks = (jax.tree.unflatten(treedef, leaves) for leaves in (steps, masks))
    growth = jax.tree.unflatten(treedef, signal) if forgets else state.growth
    inner_state = jax.tree.unflatten(inner_def, inner_leaves)
    return steps, HeldState(state.count, masks, inner_state, growth, key)


def _if(
    due: Bool[Array, ""] | bool,
    change: Callable[[Any], Any],
    keep: Callable[[Any], Any],
    operands: Any,
) -> Any:
    return change(operands) if due is True else lax.cond(due, change, keep, operands)


def _clear_all(operands: tuple[Array, list[Array]]) -> list[Array]:
    mask, moments = operands
    return [clear(mask, moment) for moment in moments]


def _zeros_where_held(params: Params, masks: Masks) -> PyTree:
    return map_held(
        lambda p, mask: jnp.zeros_like(p),
        params,
        masks,
        otherwise=lambda p: optax.MaskedNode(),
    )


def _split(key: Any) -> tuple[Any, Any]:
    if is_masked(key):
        return None, key
    use, next_key = jax.random.split(key)
    return use, next_key


def _remember(
    memory: Memory | None, state: HeldState, params: Params, grads: PyTree, count: Array
) -> PyTree:
    """Add this step's gradients to what is remembered."""
    if memory is None:
        return state.growth
    add = memory.add(count)
    return map_held(
        lambda p, mask, g, total: add(total, p, g.astype(total.dtype)),
        params,
        state.masks,
        grads,
        state.growth,
        otherwise=lambda *_: optax.MaskedNode(),
    )
