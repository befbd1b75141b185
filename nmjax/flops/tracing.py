"""Tracing: count the multiply-accumulates of a function, leaf by leaf.

Nothing is computed. `jax.make_jaxpr` writes down what the function would do, and the
walk through it follows every leaf of the params to the products it takes part in.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import Literal

from nmjax.flops import origins
from nmjax.flops.origins import CONSTANT, DATA, GATE, Origin
from nmjax.paths import is_masked, named_leaves
from nmjax.typing import Params

# Counts by path; what belongs to no leaf is counted under None.
_Counts = Counter[str | None]

# Primitives that lay their first operand out in another shape as a whole...
_MOVES = frozenset(
    "broadcast_in_dim broadcast_to expand_dims pad reshape squeeze tile "
    "transpose".split()
)
# ...or in part, at places that the other operands give.
_CUTS = frozenset({"dynamic_slice", "gather", "slice", "split", "unstack"})
# Same shape in as out, but every entry of the result has seen others.
_MIXES = frozenset(
    "cholesky cumlogsumexp cummax cummin cumprod cumsum fft householder_product lu "
    "sort triangular_solve tridiagonal_solve".split()
)
# What these do with an operand is not written down.
_OPAQUE = frozenset({"call_exported", "ffi_call", "io_callback", "pure_callback"})


@dataclasses.dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one call; made by `macs`.

    Attributes:
      leaves: path name, as in the plan, -> MACs of the products with that leaf.
      other: MACs of products that belong to no one leaf: between activations, as in
        attention, and between two leaves.
    """

    leaves: Mapping[str, int]
    other: int

    @property
    def total(self) -> int:
        """MACs of all products."""
        return sum(self.leaves.values()) + self.other


def macs(fn: Callable[..., Any], params: Params, *args: Any) -> Macs:
    r"""Count the multiply-accumulates that a function spends on each leaf of params.

    `dot_general` (what `@`, `einsum` and Dense layers become) with :math:`n` results,
    each a sum of :math:`k` products, counts :math:`n k`. A convolution counts the
    weights that one output sees times its outputs; positions in the zero padding
    count, zeros that a transposed convolution puts between its inputs do not.
    Everything else counts nothing: additions, norms, activations, lookups of
    embeddings.

    A leaf is followed

    - where its entries are moved, cast, broadcast, cut out at fixed places, or
      concatenated;
    - through elementwise arithmetic with constants, with masks, and with params of
      fewer entries, such as the leaf's own mean or a gain per channel: so through
      `nm.sparsify` and weight standardisation;
    - into `jax.jit`, `jax.checkpoint`, functions with custom derivatives, `lax.cond`
      and `lax.switch` (the branch with the most MACs counts) and `lax.scan`, where a
      body counts once for each turn and stacked layers belong to their one leaf.

    A leaf that is used twice counts twice. What is computed from `args` is data and
    no leaf any more; a product of two pieces of data, of two leaves, or with a sum of
    two leaves of one size, counts as `other`. Lists, flags and other settings of
    `fn` do not belong into `args`: close over them. Arrays that are inputs do.

    Args:
      fn: a function of params and args, for example ``model.apply``.
      params: tree of arrays or of `jax.ShapeDtypeStruct`.
      *args: more trees of arrays or `jax.ShapeDtypeStruct`. The counts are those of
        the whole batch: give a batch of 1 to have them for one example.

    Returns:
      A `Macs`, with exact integers; a leaf without a product has 0.

    Raises:
      ValueError: there is a product in a `lax.while_loop`, whose number of turns is
        not known, or in an operation that the walk cannot look into, such as
        `jax.shard_map` or a Pallas kernel; or a leaf is given to a callback or a
        foreign function.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nmjax import flops
      >>> def fn(params, x):
      ...     return jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> params = {"in": jnp.ones((16, 32)), "out": jnp.ones((32, 10))}
      >>> flops.macs(fn, params, jax.ShapeDtypeStruct((1, 16), jnp.float32))
      Macs(leaves={'in': 512, 'out': 320}, other=0)
    """
    traced = jax.make_jaxpr(fn)(params, *args).jaxpr
    pairs = [pair for pair in named_leaves(params)[0] if not is_masked(pair[1])]
    known = [origins.of_leaf(path, math.prod(np.shape(leaf))) for path, leaf in pairs]
    given = known + [
        GATE if var.aval.dtype == np.bool_ else DATA
        for var in traced.invars[len(known) :]
    ]
    _, counts = _walk(traced, given)
    return Macs({path: counts[path] for path, _ in pairs}, counts[None])


