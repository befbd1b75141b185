"""Shared and global memory as the single threads of a Pallas kernel see it."""

import copy
from collections.abc import Sequence
from typing import Any

from jax.experimental.mosaic.gpu import utils

# The dialects that kernels are written in; jax.extend has none of them.
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from nmjax.kernels.gpu.floats import to_float
from nmjax.kernels.gpu.lanes import Int, Truth, as_int, extract, instruction


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
            address = (self.base + as_int(index) * self.size).value
            i64 = ir.IntegerType.get_signless(64)
            return llvm.inttoptr(self.pointer.type, arith.extui(i64, address))
        storage = ir.IntegerType.get_signless(8 * self.size)
        return utils.getelementptr(self.pointer, [as_int(index).value], storage)

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
        found = instruction(
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
            word = Int(extract(found, i))
            for half in (word << 16, word & -(1 << 16)):
                floats.append(arith.bitcast(f32, half.value))
        return floats

    def _elements(self, found: Any, count: int) -> list[Any]:
        """Split what was loaded, an integer or a vector of words."""
        storage = ir.IntegerType.get_signless(8 * self.size)
        if not isinstance(found.type, ir.VectorType):
            found = vector.broadcast(ir.VectorType.get((1,), found.type), found)
        found = vector.bitcast(ir.VectorType.get((count,), storage), found)
        elements = [extract(found, i) for i in range(count)]
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
        return [extract(packed, i) for i in range(words)]

    def store_words(self, index: Int | int, words: Sequence[Any]) -> None:
        """Store packed elements; index a multiple of their number."""
        kind = ir.VectorType.get((len(words),), words[0].type)
        packed = vector.from_elements(kind, words)
        llvm.store(packed, self.at(index), alignment=4 * len(words))
