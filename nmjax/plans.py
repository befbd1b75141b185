"""Plans: a pattern for every leaf of a params tree, static and printable.

`nm.plan` (in `nmjax.planning`) makes a plan; `nmjax.projection` applies it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

from nmjax.budgets import Unstructured
from nmjax.paths import is_masked, named_leaves
from nmjax.patterns import Dense, Pattern
from nmjax.typing import Params


@dataclasses.dataclass(frozen=True)
class LeafPlan:
    """What one leaf holds.

    Attributes:
      path: path name, for example ``"params/Dense_0/kernel"``.
      shape: shape of the leaf.
      pattern: its pattern; `Dense()` for leaves that stay dense.
      budget: weights that one layer may keep; None where the pattern fixes it or
        all leaves share one budget.
      reason: why it holds this pattern, or why it stays dense.
      stacked: number of leading axes that count layers.
      limits: for a leaf that shares a budget with others, the least and the largest
        number of weights it may keep; else None.
    """

    path: str
    shape: tuple[int, ...]
    pattern: Pattern
    budget: int | None
    reason: str
    stacked: int = 0
    limits: tuple[int, int] | None = None

    @property
    def is_sparse(self) -> bool:
        """Whether the leaf holds a pattern."""
        return not isinstance(self.pattern, Dense)

    @property
    def layer_shape(self) -> tuple[int, ...]:
        """Shape of one layer, without the axes that count layers."""
        return self.shape[self.stacked :]

    @property
    def layers(self) -> int:
        """Number of layers stacked in the leaf."""
        return math.prod(self.shape[: self.stacked])

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)

    @property
    def is_global(self) -> bool:
        """Whether the leaf competes with others for one budget."""
        return (
            isinstance(self.pattern, Unstructured)
            and self.budget is None
            and self.pattern.density is None
        )

    @property
    def count(self) -> int | None:
        """Number of weights kept; None where all leaves share one budget."""
        if self.is_global:
            return None
        return self.layers * self.pattern.kept(self.layer_shape, self.budget)

    @property
    def density(self) -> float | None:
        """Kept fraction; None where all leaves share one budget."""
        return None if self.count is None else self.count / max(1, self.size)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A pattern for every leaf of one params tree; made by `nm.plan`.

    Static and hashable: it can be closed over, or passed through `jax.jit`, where
    it is a pytree without leaves. `print(plan)` shows a table.

    Attributes:
      leaves: one `LeafPlan` per leaf, in the tree's order.
      global_budget: weights that all leaves with a shared budget keep together.
    """

    leaves: tuple[LeafPlan, ...]
    global_budget: int | None = None

    @functools.cached_property
    def by_path(self) -> Mapping[str, LeafPlan]:
        """The leaf plans by path name."""
        return {leaf.path: leaf for leaf in self.leaves}

    @property
    def sparse_leaves(self) -> tuple[LeafPlan, ...]:
        """The leaves that hold a pattern."""
        return tuple(leaf for leaf in self.leaves if leaf.is_sparse)

    @property
    def size(self) -> int:
        """Number of weights in sparse leaves."""
        return sum(leaf.size for leaf in self.sparse_leaves)

    @property
    def count(self) -> int:
        """Number of weights kept in sparse leaves."""
        counts = [leaf.count for leaf in self.sparse_leaves]
        return sum(c for c in counts if c is not None) + (self.global_budget or 0)

    @property
    def density(self) -> float:
        """Kept fraction of the sparse leaves."""
        return self.count / self.size

    @property
    def total_size(self) -> int:
        """Number of weights in all leaves, dense ones too."""
        return sum(leaf.size for leaf in self.leaves)

    @property
    def total_density(self) -> float:
        """Kept fraction of all leaves, dense ones too."""
        return 1.0 - (self.size - self.count) / self.total_size

    def __str__(self) -> str:
        """Show the plan as a table."""
        rows = [("path", "shape", "pattern", "density", "reason")]
        for leaf in self.leaves:
            shape = "×".join(str(d) for d in leaf.shape) or "scalar"
            if leaf.stacked:
                shape += f" ({leaf.layers} layers)"
            density = _shared(leaf) if leaf.density is None else f"{leaf.density:.4g}"
            rows.append((leaf.path, shape, str(leaf.pattern), density, leaf.reason))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join([c.ljust(w) for c, w in zip(row[:4], widths, strict=True)])
            + "  "
            + row[4]
            for row in rows
        ]
        lines.insert(1, "-" * max(len(line) for line in lines))
        lines.append(
            f"{len(self.sparse_leaves)} of {len(self.leaves)} leaves sparse: "
            f"{self.count:,} of {self.size:,} weights kept, density {self.density:.4g} "
            f"({self.total_density:.4g} of all {self.total_size:,} weights)"
        )
        return "\n".join(line.rstrip() for line in lines)


jax.tree_util.register_static(Plan)