def _walk(jaxpr: Any, given: Sequence[Origin]) -> tuple[list[Origin], _Counts]:
    """Follow origins through a jaxpr; give those of its results, and the counts."""
    jaxpr = _open(jaxpr)
    known = dict.fromkeys(jaxpr.constvars, CONSTANT)
    known.update(zip(jaxpr.invars, given, strict=True))

    def look_up(atom: Any) -> Origin:
        return CONSTANT if isinstance(atom, Literal) else known[atom]

    counts: _Counts = Counter()
    for eqn in jaxpr.eqns:
        results, found = _step(eqn, [look_up(atom) for atom in eqn.invars])
        counts.update(found)
        known.update(zip(eqn.outvars, results, strict=True))
    return [look_up(atom) for atom in jaxpr.outvars], counts


def _step(eqn: Any, given: list[Origin]) -> tuple[list[Origin], _Counts]:
    """Follow one equation."""
    name = eqn.primitive.name
    if name == "dot_general" or name == "conv_general_dilated":
        cost = _dot_macs(eqn) if name == "dot_general" else _conv_macs(eqn)
        # No mask any more, even where a one-hot array met a leaf.
        data = any(origin.data for origin in given)
        result = DATA if data else origins.mix(given, _size(eqn.outvars[0]))
        return [result], _owners(given, cost)
    if name == "scan":
        return _scan(eqn, given)
    if name == "while":
        return _while(eqn, given)
    if name == "cond":
        return _cond(eqn, given)
    inner = _callee(eqn)
    if inner is not None:
        return _walk(inner, given)
    if _multiplies(eqn) or (name in _OPAQUE and any(o.parts for o in given)):
        raise ValueError(
            f"fn multiplies inside {name!r}, which cannot be looked into; count a form "
            "of fn that does without it"
        )
    if name == "optimization_barrier":
        return given, Counter()
    return [_ordinary(eqn, given, out) for out in eqn.outvars], Counter()


def _ordinary(eqn: Any, given: list[Origin], out: Any) -> Origin:
    """Give the origin of a result that no product makes."""
    name, size = eqn.primitive.name, _size(out)
    sizes = [_size(atom) for atom in eqn.invars]
    if name in _CUTS:
        # What data picks, such as a row of an embedding, is data.
        picked = any(origin.data for origin in given[1:])
        result = DATA if picked else origins.move(given[0], size, cuts=size < sizes[0])
    elif name in _MOVES:
        result = origins.move(given[0], size)
    elif name in ("concatenate", "stack"):
        result = origins.join_along(given, sizes)
    elif name not in _MIXES and all(_fits(atom, out) for atom in eqn.invars):
        result = origins.combine(given, sizes)
    else:
        result = origins.mix(given, size)
    if getattr(out.aval, "dtype", None) == np.bool_:
        return GATE if result.data else CONSTANT
    return result


