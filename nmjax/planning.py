"""Planning: decide which leaf of a params tree holds which pattern, and why.

What counts as a weight by default: a floating point leaf of rank 2 or more (layer
axes of stacked layers not counted) whose own name is ``kernel``, as all Flax
layers call it; in tuples and lists, where leaves have no name, the rank decides.
Embeddings, biases and norm scales are left dense.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import jax.numpy as jnp

from nmjax import distributions
from nmjax.budgets import Channel, FanIn, Unstructured
from nmjax.distributions import Distribution
from nmjax.paths import is_masked, named_leaves
from nmjax.patterns import (
    NM,
    VNM,
    Dense,
    Pattern,
    TransposableNM,
    fan_in_axes,
    fixed_density,
)
from nmjax.plans import LeafPlan, Plan
from nmjax.typing import Params

Rules: TypeAlias = Mapping[Any, Pattern]
Regexes: TypeAlias = str | Sequence[str]

# Sparse tensor cores take no matmul whose outputs are not a multiple of this.
_HARDWARE_OUTPUTS = 8


def plan(
    params: Params,
    pattern_or_rules: Pattern | Rules,
    *,
    skip: Regexes | None = None,
    density: float | Distribution | Mapping[str, float] | None = None,
    stacked: Regexes | None = None,
) -> Plan:
    r"""Decide which leaf holds which pattern.

    With one pattern, every default weight (see the module's text) gets it if it
    fits, and otherwise stays dense with the reason in the table. Hardware patterns
    (`NM`, `TransposableNM`, `VNM`) given this way also leave kernels dense whose
    number of outputs is not a multiple of 8, as sparse tensor cores need: a
    10-class head, say. Name such a leaf in a rule to prune it all the same.

    With rules, an ordered mapping from regex to pattern, the first rule whose regex
    is found in the path (`re.search`) wins; leaves that no rule names stay dense.
    A leaf that a rule names and the pattern cannot fit is an error. The key ``...``
    stands for all default weights that no other rule names, and is as lenient
    as a single pattern.

    Args:
      params: tree of arrays or of `jax.ShapeDtypeStruct`; only paths, shapes and
        dtypes are read. Give the tree that the optimizer will see.
      pattern_or_rules: a pattern, or a mapping from regex (or ``...``) to pattern.
      skip: regex or regexes of paths that stay dense whatever the rules say.
      density: kept fraction for the patterns that need one: a float (uniform), a
        distribution (`nm.erk(0.1)`, ...), or a mapping from regex to float.
        Budgets are integers that add up to the rounded target exactly.
      stacked: regex or regexes of leaves whose first axis counts layers, as
        `nn.scan` and vmapped nnx modules make them; every layer is pruned by itself.

    Returns:
      A static `Plan`.

    Raises:
      TypeError: an argument or rule is of the wrong kind, or a rule names a leaf
        that is not floating point.
      ValueError: a rule, `skip` or `stacked` matches nothing, a leaf named by a rule
        does not fit, a density is missing or has no use, a budget is too small, or
        no leaf at all would be sparse.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {
      ...     "hidden": {"kernel": jnp.ones((16, 32)), "bias": jnp.ones(32)},
      ...     "head": {"kernel": jnp.ones((32, 10))},
      ... }
      >>> plan = nm.plan(params, nm.NM(2, 4))
      >>> [str(leaf.pattern) for leaf in plan.leaves]
      ['dense', 'dense', '2:4 along -2']
      >>> nm.plan(params, {"kernel": nm.Unstructured()}, density=nm.erk(0.2)).count
      166

    Reference:
      The distributions: Evci et al., 2020, arXiv 1911.11134, section 3. The rule of
      hardware shapes: Mishra et al., 2021, arXiv 2104.08378.
    """
    rules, default = _check_rules(pattern_or_rules)
    skips, stacks = _regexes(skip, "skip"), _regexes(stacked, "stacked")
    pairs, _ = named_leaves(params)
    used: set[str] = set()
    leaves = [
        _plan_leaf(path, leaf, rules, default, skips, stacks, used)
        for path, leaf in pairs
        if not is_masked(leaf)
    ]
    _check_used([*rules, *skips, *stacks], used, [leaf.path for leaf in leaves])
    if not any(leaf.is_sparse for leaf in leaves):
        reasons = "\n".join(f"  {leaf.path}: {leaf.reason}" for leaf in leaves[:20])
        raise ValueError(
            f"the plan matches nothing: all {len(leaves)} leaves would stay dense.\n"
            f"{reasons}\nGive rules that name the leaves, as in "
            "nm.plan(params, {'dense.*kernel': nm.NM(2, 4)})"
        )
    return _with_budgets(leaves, density)


def _check_rules(
    given: Pattern | Rules,
) -> tuple[dict[str, Pattern], Pattern | None]:
    """Split rules into those with a regex and the default."""
    if isinstance(given, Pattern) and not isinstance(given, type):
        return {}, given
    if not isinstance(given, Mapping):
        raise TypeError(
            "pattern_or_rules must be a pattern such as nm.NM(2, 4) or a mapping from "
            f"path regex to pattern, got {given!r}"
        )
    rules: dict[str, Pattern] = {}
    for key, pattern in given.items():
        if not isinstance(pattern, Pattern) or isinstance(pattern, type):
            raise TypeError(
                f"unknown rule {key!r}: {pattern!r} is not a pattern such as "
                "nm.NM(2, 4) or nm.Dense()"
            )
        if key is not ...:
            (regex,) = _regexes(key, "rule")
            rules[regex] = pattern
    default = given.get(...)
    if default is not None and list(given)[-1] is not ...:
        raise ValueError(
            "the rule '...' stands for what no other rule names, so it must come last"
        )
    return rules, default


def _regexes(given: Any, what: str) -> tuple[str, ...]:
    """Check one or several regexes."""
    if given is None:
        return ()
    regexes = tuple(given) if isinstance(given, list | tuple) else (given,)
    for regex in regexes:
        if not isinstance(regex, str):
            raise TypeError(f"{what} must be a regex string, got {regex!r}")
        try:
            re.compile(regex)
        except re.error as error:
            raise ValueError(f"{what} {regex!r} is not a regex: {error}") from error
    return regexes


def _first_match(regexes: Any, path: str, used: set[str]) -> str | None:
    """Find the first regex that the path holds, noting every one that it holds."""
    found = [regex for regex in regexes if re.search(regex, path)]
    used.update(found)
    return found[0] if found else None


def _check_used(regexes: list[str], used: set[str], paths: list[str]) -> None:
    for regex in regexes:
        if regex not in used:
            shown = ", ".join(paths[:20]) + (", ..." if len(paths) > 20 else "")
            raise ValueError(f"{regex!r} matches no leaf; the leaves are: {shown}")


def _plan_leaf(path, leaf, rules, default, skips, stacks, used) -> LeafPlan:
    """Choose the pattern of one leaf, its budget still open."""
    shape = tuple(leaf.shape) if hasattr(leaf, "shape") else ()
    is_float = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
    stacked = 1 if _first_match(stacks, path, used) else 0
    layer = shape[stacked:]
    skip, rule = (_first_match(regexes, path, used) for regexes in (skips, rules))

    def dense(reason: str) -> LeafPlan:
        return LeafPlan(path, shape, Dense(), None, reason, stacked)

    if skip is not None:
        return dense(f"skipped by {skip!r}")
    if rule is not None:
        pattern, reason = rules[rule], f"rule {rule!r}"
        if isinstance(pattern, Dense):
            return dense(reason)
        if not is_float:
            raise TypeError(
                f"leaf {path!r}: {reason} names it, but it is not a floating point "
                f"array (dtype {getattr(leaf, 'dtype', type(leaf))})"
            )
    elif default is None or isinstance(default, Dense):
        return dense("no rule names it")
    else:
        pattern, reason = default, "default pattern"
        why = _not_a_weight(path, layer, is_float)
        if why:
            return dense(why)
    if hasattr(pattern, "oriented") and len(layer) >= 2:
        pattern = pattern.oriented(fan_in_axes(path, len(layer)))
    try:
        if math.prod(layer) == 0:
            raise ValueError(f"shape {shape} holds no weights")
        pattern.validate(layer)
        if rule is None:
            _check_hardware(pattern, path, layer)
    except ValueError as error:
        if rule is None:
            return dense(str(error).split(";")[0])
        raise ValueError(
            f"leaf {path!r}: {reason} gives it {pattern}, but "
            f"{str(error).split(';')[0]}. Put a rule for nm.Dense() before it, or "
            f"skip={path!r}"
        ) from None
    return LeafPlan(path, shape, pattern, None, reason, stacked)


def _not_a_weight(path: str, layer: tuple[int, ...], is_float: bool) -> str | None:
    """Say why a leaf is not a weight by default."""
    name = path.rsplit("/", 1)[-1]
    if not is_float:
        return "not floating point"
    if len(layer) < 2:
        return f"rank {len(layer)} is no kernel"
    if name != "kernel" and name and not name.isdigit():
        return f"named {name!r}, not 'kernel'"
    return None


def _check_hardware(pattern: Pattern, path: str, layer: tuple[int, ...]) -> None:
    """Raise for a default hardware pattern on a kernel that tensor cores refuse."""
    if not isinstance(pattern, NM | TransposableNM | VNM):
        return
    fan_in = fan_in_axes(path, len(layer))
    outputs = math.prod(layer[a] for a in range(-len(layer), 0) if a not in fan_in)
    if outputs % _HARDWARE_OUTPUTS:
        raise ValueError(
            f"{outputs} outputs are not a multiple of {_HARDWARE_OUTPUTS}, which "
            "sparse tensor cores need"
        )


def _with_budgets(leaves: list[LeafPlan], density: Any) -> Plan:
    """Give each leaf that needs one its integer budget."""
    open_ = [
        i
        for i, leaf in enumerate(leaves)
        if fixed_density(leaf.pattern) is None
        and getattr(leaf.pattern, "density", None) is None
    ]
    if not open_:
        if density is not None:
            raise ValueError(
                f"density={density!r} has no use: every pattern fixes its own density"
            )
        return _check_budgets(Plan(tuple(leaves)))
    if density is None:
        leaf = leaves[open_[0]]
        raise ValueError(
            f"leaf {leaf.path!r}: {leaf.pattern!r} needs a density; give one, as in "
            "nm.plan(params, pattern, density=nm.erk(0.1))"
        )
    if isinstance(density, Mapping):
        fractions = _mapped_densities([leaves[i] for i in open_], density)
        return _allocate(leaves, open_, fractions, None)
    if not isinstance(density, Distribution):
        density = distributions.uniform(density)
    if density.kind == "global":
        return _global_plan(leaves, open_, density)
    fractions = distributions.densities(
        [_matrix_shape(leaves[i]) for i in open_],
        density.kind,
        density.density,
        [leaves[i].layers for i in open_],
    )
    size = sum(leaves[i].size for i in open_)
    total = distributions.round_half_up(size * density.density)
    return _allocate(leaves, open_, fractions, total)


def _matrix_shape(leaf: LeafPlan) -> tuple[int, ...]:
    """Shape of one layer for ER and ERK, with the heads of attention merged."""
    shape, parts = leaf.layer_shape, leaf.path.split("/")
    if len(shape) == 3 and len(parts) > 1:
        if parts[-2] in ("query", "key", "value"):
            return (shape[0], shape[1] * shape[2])
        if parts[-2] == "out":
            return (shape[0] * shape[1], shape[2])
    return shape


def _mapped_densities(
    leaves: list[LeafPlan], density: Mapping[str, float]
) -> list[float]:
    used: set[str] = set()
    found = [_first_match(density, leaf.path, used) for leaf in leaves]
    _check_used(list(density), used, [leaf.path for leaf in leaves])
    for leaf, regex in zip(leaves, found, strict=True):
        if regex is None:
            raise ValueError(
                f"leaf {leaf.path!r}: no entry of density names it; the entries are "
                f"{list(density)}"
            )
    for regex, value in density.items():
        distributions.check_density(value, f"density[{regex!r}]")
    return [density[regex] for regex in found if regex is not None]


def _allocate(
    leaves: list[LeafPlan], open_: list[int], fractions: list[float], total: int | None
) -> Plan:
    """Round densities to budgets; layers of one stack get equal ones."""
    sizes = [leaves[i].size for i in open_]
    if total is None:
        shares = zip(sizes, fractions, strict=True)
        total = distributions.round_half_up(sum(s * f for s, f in shares))
    budgets: dict[int, int] = {}
    single: list[tuple[int, float]] = []
    for i, fraction in zip(open_, fractions, strict=True):
        leaf = leaves[i]
        if leaf.layers > 1:
            one = distributions.round_half_up(math.prod(leaf.layer_shape) * fraction)
            budgets[i] = one
            total -= one * leaf.layers
        else:
            single.append((i, fraction))
    if single:
        parts = distributions.allocate(
            [leaves[i].size for i, _ in single], [f for _, f in single], total
        )
        budgets.update({i: b for (i, _), b in zip(single, parts, strict=True)})
    planned = list(leaves)
    for i, budget in budgets.items():
        planned[i] = dataclasses.replace(leaves[i], budget=budget)
    return _check_budgets(Plan(tuple(planned)))


def _global_plan(
    leaves: list[LeafPlan], open_: list[int], density: Distribution
) -> Plan:
    for i in open_:
        if not isinstance(leaves[i].pattern, Unstructured):
            raise ValueError(
                f"leaf {leaves[i].path!r}: a global density needs Unstructured leaves, "
                f"got {leaves[i].pattern!r}"
            )
    size = sum(leaves[i].size for i in open_)
    budget = distributions.round_half_up(size * density.density)
    if budget == 0:
        raise ValueError(f"{density!r} keeps none of {size} weights")
    planned, all_limits = list(leaves), []
    for i in open_:
        low, high = (leaves[i].size * limit for limit in density.limits)
        limits = math.ceil(low - 1e-9), math.floor(high + 1e-9)
        planned[i] = dataclasses.replace(leaves[i], limits=limits)
        all_limits.append(limits)
    least, most = map(sum, zip(*all_limits, strict=True))
    if not least <= budget <= most:
        raise ValueError(
            f"{density!r} keeps {budget} of {size} weights, but with the limits "
            f"rounded for every leaf they would be between {least} and {most}"
        )
    return Plan(tuple(planned), budget)


def _check_budgets(plan: Plan) -> Plan:
    """Raise where a budget keeps nothing of a leaf."""
    for leaf in plan.sparse_leaves:
        if leaf.count == 0:
            size, shape = math.prod(leaf.layer_shape), leaf.layer_shape
            least = _least_budget(leaf.pattern, shape)
            needed = Fraction(least, size)
            raise ValueError(
                f"leaf {leaf.path!r} of shape {leaf.shape}: a budget of {leaf.budget} "
                f"of {size} weights keeps nothing as {leaf.pattern}; it needs a "
                f"density of at least {float(needed):.4g} ({least} weights)"
            )
    return plan


def _least_budget(pattern: Pattern, shape: tuple[int, ...]) -> int:
    """Find the smallest budget with which a layer keeps anything."""
    if isinstance(pattern, FanIn):
        return pattern.neurons(shape)
    if isinstance(pattern, Channel):
        return math.prod(shape) // shape[pattern.axis]
    outputs, inputs = getattr(pattern, "outputs", 1), getattr(pattern, "inputs", 1)
    return outputs * inputs
