"""Sparse matrix instructions as inline assembly.

What of JAX is private, or may change, is used here and not in the kernels: arrays in
registers, descriptors of shared memory and the dialects of the compiler.
"""

import itertools
from typing import Any

import numpy as np
from jax._src import lib
from jax.experimental.mosaic.gpu import fragmented_array as fragments
from jax.experimental.mosaic.gpu import mma_utils, utils

# The dialects of the compiler; jax.extend has none of them.
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm

THREADS = 128
"""Threads of a warpgroup."""

ROWS, COLUMNS = 64, 256
"""Outputs of an instruction, and the most rows of x that it takes."""


# The modes of swizzling are exported nowhere.
_swizzling: Any = getattr(lib, "mosaic_gpu_dialect").SwizzlingMode  # noqa: B009


def _assemble(result: Any, operands: list[Any], text: str, constraints: str) -> Any:
    """Emit an instruction by its text, whose effects are not known."""
    return llvm.inline_asm(
        result, operands, text, constraints, asm_dialect=0, has_side_effects=True
    )


class _Stored:
    """A matrix in shared memory whose rows are contiguous in swizzled tiles."""

    def __init__(self, ref: Any):
        kind = ir.MemRefType(ref.type)
        row_tiles, column_tiles, height, width = kind.shape
        strides, _ = kind.get_strides_and_offset()
        assert height == 8 and strides[2:] == [width, 1], kind
        self.dtype = kind.element_type
        self.size = utils.bytewidth(self.dtype)
        self.rows, self.columns, self.width = 8 * row_tiles, column_tiles * width, width
        self.row_stride, self.column_stride = strides[0], strides[1]
        self.descriptor: Any = mma_utils.encode_descriptor(
            ref,
            leading_byte_offset=0,
            stride_byte_offset=self.row_stride * self.size,
            swizzle=_swizzling(width * self.size),
        )

    def at(self, row: int, column: int) -> Any:
        """Describe the part from here on; row must be a multiple of 8."""
        tile, rest = divmod(column, self.width)
        offset = row // 8 * self.row_stride + tile * self.column_stride + rest
        if not offset:
            return self.descriptor
        i64 = ir.IntegerType.get_signless(64)
        return llvm.add(
            self.descriptor,
            utils.c(mma_utils.encode_addr(offset * self.size), i64),
            overflow_flags=llvm.IntegerOverflowFlags.none,
        )


def order(array: Any) -> Any:
    """Order matrix instructions behind what was done with an array in registers.

    Args:
      array: the array.

    Returns:
      The array: the compiler does not know of the fence and moves nothing over this.
    """
    array = fragments.optimization_barrier(array)
    nvvm.wgmma_fence_aligned()
    return array


def settle(array: Any) -> Any:
    """Wait for all matrix instructions of this warpgroup.

    Args:
      array: sums that they add to.

    Returns:
      The sums.
    """
    nvvm.wgmma_wait_group_sync_aligned(0)
    return fragments.optimization_barrier(array)


