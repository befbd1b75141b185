"""Code for the single threads of a Pallas kernel.

A Pallas kernel for Mosaic GPU is written for warpgroups. What it has no words for, such
as a gather in which every thread has an address of its own, is written here thread by
thread, inside `plgpu.inline_mgpu`: integers of a thread with Python's operators, loads
and stores of vectors, loops, and exchanges within a warp.

Nothing here can be interpreted: kernels take an equal computation in plain JAX then.
"""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.mosaic.gpu import utils

# The dialects that kernels are written in; jax.extend has none of them.
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, scf, vector
from jaxlib.mlir.dialects import math as functions

WARP, WARPGROUP = 32, 128
"""Threads of a warp and of a warpgroup."""

SCALAR = plgpu.Layout.WG_SPLAT(())
"""Type of an integer argument of `plgpu.inline_mgpu`; `Int.given` takes it."""


def _binary(build: Callable[..., Any]) -> Callable[["Int", "Int | int"], "Int"]:
    return lambda a, b: Int(build(a.value, _int(b).value))


def _comparison(name: str) -> Callable[["Int", "Int | int"], "Truth"]:
    predicate = arith.CmpIPredicate[name]
    return lambda a, b: Truth(arith.cmpi(predicate, a.value, _int(b).value))


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
            yes, no = _int(yes), _int(no)
            return Int(arith.select(self.value, yes.value, no.value))
        return arith.select(self.value, yes, no)

    def any_in_warp(self) -> "Truth":
        """Tell all threads of the warp whether it holds for one of them."""
        i32 = ir.IntegerType.get_signless(32)
        text = (
            "{ .reg .pred p, q; setp.ne.b32 p, $1, 0; "
            "vote.sync.any.pred q, p, 0xffffffff; selp.b32 $0, 1, 0, q; }"
        )
        word = _assembly(i32, [arith.extui(i32, self.value)], text, "=r,r", True)
        return Int(word).equals(1)

    def count_in_warp(self) -> Int:
        """Count the threads of the warp for which it holds."""
        i32 = ir.IntegerType.get_signless(32)
        text = (
            "{ .reg .pred p; .reg .b32 m; setp.ne.b32 p, $1, 0; "
            "vote.sync.ballot.b32 m, p, 0xffffffff; popc.b32 $0, m; }"
        )
        return Int(_assembly(i32, [arith.extui(i32, self.value)], text, "=r,r", True))


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
        value, bits = _extract(register, 0), utils.bitwidth(kind)
        if bits < 32:
            value = arith.trunci(ir.IntegerType.get_signless(bits), value)
        if not isinstance(kind, ir.IntegerType):
            value = arith.bitcast(kind, value)
        values.append(value)
    return values


def integers(count: int) -> list[Any]:
    """Give the type of an integer so many times, for `from_words`."""
    return [ir.IntegerType.get_signless(32)] * count


def _int(value: Int | int) -> Int:
    return value if isinstance(value, Int) else Int(value)


def thread() -> Int:
    """Give this thread's number in its warpgroup."""
    return Int(utils.thread_idx()) % WARPGROUP


