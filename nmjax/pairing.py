"""Pairing: the leaves of several trees, side by side under their path names.

Functions that measure or combine masks read their trees through this module, so that
trees which do not fit each other are refused in the same words everywhere.
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import PyTree

from nmjax.paths import is_masked, named_leaves
from nmjax.typing import Masks, Params


def pair(**trees: PyTree) -> dict[str, tuple[Any, ...]]:
    """Pair the leaves of trees by path; the arrays of the last tree decide which.

    Args:
      **trees: name for messages -> tree; `optax.MaskedNode` leaves do not count.

    Returns:
      Path -> its leaves, one of each tree.

    Raises:
      ValueError: the last tree has no array, or another tree lacks one of its leaves
        or has another shape there.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import pairing
      >>> pairs = pairing.pair(old={"w": jnp.ones(2), "b": 1}, new={"w": jnp.zeros(2)})
      >>> [(path, new.tolist()) for path, (old, new) in pairs.items()]
      [('w', [0.0, 0.0])]
    """
    named = {
        name: {
            path: leaf for path, leaf in named_leaves(tree)[0] if not is_masked(leaf)
        }
        for name, tree in trees.items()
    }
    *others, last = named
    if not named[last]:
        raise ValueError(f"{last} has no array: every leaf is optax.MaskedNode()")
    for path, leaf in named[last].items():
        for name in others:
            if path not in named[name]:
                raise ValueError(f"{leaf_name(path)} is in {last} but not in {name}")
            if jnp.shape(named[name][path]) != jnp.shape(leaf):
                raise ValueError(
                    f"{leaf_name(path)} has shape {jnp.shape(named[name][path])} in "
                    f"{name} but {jnp.shape(leaf)} in {last}"
                )
    return {path: tuple(named[name][path] for name in named) for path in named[last]}


def pair_masks(old: Masks, new: Masks) -> dict[str, tuple[Any, ...]]:
    """Pair masks by path; neither tree may have one more.

    Args:
      old: a bool array or a tree of them.
      new: another one, of the same paths and shapes.

    Returns:
      Path -> old mask and new mask.

    Raises:
      TypeError: a mask is not bool.
      ValueError: the masks differ in paths or shapes.
    """
    pair(new=new, old=old)
    leaves = pair(old=old, new=new)
    for path, masks in leaves.items():
        for mask in masks:
            check_bool(path, mask)
    return leaves


def pair_params(params: Params, masks: Masks) -> dict[str, tuple[Any, ...]]:
    """Pair every mask with its weights.

    Args:
      params: an array or a tree of them; leaves without a mask are left out.
      masks: bool array, or a tree of them with the paths of `params`.

    Returns:
      Path -> weights and mask.

    Raises:
      TypeError: a mask is not bool.
      ValueError: masks and params differ in paths or shapes.
    """
    leaves = pair(params=params, masks=masks)
    for path, (_, mask) in leaves.items():
        check_bool(path, mask)
    return leaves


def check_bool(path: str, mask: Any) -> None:
    """Raise a TypeError that names the leaf unless its mask is bool."""
    if jnp.result_type(mask) != jnp.bool_:
        raise TypeError(
            f"mask of {leaf_name(path)} has dtype {jnp.result_type(mask)}, must be bool"
        )


def leaf_name(path: str) -> str:
    """Name a leaf in a message; an array that is the whole tree has no path."""
    return f"leaf {path!r}" if path else "the array"
