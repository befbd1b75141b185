"""Path names of leaves: one spelling for every kind of tree.

A path is the keys from the root to the leaf, joined by ``/``. Boxes around a
leaf (an `nnx.Variable` in an `nnx.State`, linen's `Partitioned`) add nothing,
so that the same layer has the same name in a linen dict, in an `nnx.State`
and with partitioning metadata.
"""

from collections.abc import Sequence
from typing import Any

import jax
import optax
from jaxtyping import PyTree


def is_masked(leaf: Any) -> bool:
    """Tell whether a leaf is the placeholder `optax.MaskedNode()`."""
    return isinstance(leaf, optax.MaskedNode)


def path_name(key_path: Sequence[Any]) -> str:
    """Join a JAX key path with slashes, leaving out the box around a leaf.

    Args:
      key_path: a key path as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
      For example ``"params/Dense_0/kernel"``, ``"layers/0/kernel"`` or ``"0/1"``.

    Example:
      >>> import jax
      >>> from nmjax import paths
      >>> tree = {"layers": [{"kernel": 1.0}]}
      >>> [(key_path, _)], _ = jax.tree_util.tree_flatten_with_path(tree)
      >>> paths.path_name(key_path)
      'layers/0/kernel'
    """
    if key_path and key_path[-1] == jax.tree_util.GetAttrKey("value"):
        key_path = key_path[:-1]
    return jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")


def named_leaves(tree: PyTree) -> tuple[list[tuple[str, Any]], Any]:
    """Flatten a tree into (path, leaf) pairs, keeping `MaskedNode` as leaves.

    Args:
      tree: any pytree.

    Returns:
      The pairs in the tree's order, and the treedef that rebuilds the tree
      from a list of leaves.

    Raises:
      ValueError: two leaves have the same path name.

    Example:
      >>> from nmjax import paths
      >>> pairs, treedef = paths.named_leaves({"a": 1, "b": (2, 3)})
      >>> [path for path, _ in pairs]
      ['a', 'b/0', 'b/1']
    """
    flat, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_masked)
    pairs = [(path_name(key_path), leaf) for key_path, leaf in flat]
    seen: set[str] = set()
    for path, _ in pairs:
        if path in seen:
            raise ValueError(
                f"two leaves have the path name {path!r}: a key with a slash in it "
                "reads like a nested key. Rename one of them."
            )
        seen.add(path)
    return pairs, treedef