def warp() -> Int:
    """Give the number of this thread's warp in its warpgroup, equal for all of it."""
    return Int(utils.warp_idx()) % (WARPGROUP // WARP)


class Memory:
    """Elements of shared or global memory, counted from the start of a reference."""

    def __init__(self, ref: Any):
        """Take a reference."""
        self.pointer = utils.memref_ptr(ref)
        self.dtype = ir.MemRefType(ref.type).element_type
        self.size = utils.bytewidth(self.dtype)
        self.base = None
        if utils.is_smem_ref(ref):
            # An address in shared memory has 32 bits: less to compute.
            i32 = ir.IntegerType.get_signless(32)
            self.base = Int(llvm.ptrtoint(i32, self.pointer))

    def shifted(self, index: Int) -> "Memory":
        """Count from another element of shared memory on."""
        assert self.base is not None
        moved = copy.copy(self)
        moved.base = self.base + index * self.size
        return moved

    def at(self, index: Int | int) -> Any:
        """Give the address of an element."""
        if self.base is not None:
            address = (self.base + _int(index) * self.size).value
            i64 = ir.IntegerType.get_signless(64)
            return llvm.inttoptr(self.pointer.type, arith.extui(i64, address))
        storage = ir.IntegerType.get_signless(8 * self.size)
        return utils.getelementptr(self.pointer, [_int(index).value], storage)

    def load(self, index: Int | int, count: int = 1) -> list[Any]:
        """Load neighbours with one instruction; index must be a multiple of count.

        Returns:
          The elements, floats in their dtype and integers with their bits.
        """
        return self._elements(self._load(index, count), count)

    def load_floats(self, index: Int, count: int) -> list[Any]:
        """Load neighbours with one instruction, as float32."""
        return self._floats(self._load(index, count), count)

    def _load(self, index: Int | int, count: int) -> Any:
        """Load an integer of less than 32 bits, or a vector of words."""
        if count * self.size < 4:
            kind = ir.IntegerType.get_signless(8 * count * self.size)
        else:
            # As words: so that one load has up to 16 bytes for every dtype.
            i32 = ir.IntegerType.get_signless(32)
            kind = ir.VectorType.get((count * self.size // 4,), i32)
        return llvm.load(kind, self.at(index), alignment=count * self.size)

    def load_floats_if(self, valid: Truth, index: Int, count: int) -> list[Any]:
        """Load neighbours from shared memory where it holds, zeros elsewhere.

        Threads for which it does not hold take no time of the memory's.
        """
        assert self.base is not None and count * self.size % 4 == 0
        words = count * self.size // 4
        i32 = ir.IntegerType.get_signless(32)
        names = [f"${i}" for i in range(words)]
        one = f"{{{', '.join(names)}}}" if words > 1 else names[0]
        vector_of = f".v{words}" if words > 1 else ""
        zeros = " ".join(f"mov.b32 {name}, 0;" for name in names)
        text = (
            f"{{ .reg .pred p; setp.ne.b32 p, ${words + 1}, 0; {zeros} "
            f"@p ld.shared{vector_of}.b32 {one}, [${words}]; }}"
        )
        address = (self.base + index * self.size).value
        kinds = [i32] * words
        found = _assembly(
            llvm.StructType.get_literal(kinds) if words > 1 else i32,
            [address, arith.extui(i32, valid.value)],
            text,
            ",".join(["=&r"] * words + ["r", "r"]),
            True,
        )
        if words > 1:
            found = [llvm.extractvalue(i32, found, [i]) for i in range(words)]
        else:
            found = [found]
        kind = ir.VectorType.get((words,), i32)
        return self._floats(vector.from_elements(kind, found), count)

    def _floats(self, found: Any, count: int) -> list[Any]:
        """Split what was loaded into float32s."""
        if self.dtype != ir.BF16Type.get() or count == 1:
            return [to_float(element) for element in self._elements(found, count)]
        # A bfloat16 is the upper half of a float32: one operation each.
        f32, floats = ir.F32Type.get(), []
        for i in range(count // 2):
            word = Int(_extract(found, i))
            for half in (word << 16, word & -(1 << 16)):
                floats.append(arith.bitcast(f32, half.value))
        return floats

    def _elements(self, found: Any, count: int) -> list[Any]:
        """Split what was loaded, an integer or a vector of words."""
        storage = ir.IntegerType.get_signless(8 * self.size)
        if not isinstance(found.type, ir.VectorType):
            found = vector.broadcast(ir.VectorType.get((1,), found.type), found)
        found = vector.bitcast(ir.VectorType.get((count,), storage), found)
        elements = [_extract(found, i) for i in range(count)]
        if isinstance(self.dtype, ir.IntegerType):
            return elements
        return [arith.bitcast(self.dtype, element) for element in elements]

    def store(self, index: Int | int, elements: Sequence[Any]) -> None:
        """Store neighbours with one instruction; index a multiple of their number."""
        count = len(elements)
        if count * self.size < 4:
            (element,) = elements
            llvm.store(element, self.at(index), alignment=self.size)
        else:
            self.store_words(index, self.pack(elements))

    def pack(self, elements: Sequence[Any]) -> list[Any]:
        """Put elements of this memory together to words."""
        count, i32 = len(elements), ir.IntegerType.get_signless(32)
        packed = vector.from_elements(
            ir.VectorType.get((count,), elements[0].type), elements
        )
        words = count * self.size // 4
        packed = vector.bitcast(ir.VectorType.get((words,), i32), packed)
        return [_extract(packed, i) for i in range(words)]

    def store_words(self, index: Int | int, words: Sequence[Any]) -> None:
        """Store packed elements; index a multiple of their number."""
        kind = ir.VectorType.get((len(words),), words[0].type)
        packed = vector.from_elements(kind, words)
        llvm.store(packed, self.at(index), alignment=4 * len(words))


def _extract(elements: Any, i: int) -> Any:
    place = ir.DenseI64ArrayAttr.get([i])
    return vector.extract(elements, dynamic_position=[], static_position=place)


def _assembly(
    kind: Any, operands: list[Any], text: str, constraints: str, effects: bool = False
) -> Any:
    """Emit an instruction; one with effects stays where it is."""
    return llvm.inline_asm(
        kind, operands, text, constraints, asm_dialect=0, has_side_effects=effects
    )


def unsigned(element: Any) -> Int:
    """Widen an unsigned integer to 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    return Int(element if element.type == i32 else arith.extui(i32, element))


def warpgroup_barrier() -> None:
    """Wait for all threads of the warpgroup."""
    utils.warpgroup_barrier()


def to_float(element: Any) -> Any:
    """Widen a float of 8 or 16 bits, or convert an int8, to float32."""
    f32 = ir.F32Type.get()
    kind = element.type
    if kind == f32:
        return element
    if isinstance(kind, ir.IntegerType):
        return arith.sitofp(f32, element)
    i8, i16 = (ir.IntegerType.get_signless(bits) for bits in (8, 16))
    i32 = ir.IntegerType.get_signless(32)
    if kind == ir.BF16Type.get():
        # The upper half of a float32.
        word = Int(arith.extui(i32, arith.bitcast(i16, element)))
        return arith.bitcast(f32, (word << 16).value)
    names = {ir.Float8E4M3FNType: "e4m3", ir.Float8E5M2Type: "e5m2"}
    name = next((n for t, n in names.items() if isinstance(kind, t)), None)
    if name is not None:
        # Float8 is converted in pairs, to float16, which has every float8.
        pair = arith.extui(i16, arith.bitcast(i8, element))
        text = f"cvt.rn.f16x2.{name}x2 $0, $1;"
        halves = _assembly(i32, [pair], text, "=r,h")
        element = arith.bitcast(ir.F16Type.get(), arith.trunci(i16, halves))
    return arith.extf(f32, element)


def constant(value: int | float) -> Any:
    """Give a float32."""
    return arith.constant(ir.F32Type.get(), float(value))


def add(a: Any, b: Any) -> Any:
    """Add float32s."""
    return arith.addf(a, b)


def multiply(a: Any, b: Any) -> Any:
    """Multiply float32s."""
    return arith.mulf(a, b)


def multiply_add(a: Any, b: Any, c: Any) -> Any:
    """Compute a b + c in float32, rounded once."""
    return functions.fma(a, b, c)


def exchange(element: Any, distance: int) -> Any:
    """Swap a float32 with the thread whose number differs in this bit."""
    return utils.shfl_bfly(element, distance)


def finish(
    total: Any, scale: Any | None, bias: Any | None, activation: str | None, dtype: Any
) -> Any:
    """Turn a sum into a result, as `finishing.finish` does.

    Args:
      total: the sum, float32.
      scale: a factor, float32.
      bias: what is added, float32.
      activation: of `finishing.ACTIVATIONS`.
      dtype: dtype of the result.
    """
    x = total if scale is None else arith.mulf(total, scale)
    x = x if bias is None else arith.addf(x, bias)
    if activation == "relu":
        x = arith.maximumf(x, constant(0))
    elif activation is not None:
        inner = x
        if activation == "gelu":
            cube = arith.mulf(arith.mulf(x, x), x)
            inner = multiply_add(constant(0.044715), cube, x)
            inner = arith.mulf(constant(math.sqrt(8 / math.pi)), inner)
        # 1 / (1 + exp(-t)) by the instruction for powers of two.
        power = arith.mulf(inner, constant(-math.log2(math.e)))
        text = "ex2.approx.f32 $0, $1;"
        power = _assembly(ir.F32Type.get(), [power], text, "=f,f")
        x = arith.divf(x, arith.addf(constant(1), power))
    kind = utils.dtype_to_ir_type(jnp.dtype(dtype))
    return x if kind == x.type else arith.truncf(kind, x)


def loop(
    start: Int | int, stop: Int | int, step: int, carry: Sequence[Any]
) -> Callable[[Callable[..., Sequence[Any]]], list[Any]]:
    """Run ``carry = body(i, *carry)`` for every step-th i below `stop`; a decorator.

    Returns:
      A function from the body to the last values that it gave.
    """

    def run(body: Callable[..., Sequence[Any]]) -> list[Any]:
        first, last, by = (_int(i).value for i in (start, stop, step))
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
