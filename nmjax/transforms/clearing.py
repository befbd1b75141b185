"""Clearing: params and an optimizer's moments are zero where weights are not active.

Pure functions of trees, for `nmjax.transforms.holding`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, PyTree

from nmjax.paths import is_masked
from nmjax.plans import matching_leaves, named_leaves
from nmjax.transforms.zeros import EVERYWHERE, stay_zero
from nmjax.typing import MaskArray, Masks, Params

_INTEGERS = {1: jnp.int8, 2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


def select(mask: MaskArray, x: Array, other: Array) -> Array:
    """Take one array where a mask is True and another elsewhere.

    As `jnp.where`, by their bits: XLA:CPU turns a floating selection between cheap
    values into a branch per entry, which takes up to three times as long.

    Args:
      mask: bool array.
      x: array of the same shape.
      other: array of the same shape and dtype.

    Returns:
      An array of the dtype of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import clearing
      >>> mask, x = jnp.array([True, False]), jnp.array([1.0, jnp.nan])
      >>> clearing.select(mask, x, jnp.array([3.0, 4.0])).tolist()
      [1.0, 4.0]
    """
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return jnp.where(mask, x, other)
    integer = _INTEGERS[x.dtype.itemsize]
    chosen = -mask.astype(integer)  # all bits or none
    bits = lax.bitcast_convert_type(x, integer) & chosen
    bits |= lax.bitcast_convert_type(other, integer) & ~chosen
    return lax.bitcast_convert_type(bits, x.dtype)


def clear(mask: MaskArray, x: Array) -> Array:
    """Set an array to zero where a mask is False; see `select`.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import clearing
      >>> mask, x = jnp.array([True, False]), jnp.array([1.0, jnp.nan])
      >>> clearing.clear(mask, x).tolist()
      [1.0, 0.0]
    """
    return select(mask, x, jnp.zeros_like(x))


def clear_tree(tree: PyTree, masks: Masks) -> PyTree:
    """Set the leaves of a tree to zero where their masks are False.

    Args:
      tree: tree of arrays.
      masks: tree with the same paths; `optax.MaskedNode()` leaves an array as it is.

    Returns:
      The tree.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import clearing
      >>> masks = {"w": jnp.array([True, False])}
      >>> clearing.clear_tree({"w": jnp.ones(2)}, masks)["w"].tolist()
      [1.0, 0.0]
    """
    return map_held(lambda x, mask: clear(mask, x), tree, masks, otherwise=lambda x: x)


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
      >>> from nmjax.transforms import clearing
      >>> updates = {"w": jnp.array([0.5, jnp.inf])}
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> masks = {"w": jnp.array([True, False])}
      >>> clearing.project_updates(updates, params, masks)["w"].tolist()
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
    state: optax.OptState, params: Params, active: Masks, places: list[list[int]]
) -> optax.OptState:
    """Set an optimizer's moments to zero where weights are not active.

    Args:
      state: the optimizer's state.
      params: the params it was made for.
      active: masks of the moments to keep.
      places: where the moments of every param are; see `find_moments`.

    Returns:
      The state.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nmjax.transforms import clearing
      >>> params, masks = {"w": jnp.ones(2)}, {"w": jnp.array([True, False])}
      >>> tx = optax.trace(0.9)
      >>> _, state = tx.update(params, tx.init(params), params)
      >>> places = clearing.find_moments(tx, state, params, masks)
      >>> clearing.reset_moments(state, params, masks, places).trace["w"].tolist()
      [1.0, 0.0]
    """
    leaves, treedef = jax.tree.flatten(state)
    masks = matching_leaves(named_leaves(params)[0], active)
    for mask, of_leaf in zip(masks, places, strict=True):
        for place in of_leaf:
            leaves[place] = clear(mask, leaves[place])
    return jax.tree.unflatten(treedef, leaves)


def find_moments(
    inner: optax.GradientTransformation,
    state: optax.OptState,
    params: Params,
    masks: Masks,
) -> list[list[int]]:
    """Find the moments of every param that has a mask.

    Every array of the state that stands for a param and has its shape is a moment.
    Others, such as adafactor's factored moments, are not.

    Args:
      inner: the optimizer.
      state: its state.
      params: the params it was made for.
      masks: tree of masks.

    Returns:
      For every leaf of `params`, the places of its moments among the leaves of the
      state.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> from nmjax.transforms import clearing
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
      >>> tx = optax.adam(0.1)
      >>> state, masks = tx.init(params), jax.tree.map(lambda p: p > 0, params)
      >>> clearing.find_moments(tx, state, params, masks)  # of count, mu and nu
      [[1, 3], [2, 4]]
    """
    pairs, treedef = named_leaves(params)
    shapes = [
        None if is_masked(leaf) or is_masked(mask) else jnp.shape(mask)
        for (_, leaf), mask in zip(pairs, matching_leaves(pairs, masks), strict=True)
    ]
    marked = optax.tree.map_params(
        inner,
        lambda moment, i: moment if moment is None or is_masked(moment) else i,
        state,
        jax.tree.unflatten(treedef, range(len(pairs))),
        transform_non_params=lambda _: -1,
        is_leaf=lambda leaf: leaf is None or is_masked(leaf),
    )
    places: list[list[int]] = [[] for _ in pairs]
    marks, leaves = jax.tree.leaves(marked), jax.tree.leaves(state)
    for place, (i, leaf) in enumerate(zip(marks, leaves, strict=True)):
        if i >= 0 and jnp.shape(leaf) == shapes[i]:
            places[i].append(place)
    return places


def find_restless(
    update: Callable[..., optax.OptState],
    grads: PyTree,
    state: optax.OptState,
    params: Params,
    places: list[list[int]],
) -> list[list[int]]:
    """Find the moments that may leave zero where gradient, moments and param are zero.

    Args:
      update: ``(grads, state, params) -> state`` of the optimizer.
      grads: tree of gradients.
      state: the optimizer's state.
      params: the params it was made for.
      places: where the moments of every param are; see `find_moments`.

    Returns:
      The places among these that `nmjax.transforms.zeros` is not sure of.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from nmjax.transforms import clearing
      >>> def restless(tx):
      ...     params, masks = {"w": jnp.ones((2, 2))}, {"w": jnp.eye(2) > 0}
      ...     state, update = tx.init(params), lambda *args: tx.update(*args)[1]
      ...     places = clearing.find_moments(tx, state, params, masks)
      ...     return clearing.find_restless(update, params, state, params, places)
      >>> restless(optax.trace(0.9))
      [[]]
      >>> restless(optax.chain(optax.centralize(), optax.trace(0.9)))
      [[0]]
    """
    pairs, _ = named_leaves(params)
    owners = {place: i for i, of_leaf in enumerate(places) for place in of_leaf}

    def marks(tree: PyTree) -> list[int | None]:
        return [
            i if places[i] else None
            for i, leaf in enumerate(matching_leaves(pairs, tree))
            for _ in jax.tree.leaves(leaf)
        ]

    size = len(jax.tree.leaves(state))
    found = stay_zero(
        update,
        (grads, state, params),
        [*marks(grads), *(owners.get(at) for at in range(size)), *marks(params)],
    )
    return [
        [place for place in of_leaf if found[place] not in (i, EVERYWHERE)]
        for i, of_leaf in enumerate(places)
    ]


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
      >>> from nmjax.transforms import clearing
      >>> params = {"a": jnp.ones(2), "b": jnp.ones(3)}
      >>> masks = {"a": jnp.array([True, False]), "b": optax.MaskedNode()}
      >>> count = lambda p, mask: int(mask.sum())
      >>> clearing.map_held(count, params, masks, otherwise=lambda p: p.size)
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
