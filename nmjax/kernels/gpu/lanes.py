"""Code for the single threads of a Pallas kernel.

A Pallas kernel for Mosaic GPU is written for warpgroups. What it has no words for, such
as a gather in which every thread has an address of its own, is written here thread by
thread, inside `plgpu.inline_mgpu`: integers of a thread with Python's operators, truth
values, loops and branches. `memory` has loads and stores, `floats` the rest.

Nothing here can be interpreted: kernels take an equal computation in plain JAX then.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.mosaic.gpu import utils

# The dialects that kernels are written in; jax.extend has none of them.
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector

WARP, WARPGROUP = 32, 128
"""Threads of a warp and of a warpgroup."""

SCALAR = plgpu.Layout.WG_SPLAT(())
"""Type of an integer argument of `plgpu.inline_mgpu`; `Int.given` takes it."""


def _binary(build: Callable[..., Any]) -> Callable[["Int", "Int | int"], "Int"]:
    return lambda a, b: Int(build(a.value, as_int(b).value))


def _comparison(name: str) -> Callable[["Int", "Int | int"], "Truth"]:
    predicate = arith.CmpIPredicate[name]
    return lambda a, b: Truth(arith.cmpi(predicate, a.value, as_int(b).value))


class Int:
    """A 32-bit integer of each thread.

    Quotients, remainders and shifts are those of unsigned integers, ``<`` and ``>=``
    compare signed ones, and `below` is 0 <= self < other in one instruction.
    """

    def __init__(self, value: Any):
        """Take a value, or a constant."""
        i32 = ir.IntegerType.get_signless(32)
        if isinstance(value, int):
            value = arith.constant(i32, value)
        assert value.type == i32, value.type
        self.value = value

    @classmethod
    def given(cls, argument: Any) -> "Int":
        """Take an integer argument of `plgpu.inline_mgpu`."""
        (value,) = argument.registers.flat
        return cls(value)

    __add__ = _binary(arith.addi)
    __sub__ = _binary(arith.subi)
    __mul__ = _binary(arith.muli)
    __floordiv__ = _binary(arith.divui)
    __mod__ = _binary(arith.remui)
    __and__ = _binary(arith.andi)
    __or__ = _binary(arith.ori)
    __xor__ = _binary(arith.xori)
    __lshift__ = _binary(arith.shli)
    __rshift__ = _binary(arith.shrui)
    at_most = _binary(arith.minsi)
    __lt__ = _comparison("slt")
    __ge__ = _comparison("sge")
    below = _comparison("ult")
    equals = _comparison("eq")


class Truth:
    """A truth value of each thread."""

    def __init__(self, value: Any):
        """Take a value."""
        self.value = value

    def both(self, other: "Truth") -> "Truth":
        """Tell whether both hold."""
        return Truth(arith.andi(self.value, other.value))

    def either(self, other: "Truth") -> "Truth":
        """Tell whether one of two holds."""
        return Truth(arith.ori(self.value, other.value))

    __and__, __or__ = both, either

    def no(self) -> "Truth":
        """Negate."""
        i1 = ir.IntegerType.get_signless(1)
        return Truth(arith.xori(self.value, arith.constant(i1, 1)))

    def choose(self, yes: Any, no: Any) -> Any:
        """Take one of two integers, or of two other values."""
        if isinstance(yes, Int | int):
            yes, no = as_int(yes), as_int(no)
            return Int(arith.select(self.value, yes.value, no.value))
        return arith.select(self.value, yes, no)

    def any_in_warp(self) -> "Truth":
        """Tell all threads of the warp whether it holds for one of them."""
        i32 = ir.IntegerType.get_signless(32)
        text = (
            "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; "
            "vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
        )
        word = instruction(i32, [arith.extui(i32, self.value)], text, "=r,r", True)
        return Int(word).equals(1)

    def count_in_warp(self) -> Int:
        """Count the threads of the warp for which it holds."""
        i32 = ir.IntegerType.get_signless(32)
        text = (
            "{ .reg .pred p; .reg .b32 m; setp.ne.b32 p, $1, 0; "
            "vote.sync.ballot.b32 m, p, 0xffffffff; popc.b32 $0, m; }"
        )
        return Int(instruction(i32, [arith.extui(i32, self.value)], text, "=r,r", True))


def words_layout(count: int) -> Any:
    """Give the layout of an array of so many words of each thread of a warpgroup."""
    return plgpu.Layout.WG_STRIDED((WARPGROUP * count,), vec_size=1)


def as_words(values: Sequence[Any]) -> Any:
    """Make values of a thread a result of `plgpu.inline_mgpu`, int32 `words_layout`."""
    i32, registers = ir.IntegerType.get_signless(32), []
    for value in _flatten(values):
        bits = utils.bitwidth(value.type)
        word = ir.IntegerType.get_signless(bits)
        if not isinstance(value.type, ir.IntegerType):
            value = arith.bitcast(word, value)
        value = value if bits == 32 else arith.extui(i32, value)
        registers.append(vector.broadcast(ir.VectorType.get((1,), i32), value))
    return fragments.FragmentedArray(
        _registers=np.array(registers, dtype=object),
        _layout=words_layout(len(registers)).to_mgpu(),
        _is_signed=True,
    )


def from_words(argument: Any, kinds: Sequence[Any]) -> list[Any]:
    """Take values of a thread from an argument of `plgpu.inline_mgpu`.

    Args:
      argument: what `as_words` gave.
      kinds: their types.

    Returns:
      The values, integers as they are.
    """
    values = []
    for register, kind in zip(argument.registers.flat, kinds, strict=True):
        value, bits = extract(register, 0), utils.bitwidth(kind)
        if bits < 32:
            value = arith.trunci(ir.IntegerType.get_signless(bits), value)
        if not isinstance(kind, ir.IntegerType):
            value = arith.bitcast(kind, value)
        values.append(value)
    return values


def integers(count: int) -> list[Any]:
    """Give the type of an integer so many times, for `from_words`."""
    return [ir.IntegerType.get_signless(32)] * count


def as_int(value: Int | int) -> Int:
    """Take a constant or an integer."""
    return value if isinstance(value, Int) else Int(value)


def thread() -> Int:
    """Give this thread's number in its warpgroup."""
    return Int(utils.thread_idx()) % WARPGROUP