def multiply_add(
    total: Any, values: Any, image: Any, x: Any, *, wait: bool, fence: bool
) -> Any:
    """Emit ``wgmma.mma_async.sp`` for a block of inputs.

    Args:
      total: sums in registers.
      values: kept values, in shared memory or in registers.
      image: their positions, in shared memory.
      x: inputs, in shared memory.
      wait: wait for the sums.
      fence: order the instructions behind what was done with registers.

    Returns:
      The sums, in registers.
    """
    features, rows = total.shape
    given = total.layout
    # Pairs of float32 in one register make the assembler wait for every instruction.
    total = total.to_layout(fragments.WGMMA_LAYOUT_ACC_32BIT)
    b = _Stored(x)
    in_registers = isinstance(values, fragments.FragmentedArray)
    a: Any = values if in_registers else _Stored(values)
    step = 64 // b.size  # inputs of one instruction
    steps = b.columns // step
    words = _load_words(image)
    share = steps // words.shape[1]  # instructions that take the same word
    assert features % ROWS == 0 and words.shape[0] == features // ROWS
    assert b.rows == rows and rows % 8 == 0 and rows <= COLUMNS
    assert b.columns == steps * step and steps == words.shape[1] * share
    assert share == 1 or (share == 2 and b.size == 2)
    if fence:
        if in_registers:
            a = fragments.optimization_barrier(a)
        total = order(total)
    registers = total.registers.copy()
    for tile in range(features // ROWS):
        part = registers[tile : tile + 1]
        flat = list(part.flat)
        for i in range(steps):
            row, column = ROWS * tile, i * step // 2
            if in_registers:
                block = a[row : row + ROWS, column : column + step // 2]
                operand = [_as_word(r) for r in block.registers.flat]
            else:
                operand = [a.at(row, column)]
            word = words[tile, i // share]
            flat = _instruction(
                flat, operand, b.at(0, i * step), word, i % share, rows, b.dtype
            )
        registers[tile : tile + 1] = np.array(flat, dtype=object).reshape(part.shape)
    nvvm.wgmma_commit_group_sync_aligned()
    if wait:
        nvvm.wgmma_wait_group_sync_aligned(0)
    result = fragments.FragmentedArray(
        _registers=registers, _layout=total.layout, _is_signed=total.is_signed
    )
    return result.to_layout(given)


def _load_words(image: Any) -> np.ndarray:
    """Load this thread's words of an image in shared memory."""
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    thread = arith.remui(utils.thread_idx(), utils.c(THREADS, i32))
    thread = arith.index_cast(index, thread)
    tiles, steps, threads = ir.MemRefType(image.type).shape
    assert threads == THREADS
    words = np.empty((tiles, steps), dtype=object)
    for i, j in np.ndindex(tiles, steps):
        place = [utils.c(i, index), utils.c(j, index), thread]
        words[i, j] = memref.load(image, place)
    return words


def _instruction(
    total: list[Any],
    a: list[Any],
    b: Any,
    word: Any,
    selector: int,
    rows: int,
    dtype: Any,
) -> list[Any]:
    """Emit one instruction.

    Args:
      total: registers of the sums, one for each.
      a: the kept values: their descriptor, or four registers.
      b: the descriptor of x.
      word: the positions.
      selector: the pair of threads of a quad whose words describe 16-bit values.
      rows: rows of x.
      dtype: dtype of the operands.

    Returns:
      The registers of the new sums.
    """
    size = utils.bytewidth(dtype)
    element = ir.VectorType(total[0].type).element_type
    integer = isinstance(element, ir.IntegerType)
    assert len(total) == rows // 2 and (size == 2 or selector == 0)
    # Behind "add to the sums": signs of both operands, then which are transposed.
    signs = [] if integer else [1, 1]
    transposed = [] if size == 1 else [0] if len(a) > 1 else [0, 0]
    names = (f"${i}" for i in itertools.count())

    def take(count: int) -> str:
        return ", ".join(itertools.islice(names, count))

    sums = take(len(total))
    take(len(total))  # the sums once more, as inputs in the same registers
    operand = f"{{{take(4)}}}" if len(a) > 1 else take(1)
    kind = _INSTRUCTION_TYPES[str(dtype)]
    name = (
        f"wgmma.mma_async.sp.sync.aligned.m{ROWS}n{rows}k{64 // size}"
        f".{'s32' if integer else 'f32'}.{kind}.{kind}"
    )
    rest = "".join(f", {i}" for i in signs + transposed)
    text = (
        "{ .reg .pred p; setp.ne.b32 p, 1, 0; "
        f"{name} {{{sums}}}, {operand}, {take(1)}, {take(1)}, {selector}, p{rest}; }}"
    )
    constraints = [
        *(["=r" if integer else "=f"] * len(total)),
        *map(str, range(len(total))),
        *(["r"] * 4 if len(a) > 1 else ["l"]),
        "l",
        "r",
    ]
    field = total[0].type
    results = _assemble(
        llvm.StructType.get_literal([field] * len(total)),
        [*total, *a, b, word],
        text,
        ",".join(constraints),
    )
    return [llvm.extractvalue(field, results, [i]) for i in range(len(total))]


_INSTRUCTION_TYPES = {
    "bf16": "bf16",
    "f16": "f16",
    "f8E4M3FN": "e4m3",
    "f8E5M2": "e5m2",
    "i8": "s8",
}


def _as_word(register: Any) -> Any:
    """Take two 16-bit or four 8-bit values as one 32-bit register."""
    i32 = ir.IntegerType.get_signless(32)
    return utils.bitcast(register, i32)


def widen(values: Any, dtype: Any) -> Any:
    """Convert 8-bit values in registers to 16 bits, in the layout of operands.

    Args:
      values: the values.
      dtype: bfloat16 or float16.

    Returns:
      The same values in this dtype.
    """
    f16 = ir.F16Type.get()
    target = utils.dtype_to_ir_type(dtype)
    if not isinstance(values.mlir_dtype, ir.IntegerType):
        # Where there is no conversion from float8 to bfloat16, it goes through
        # float16, which has every float8.
        wide = values.astype(f16).astype(target)
    elif target == f16:
        wide = _widen_to_float16(values)
    else:
        wide = values.astype(target)
    return wide.to_layout(fragments.WGMMA_LAYOUT)


def _widen_to_float16(values: Any) -> Any:
    """Convert int8 to float16 as 1152 + v - 1152.

    With its sign bit flipped, v is v + 128 as an unsigned byte, and that byte behind
    0x64 is the float16 1024 + 128 + v.
    """
    i32, f16 = ir.IntegerType.get_signless(32), ir.F16Type.get()
    (length,) = ir.VectorType(values.registers.flat[0].type).shape
    assert length == 4
    registers = np.empty_like(values.registers)
    for place, register in np.ndenumerate(values.registers):
        halves = []
        for order in (0x4140, 0x4342):
            half = _assemble(
                i32,
                [utils.bitcast(register, i32)],
                "{ .reg .b32 s, t; xor.b32 s, $1, 0x80808080; "
                f"prmt.b32 s, s, 0x64, {order:#x}; "
                "mov.b32 t, 0x64806480; sub.f16x2 $0, s, t; }",
                "=r,r",
            )
            halves.append(utils.bitcast(half, ir.VectorType.get((2,), f16)))
        registers[place] = utils.vector_concat(halves)
    return fragments.FragmentedArray(
        _registers=registers, _layout=values.layout, _is_signed=None
    )
