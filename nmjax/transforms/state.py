"""Find what the forward pass needs in any nesting of optimizer states.

A transform that holds masks has a state with a field `masks`; one that changes
between dense and sparse training has a field `sparse`. Wrappers of optax and flax
(`optax.chain`, `optax.MultiSteps`, `optax.masked`, `optax.partition`,
`optax.inject_hyperparams`, `optax.apply_if_finite`, `TrainState`) nest such states;
the two functions of this module look through all of them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Bool, PyTree

from nmjax.paths import is_masked
from nmjax.typing import Masks


def masks(state: PyTree) -> Masks:
    """Find the masks that a transform keeps in its state.

    The result fits `nm.sparsify`, `nm.apply_masks` and `nm.project`. Where several
    transforms keep masks (`optax.partition`), each leaf's mask comes from the one
    that has it.

    Args:
      state: optimizer state, in any nesting; also a whole flax `TrainState`.

    Returns:
      Mask tree with the structure of the params: bool arrays, True = kept, and
      `optax.MaskedNode()` at leaves that stay dense.

    Raises:
      ValueError: no transform in the state keeps masks, or two keep a mask for the
        same leaf.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.array([[1.0], [2.0], [3.0], [4.0]])}
      >>> tx = nm.srste(nm.plan(params, {"kernel": nm.NM(2, 4)}), refresh=10)
      >>> nm.masks(tx.init(params))["kernel"][:, 0].tolist()
      [False, False, True, True]
    """
    found = [value for value in _fields(state, "masks") if not is_masked(value)]
    if not found:
        raise ValueError(
            "no transform keeps masks in this state. Masks of a stateless transform "
            "are recomputed from the params: use nm.compute_masks(params, plan), or "
            "keep them with nm.srste(plan, refresh=k)."
        )
    merged = found[0]
    for other in found[1:]:
        merged = jax.tree.map(_merge, merged, other, is_leaf=is_masked)
    return merged


def sparse_phase(state: PyTree) -> Bool[jax.Array, "..."]:
    """Tell whether the next forward pass is sparse.

    Meant for `nm.sparsify(params, plan, active=nm.sparse_phase(state))` with the
    state from before the step.

    Args:
      state: optimizer state, in any nesting; also a whole flax `TrainState`.

    Returns:
      Bool scalar: True in the sparse phase, False in a dense warm-up or a dense
      fine-tuning. (A state that was made under `jax.vmap` gives one per seed.)

    Raises:
      ValueError: no transform in the state has phases, or there are several.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.array([[1.0], [2.0], [3.0], [4.0]])}
      >>> tx = nm.srste(nm.plan(params, {"kernel": nm.NM(2, 4)}), start=100)
      >>> bool(nm.sparse_phase(tx.init(params)))
      False
    """
    found = [
        jnp.asarray(flag)
        for value in _fields(state, "sparse")
        for flag in jax.tree.leaves(value)
    ]
    if not found:
        raise ValueError(
            "no transform in this state has phases: training is sparse throughout. "
            "Leave `active` out, or give nm.srste a start or a stop."
        )
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} transforms in this state have phases: call "
            "nm.sparse_phase with the state of one of them."
        )
    return found[0]


def _is_named_tuple(node: Any) -> bool:
    return isinstance(node, tuple) and hasattr(node, "_fields")


def _fields(tree: PyTree, name: str) -> list[Any]:
    """Collect the values of a field from all named tuples of a tree."""
    found = []
    for node in jax.tree.leaves(tree, is_leaf=_is_named_tuple):
        if not _is_named_tuple(node):
            continue
        for field in node._fields:
            value = getattr(node, field)
            found += [value] if field == name else _fields(value, name)
    return found


def _merge(left: Any, right: Any) -> Any:
    if is_masked(left):
        return right
    if not is_masked(right):
        raise ValueError(
            "two transforms in this state keep a mask for the same leaf: call "
            "nm.masks with the state of one of them."
        )
    return left