def map_planned(
    fn: Callable[..., Any],
    plan: Plan,
    params: Params,
    *rest: PyTree,
    otherwise: Callable[..., Any] = lambda leaf, *_: leaf,
) -> PyTree:
    """Map over the leaves of a tree together with what the plan says of them.

    Args:
      fn: called as ``fn(leaf_plan, leaf, *rest_leaves)`` for sparse leaves.
      plan: a plan made for these params.
      params: the tree. `optax.MaskedNode` leaves, as `optax.masked` and
        `optax.partition` put them, are passed through.
      *rest: trees with the same paths, `optax.MaskedNode` allowed at any leaf.
      otherwise: called as ``otherwise(leaf, *rest_leaves)`` for dense leaves.

    Returns:
      A tree with the structure of `params`.

    Raises:
      ValueError: the plan was made for other params, or a tree of `rest` has other
        paths.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import plans
      >>> params = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}
      >>> plan = nm.plan(params, nm.NM(2, 4))
      >>> sizes = plans.map_planned(lambda leaf, p: leaf.count, plan, params)
      >>> sizes["kernel"]
      16
    """
    pairs, treedef = named_leaves(params)
    check_plan(plan, pairs)
    others = [matching_leaves(pairs, tree) for tree in rest]
    out = []
    for i, (path, leaf) in enumerate(pairs):
        if is_masked(leaf):
            out.append(leaf)
            continue
        leaf_plan = plan.by_path[path]
        extra = [leaves[i] for leaves in others]
        out.append(
            fn(leaf_plan, leaf, *extra)
            if leaf_plan.is_sparse
            else otherwise(leaf, *extra)
        )
    return jax.tree.unflatten(treedef, out)


def check_plan(plan: Plan, pairs: list[tuple[str, Any]]) -> None:
    """Raise unless a plan was made for a tree of these leaves.

    Args:
      plan: the plan.
      pairs: (path, leaf) pairs as `nmjax.paths.named_leaves` gives them.

    Raises:
      ValueError: a leaf is unknown to the plan, missing, or of another shape.
    """
    for path, leaf in pairs:
        if is_masked(leaf):
            continue
        planned = plan.by_path.get(path)
        if planned is None:
            raise ValueError(
                f"leaf {path!r} is not in the plan{_prefix_hint(plan, path)}. "
                "A plan serves the tree it was made for: make one with "
                "nm.plan(params, ...) from these params"
            )
        if planned.shape != jnp.shape(leaf):
            raise ValueError(
                f"leaf {path!r} has shape {jnp.shape(leaf)}, the plan was made for "
                f"shape {planned.shape}"
            )
    present = {path for path, _ in pairs}
    masked = [path for path, leaf in pairs if is_masked(leaf)]
    for planned in plan.leaves:
        if planned.path not in present and not _is_below(planned.path, masked):
            raise ValueError(
                f"the plan knows a leaf {planned.path!r} that these params do not "
                "have; the plan was made for other params"
            )


def matching_leaves(pairs: list[tuple[str, Any]], tree: PyTree) -> list[Any]:
    """Give the leaves of another tree in the order of `pairs`.

    Args:
      pairs: (path, leaf) pairs as `nmjax.paths.named_leaves` gives them.
      tree: a tree with the same paths.

    Returns:
      Its leaves; `optax.MaskedNode()` below a masked node of it, and where a masked
      leaf of `pairs` has none.

    Raises:
      ValueError: a leaf has no counterpart in the other tree.
    """
    found = dict(named_leaves(tree)[0])
    paths = {path for path, _ in pairs}
    masked = [path for path, leaf in found.items() if is_masked(leaf)]
    for path, leaf in found.items():
        if path not in paths and not is_masked(leaf):
            raise ValueError(f"leaf {path!r} has no counterpart in the params")
    leaves = []
    for path, leaf in pairs:
        known = path in found or is_masked(leaf) or _is_below(path, masked)
        if not known:
            raise ValueError(f"leaf {path!r} of the params is missing in a given tree")
        leaves.append(found.get(path, optax.MaskedNode()))
    return leaves


def _shared(leaf: LeafPlan) -> str:
    """Name the density of a leaf that competes for a budget."""
    if leaf.limits is None or leaf.limits == (0, leaf.size):
        return "shared"
    low, high = (count / max(1, leaf.size) for count in leaf.limits)
    return f"{low:.4g} to {high:.4g}"


def _is_below(path: str, masked: list[str]) -> bool:
    """Tell whether a masked node stands for a subtree with this leaf."""
    return any(above == "" or path.startswith(above + "/") for above in masked)


def _prefix_hint(plan: Plan, path: str) -> str:
    """Point out a tree given one level too high or too low."""
    for known in plan.by_path:
        if known.endswith("/" + path):
            return f" (it has {known!r}: the plan was made for the tree around these)"
        if path.endswith("/" + known):
            return f" (it has {known!r}: the plan was made for a tree inside these)"
    return ""