def _owners(given: list[Origin], cost: int) -> _Counts:
    """Say to which leaves the cost of one product belongs."""
    named = [origin for origin in given if origin.parts]
    if len(named) == 1:
        total = sum(count for _, count in named[0].parts)
        shares = Counter[str | None]()
        shares.update({path: cost * n // total for path, n in named[0].parts})
        return shares
    if all(origin == CONSTANT for origin in given):
        return Counter()  # done once, when the program is compiled
    return Counter({None: cost})


def _dot_macs(eqn: Any) -> int:
    (contracted, _), _ = eqn.params["dimension_numbers"]
    lhs = eqn.invars[0].aval.shape
    return _size(eqn.outvars[0]) * math.prod(lhs[axis] for axis in contracted)


def _conv_macs(eqn: Any) -> int:
    """Count the pairs of an output and a weight it sees."""
    numbers, params = eqn.params["dimension_numbers"], eqn.params
    kernel = [eqn.invars[1].aval.shape[axis] for axis in numbers.rhs_spec]
    out = [eqn.outvars[0].aval.shape[axis] for axis in numbers.out_spec]
    # Kernel: outputs, inputs of a group, space. Result: batch, features, space.
    pairs = out[0] * out[1] * kernel[1]
    for axis, gap in enumerate(params["lhs_dilation"]):
        first = params["padding"][axis][0]
        # Of a dilated input, only every gap-th position is no inserted zero.
        at = np.arange(out[2 + axis]) * params["window_strides"][axis] - first
        taps = np.arange(kernel[2 + axis]) * params["rhs_dilation"][axis]
        pairs *= int(np.sum((at[:, None] + taps) % gap == 0))
    return pairs


def _scan(eqn: Any, given: list[Origin]) -> tuple[list[Origin], _Counts]:
    """Follow a scan: its carry until it settles, its body once for each turn."""
    body, length = _open(eqn.params["jaxpr"]), eqn.params["length"]
    # What is scanned over has one axis more outside than inside.
    scanned = sum(map(_loses_axis, eqn.invars, body.invars))
    carried = len(body.outvars) - sum(map(_loses_axis, eqn.outvars, body.outvars))
    held = len(given) - scanned - carried
    slices = [
        origins.move(origin, _size(var))
        for origin, var in zip(
            given[held + carried :], body.invars[held + carried :], strict=True
        )
    ]
    results, counts = _settle(
        lambda carry: _walk(body, [*given[:held], *carry, *slices]),
        given[held : held + carried],
    )
    stacked = [
        dataclasses.replace(origin, entries=origin.entries * length)
        for origin in results[carried:]
    ]
    turns = Counter({key: count * length for key, count in counts.items()})
    return results[:carried] + stacked, turns


def _while(eqn: Any, given: list[Origin]) -> tuple[list[Origin], _Counts]:
    """Follow a while loop without products."""
    first, second = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    held = given[first : first + second]
    results, counts = _settle(
        lambda carry: _walk(eqn.params["body_jaxpr"], [*held, *carry]),
        given[first + second :],
    )
    _, more = _walk(eqn.params["cond_jaxpr"], [*given[:first], *results])
    for path in counts + more:
        whose = "activations" if path is None else f"leaf {path!r}"
        raise ValueError(
            f"fn multiplies {whose} inside lax.while_loop, whose number of turns is "
            "not known; use lax.scan, or lax.fori_loop with fixed bounds"
        )
    return results, Counter()


def _settle(
    body: Callable[[list[Origin]], tuple[list[Origin], _Counts]], carry: list[Origin]
) -> tuple[list[Origin], _Counts]:
    """Walk a body until its carry goes in as it comes out."""
    while True:
        results, counts = body(carry)
        after = [
            origins.either(a, b)
            for a, b in zip(carry, results[: len(carry)], strict=True)
        ]
        if after == carry:
            return carry + results[len(carry) :], counts
        carry = after


def _cond(eqn: Any, given: list[Origin]) -> tuple[list[Origin], _Counts]:
    """Follow all branches; count the dearest."""
    walks = [_walk(branch, given[1:]) for branch in eqn.params["branches"]]
    results, _ = walks[0]
    for others, _ in walks[1:]:
        results = [origins.either(a, b) for a, b in zip(results, others, strict=True)]
    return results, max((counts for _, counts in walks), key=Counter.total)


def _callee(eqn: Any) -> Any:
    """Give the jaxpr that an equation just calls, as jit and checkpoint do."""
    for inner in eqn.params.values():
        opened = _open(inner)
        if hasattr(opened, "eqns") and all(
            list(map(_shape, outside)) == list(map(_shape, inside))
            for outside, inside in (
                (eqn.invars, opened.invars),
                (eqn.outvars, opened.outvars),
            )
        ):
            return inner
    return None


def _multiplies(eqn: Any) -> bool:
    """Tell whether an equation holds a product."""
    name = eqn.primitive.name
    if "dot" in name or "matmul" in name or name.startswith("conv_"):
        return True
    return any(
        _multiplies(inner)
        for value in eqn.params.values()
        for jaxpr in (value if isinstance(value, tuple | list) else (value,))
        if hasattr(_open(jaxpr), "eqns")
        for inner in _open(jaxpr).eqns
    )


def _open(jaxpr: Any) -> Any:
    """Take the constants of a closed jaxpr off."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def _shape(atom: Any) -> tuple[int, ...] | None:
    return getattr(atom.aval, "shape", None)


def _size(atom: Any) -> int:
    return math.prod(_shape(atom) or ())


def _loses_axis(outer: Any, inner: Any) -> bool:
    return _shape(outer) != _shape(inner)


def _fits(atom: Any, out: Any) -> bool:
    """Tell whether an operand is a scalar or broadcasts to the result as it is."""
    shape, wanted = _shape(atom) or (), _shape(out) or ()
    return not shape or (
        len(shape) == len(wanted)
        and all(a in (1, b) for a, b in zip(shape, wanted, strict=True))
    )
