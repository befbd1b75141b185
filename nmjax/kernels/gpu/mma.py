"""The sparse instruction of a warp, `mma.sp`, which Mosaic GPU does not have.

It is written in the dialects of the compiler, register by register.
"""

import functools
import itertools
from typing import Any

import numpy as np
from jax.experimental.mosaic.gpu import fragmented_array, utils
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, vector


def multiply(sums: Any, kept: Any, inputs: Any, image: Any, warps: int) -> Any:
    """Add a product in registers, tile by tile of one warp's instruction.

    Args:
      sums: ``(F, rows)``, laid out as `plgpu.Layout.MMA_ACC`.
      kept: ``(F, K / 2)``, as ``MMA_LHS``.
      inputs: ``(K, rows)``, as ``MMA_RHS``.
      image: shared memory, ``(F / 64, K / 64, 128)``.
      warps: warps, of 4, along F.

    Returns:
      The new sums.
    """
    i32, index = ir.IntegerType.get_signless(32), ir.IndexType.get()
    constant = functools.partial(arith.constant, i32)
    thread = arith.remui(utils.thread_idx(), constant(128))
    lane = arith.remui(thread, constant(32))
    warp = arith.divui(arith.divui(thread, constant(32)), constant(4 // warps))
    eight = utils.bitwidth(kept.mlir_dtype) == 8
    # Of one instruction: inputs; inputs of a tile of registers; outputs; rows.
    depth, half = (64, 32) if eight else (32, 16)
    height, width = 16 * warps, 8 * (4 // warps)
    sums = sums.copy()
    for i, j in itertools.product(
        range(kept.shape[0] // height), range(inputs.shape[0] // depth)
    ):
        band = slice(i * height, (i + 1) * height)
        # The 16 outputs of a warp are one of the four bands of a tile of the image.
        position = arith.addi(warp, constant(i * warps % 4))
        word = arith.addi(arith.muli(position, constant(32)), lane)
        place = [
            arith.constant(index, i * warps // 4),
            arith.constant(index, j * depth // 64),
            arith.index_cast(index, word),
        ]
        positions = memref.load(image, place)
        selector = 0 if eight else j % 2
        a = _words(kept[band, j * half : (j + 1) * half])
        for k in range(inputs.shape[1] // width):
            column = slice(k * width, (k + 1) * width)
            parts = (j * depth, j * depth + half)
            b = [
                register
                for part in parts
                for register in _words(inputs[part : part + half, column])
            ]
            tile = sums[band, column]
            dtype = kept.mlir_dtype
            sums[band, column] = _issue(dtype, selector, tile, a, b, positions)
    return sums


def _words(array: Any) -> list[Any]:
    """Give the registers of an array as integers of 32 bits."""
    i32 = ir.IntegerType.get_signless(32)
    return [utils.bitcast(register, i32) for register in array.registers.flat]


def _issue(dtype: Any, selector: int, sums: Any, a: Any, b: Any, positions: Any) -> Any:
    """Issue one sparse instruction; give the new sums."""
    integers = isinstance(dtype, ir.IntegerType)
    wide = sums.mlir_dtype
    i32 = ir.IntegerType.get_signless(32)
    names = {"i8": ("m16n8k64", "s8", "s32")}
    shape, narrow, total = names.get(str(dtype), ("m16n8k32", str(dtype), "f32"))
    kind = "r" if integers else "f"
    ptx = (
        f"mma.sp::ordered_metadata.sync.aligned.{shape}.row.col."
        f"{total}.{narrow}.{narrow}.{total} "
        "{$0,$1,$2,$3},{$4,$5,$6,$7},{$8,$9,$10,$11},{$12,$13,$14,$15},$16,"
        f"{selector};"
    )
    constraints = ",".join([f"={kind}"] * 4 + ["r"] * 8 + [kind] * 4 + ["r"])
    old = [
        vector.extract(
            register,
            dynamic_position=[],
            static_position=ir.DenseI64ArrayAttr.get([place]),
        )
        for register in sums.registers.flat
        for place in range(2)
    ]
    found: Any = llvm.inline_asm(
        llvm.StructType.get_literal([wide] * 4),
        [*a, *b, *old, positions],
        ptx,
        constraints,
        has_side_effects=False,
    )
    new = [llvm.extractvalue(wide, found, [place]) for place in range(4)]
    registers = []
    for pair in (new[:2], new[2:]):
        register = llvm.mlir_undef(ir.VectorType.get((2,), wide))
        for place, value in enumerate(pair):
            register = llvm.insertelement(register, value, position=utils.c(place, i32))
        registers.append(register)
    return fragmented_array.FragmentedArray(
        _registers=np.asarray(registers, dtype=object).reshape(sums.registers.shape),
        _layout=sums.layout,
        _is_signed=sums.is_signed,
    )