def warp() -> Int:
    """Give the number of this thread's warp in its warpgroup, equal for all of it."""
    return Int(utils.warp_idx()) % (WARPGROUP // WARP)


def extract(elements: Any, i: int) -> Any:
    """Take one element of a vector."""
    place = ir.DenseI64ArrayAttr.get([i])
    return vector.extract(elements, dynamic_position=[], static_position=place)


def unsigned(element: Any) -> Int:
    """Widen an unsigned integer to 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    return Int(element if element.type == i32 else arith.extui(i32, element))


def instruction(
    kind: Any, operands: list[Any], text: str, constraints: str, effects: bool = False
) -> Any:
    """Emit an instruction; one with effects stays where it is."""
    return llvm.inline_asm(
        kind, operands, text, constraints, asm_dialect=0, has_side_effects=effects
    )


def warpgroup_barrier() -> None:
    """Wait for all threads of the warpgroup."""
    utils.warpgroup_barrier()


def loop(
    start: Int | int, stop: Int | int, step: int, carry: Sequence[Any]
) -> Callable[[Callable[..., Sequence[Any]]], list[Any]]:
    """Run ``carry = body(i, *carry)`` for every step-th i below `stop`; a decorator.

    Returns:
      A function from the body to the last values that it gave.
    """

    def run(body: Callable[..., Sequence[Any]]) -> list[Any]:
        first, last, by = (as_int(i).value for i in (start, stop, step))
        built = scf.ForOp(first, last, by, _flatten(carry))
        with ir.InsertionPoint(built.body):
            inner = _restore(carry, built.inner_iter_args)
            scf.yield_(_flatten(body(Int(built.induction_variable), *inner)))
        return _restore(carry, built.results)

    return run


def repeat(
    carry: Sequence[Any],
) -> Callable[[Callable[..., tuple[Truth, Sequence[Any]]]], list[Any]]:
    """Run ``more, carry = body(*carry)`` once, and again while there is more."""

    def run(body: Callable[..., tuple[Truth, Sequence[Any]]]) -> list[Any]:
        flat = _flatten(carry)
        kinds = [value.type for value in flat]
        built = scf.WhileOp(kinds, flat)
        before = built.before.blocks.append(*kinds)
        with ir.InsertionPoint.at_block_begin(before):
            more, results = body(*_restore(carry, before.arguments))
            scf.condition(more.value, _flatten(results))
        after = built.after.blocks.append(*kinds)
        with ir.InsertionPoint.at_block_begin(after):
            scf.yield_(list(after.arguments))
        return _restore(carry, built.results)

    return run


def choose(
    truth: Truth,
    yes: Callable[[], Sequence[Any]],
    no: Callable[[], Sequence[Any]],
    like: Sequence[Any],
) -> list[Any]:
    """Run one of two branches, which give values of the types of `like`."""
    built = scf.IfOp(truth.value, [v.type for v in _flatten(like)], has_else=True)
    branches: list[Any] = [(built.then_block, yes), (built.else_block, no)]
    for block, branch in branches:
        with ir.InsertionPoint(block):
            scf.yield_(_flatten(branch()))
    return _restore(like, built.results)


def when(truth: Truth) -> Any:
    """Do what is in the context only where it holds."""
    return utils.when(truth.value)


def _flatten(values: Sequence[Any]) -> list[Any]:
    return [v.value if isinstance(v, Int | Truth) else v for v in values]


def _restore(like: Sequence[Any], values: Sequence[Any]) -> list[Any]:
    return [
        type(old)(new) if isinstance(old, Int | Truth) else new
        for old, new in zip(like, values, strict=True)
    ]
