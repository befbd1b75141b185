"""Hold masks around an inner optimizer: the mechanism of all hard methods.

A hard method keeps the params exactly sparse after every step. That takes the first
word and the last: the inner optimizer sees masked gradients, so that its moments stay
zero where a weight is inactive, while growth reads the raw ones; and its updates are
projected afterwards. Stages of a chain share no state, so the method WRAPS the inner
optimizer, as `optax.MultiSteps` does.

Order of one update, with masks E and a topology rule:

1. the inner optimizer steps on ``E * g``;
2. the result is projected: ``u`` where active, ``-p`` elsewhere, in the params' dtype;
3. at the steps the rule names, new masks E' are chosen from the params AFTER this
   step and the raw gradient of this step;
4. dropped weights get ``-p``, grown ones start at 0;
5. the inner optimizer's moments are zero wherever a weight was not active before and
   after the update.

Forward passes need no mask: the params themselves are sparse, and a zero weight still
has a gradient.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Int, PyTree

from nmjax.paths import is_masked
from nmjax.plans import Plan, matching_leaves, named_leaves
from nmjax.projection import apply_masks
from nmjax.transforms.checks import check_fit, check_is_plan, check_params
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
    """

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
        key = optax.MaskedNode() if decide.key is None else decide.key
        count = jnp.zeros([], jnp.int32)
        return HeldState(count, masks, inner.init(params), growth, key)

    def update_fn(updates, state, params=None, *, topology=None, **extra_args):
        params = check_params(params, name)
        check_fit(plan, params)
        masks, grads = state.masks, updates
        masked = apply_masks(grads, masks)
        updates, inner_state = inner.update(masked, state.inner, params, **extra_args)
        updates = project_updates(updates, params, masks)
        count = jnp.asarray(optax.safe_increment(state.count))
        growth = _remember(decide.memory, state, params, grads, count)
        signal = grads if decide.memory is None else growth

        def change(operands):
            updates, masks, key, signal = operands
            stepped = optax.apply_updates(params, updates)
            use, next_key = _split(key)
            chosen = decide.change(count, use, stepped, masks, signal)
            lasts = decide.memory is not None and decide.memory.lasts
            rest = growth if lasts else jax.tree.map(jnp.zeros_like, growth)
            return chosen, next_key, rest

        def keep(operands):
            _, masks, key, _ = operands
            return masks, key, growth

        operands = (updates, masks, state.key, signal)
        if topology is None:
            out = jax.lax.cond(decide.due(count), change, keep, operands)
        else:
            out = change(operands) if topology else keep(operands)
        chosen, key, growth = out
        both = jax.tree.map(lambda old, new: old & new, masks, chosen)
        updates = project_updates(updates, params, both)
        inner_state = reset_moments(inner, inner_state, params, both)
        return updates, HeldState(count, chosen, inner_state, growth, key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def project_updates(updates: PyTree, params: Params, masks: Masks) -> PyTree:
    r"""Make updates that leave inactive params at exactly zero.

    .. math:: u_i \text{ if } e_i \text{ else } -p_i

    Args:
      updates: tree of updates.
      params: tree of params.
      masks: tree of masks; `optax.MaskedNode()` leaves an update as it is.

    Returns:
      Updates in the dtype of the params, so that `optax.apply_updates` gives 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import holding
      >>> updates = {"w": jnp.array([0.5, jnp.inf])}
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> masks = {"w": jnp.array([True, False])}
      >>> holding.project_updates(updates, params, masks)["w"].tolist()
      [0.5, -2.0]
    """
    return map_held(
        lambda p, mask, u: jnp.where(mask, u.astype(p.dtype), 0 - p),
        params,
        masks,
        updates,
        otherwise=lambda p, u: u,
    )


def reset_moments(
    inner: Optimizer,
    state: optax.OptState,
    params: Params,
    active: Masks,
) -> optax.OptState:
    """Set an optimizer's moments to zero where weights are not active.

    Every array of the state that stands for a param and has its shape is a moment.
    Others, such as adafactor's factored moments, are left alone.

    Args:
      inner: the optimizer.
      state: its state.
      params: the params it was made for.
      active: masks of the moments to keep.

    Returns:
      The state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nmjax.transforms import holding
      >>> params, mask = {"w": jnp.ones(2)}, {"w": jnp.array([True, False])}
      >>> tx = optax.trace(0.9)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> holding.reset_moments(tx, state, params, mask).trace["w"].tolist()
      [1.0, 0.0]
    """
    pairs, treedef = named_leaves(params)
    masks = jax.tree.unflatten(treedef, matching_leaves(pairs, active))

    def reset(moment: Any, mask: Any) -> Any:
        if is_masked(mask) or is_masked(moment) or moment is None:
            return moment
        if jnp.shape(moment) != mask.shape:
            return moment
        return jnp.where(mask, moment, jnp.zeros((), moment.dtype))

    return optax.tree.map_params(
        inner, reset, state, masks, is_leaf=lambda leaf: leaf is None or is_masked(leaf)
    )


def map_held(
    fn: Callable[..., Any],
    params: Params,
    masks: Masks,
    *rest: PyTree,
    otherwise: Callable[..., Any],
) -> PyTree:
    """Map over the leaves that have a mask, and over the others by `otherwise`.

    Args:
      fn: called as ``fn(param, mask, *rest)``.
      params: tree of params.
      masks: tree of masks with the same paths.
      *rest: trees with the same paths.
      otherwise: called as ``otherwise(param, *rest)`` where there is no mask.

    Returns:
      A tree with the structure of `params`.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nmjax.transforms import holding
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
      >>> masks = {"a": jnp.array([True, False]), "b": optax.MaskedNode()}
      >>> count = lambda p, mask: int(mask.sum())
      >>> holding.map_held(count, params, masks, otherwise=lambda p: p.size)
      {'a': 1, 'b': 3}
    """
    pairs, treedef = named_leaves(params)
    columns = [matching_leaves(pairs, tree) for tree in (masks, *rest)]
    out = []
    for (_, leaf), mask, *others in zip(pairs, *columns, strict=True):
        if is_masked(leaf):
            out.append(leaf)
        elif is_masked(mask):
            out.append(otherwise(leaf, *others))
        else:
            out.append(fn(leaf, mask, *others))
    return jax.tree.unflatten(treedef, out)


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
