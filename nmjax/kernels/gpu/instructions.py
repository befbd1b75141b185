"""Sparse matrix instructions that Mosaic GPU does not have, for Pallas kernels.

Mosaic GPU emits the dense ``wgmma.mma_async``. The sparse one is emitted in the same
way by `assembly`; here it is given to Pallas, and an equal computation for Pallas'
interpreter.

A warpgroup computes total (F, rows) += W x^T: the compressed operand of the instruction
is its first one, so that a product comes out transposed.
"""

import inspect
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from nmjax.formats import images
from nmjax.formats.packing import unpack_codes
from nmjax.kernels.gpu import assembly

_SUMS = plgpu.Layout.WGMMA
"""Layout of sums, and of 16-bit operands, in the registers of a warpgroup."""


def layout_in_memory(columns: int, dtype: Any) -> tuple[Any, ...]:
    """Give the layout in shared memory of an operand with this many columns.

    Rows are stored in tiles of eight whose bytes are swizzled, so that an instruction
    and the memory engine read them without conflicts.

    Args:
      columns: columns of the block in shared memory.
      dtype: dtype of its entries.

    Returns:
      Transforms for `plgpu.SMEM` and `plgpu.RefType`.
    """
    size = jnp.dtype(dtype).itemsize
    swizzle = plgpu.find_swizzle(8 * columns * size)
    return (
        plgpu.TilingTransform((8, swizzle // size)),
        plgpu.SwizzleTransform(swizzle),
    )


def load(ref: Any, layout: Any) -> jax.Array:
    """Load from memory into registers.

    Args:
      ref: what to load, of shared or global memory.
      layout: layout of the array; a layout of rows loads few bytes at a time.

    Returns:
      The array.
    """
    few = not isinstance(layout, plgpu.Layout)
    # Before JAX 0.11 an index had to be given.
    required = inspect.signature(plgpu.load).parameters.get("idx")
    index = (
        () if required is None or required.default is not required.empty else (None,)
    )
    return plgpu.load(ref, *index, layout=layout, optimized=not few)


def sum_dtype(dtype: Any) -> Any:
    """Give the dtype in which tensor cores add up products of this one."""
    return jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else jnp.float32


def multiply_add(
    total: jax.Array,
    values: Any,
    image: Any,
    x: Any,
    *,
    wait: bool = True,
    fence: bool = True,
) -> jax.Array:
    r"""Add a product with 2:4 weights on the sparse tensor cores of Hopper.

    .. math:: y_{fb} \mathrel{+}= \sum_k W_{fk} x_{bk}

    To be called in a Pallas kernel, by a whole warpgroup. Emits
    ``wgmma.mma_async.sp``.

    Args:
      total: sums, float32 or int32 ``(F, rows)`` in the layout ``WGMMA``. F must be a
        multiple of 64, rows a multiple of 8 up to 256.
      values: kept values: a reference to shared memory ``(F, K / 2)`` stored as
        `layout_in_memory` says, or an array in registers in the layout ``WGMMA``.
      image: reference to their positions, int32 ``(F / 64, K / 64, 128)`` from
        `nmjax.formats.images.encode`, or ``(F / 64, K / 32, 128)`` from
        `nmjax.formats.images.broadcast`.
      x: reference to inputs ``(rows, K)`` of the dtype of `values`, stored as
        `layout_in_memory` says.
      wait: wait until the sums are there. If not, call `finish` before they are used.
      fence: order the instructions behind what was done with registers. Needed unless
        nothing but this function has touched the sums since the last fence.

    Returns:
      The sums.
    """
    in_registers = isinstance(values, jax.Array)
    columns = values.shape[-1]
    stored = plgpu.RefType(layout_in_memory(columns, x.dtype))
    return _inline(
        lambda *operands: assembly.multiply_add(*operands, wait=wait, fence=fence),
        _like(total),
        (total, _SUMS),
        (values, _SUMS if in_registers else stored),
        (image, plgpu.RefType()),
        (x, plgpu.RefType(layout_in_memory(2 * columns, x.dtype))),
    )


def start(total: jax.Array) -> jax.Array:
    """Order instructions behind what was done with registers.

    Args:
      total: sums in the layout ``WGMMA``.

    Returns:
      The sums, which `multiply_add` takes with ``fence=False``.
    """
    return _inline(assembly.order, _like(total), (total, _SUMS))


def finish(total: jax.Array) -> jax.Array:
    """Wait for all instructions that `multiply_add` left in flight.

    Args:
      total: sums as `multiply_add` gave them.

    Returns:
      The sums, which may be used now.
    """
    return _inline(assembly.settle, _like(total), (total, _SUMS))


def widen(values: jax.Array, dtype: Any) -> jax.Array:
    """Convert int8 or float8 values to 16 bits, on their way to a product.

    To be called in a Pallas kernel, by a whole warpgroup. Every int8 or float8 is
    exact in 16 bits.

    Args:
      values: values in registers, in the layout ``WGMMA_UPCAST_2X``.
      dtype: bfloat16 or float16.

    Returns:
      The values in this dtype, in the layout ``WGMMA``.
    """
    result = plgpu.ShapeDtypeStruct(values.shape, dtype, layout=_SUMS)
    return _inline(
        lambda values: assembly.widen(values, dtype),
        result,
        (values, plgpu.Layout.WGMMA_UPCAST_2X),
    )


def emulate(
    total: jax.Array, values: jax.Array, words: jax.Array, x: jax.Array
) -> jax.Array:
    """Compute what `multiply_add` does from the same operands, in plain JAX.

    Args:
      total: sums, ``(F, rows)``.
      values: kept values, ``(F, K / 2)``.
      words: the image of their positions.
      x: inputs, ``(rows, K)``.

    Returns:
      The sums.
    """
    size = x.dtype.itemsize
    if words.shape[1] * images.INPUTS != x.shape[1]:
        words = images.pair(words)
    features, kept = values.shape
    positions = unpack_codes(images.decode(words, size), 2, kept)
    groups = values.reshape(features, -1, 2, 1).astype(total.dtype)
    here = positions.reshape(features, -1, 2, 1) == jnp.arange(4, dtype=jnp.uint8)
    dense = jnp.where(here, groups, 0).sum(2, dtype=total.dtype)
    return total + lax.dot_general(
        dense.reshape(features, 2 * kept),
        x.astype(total.dtype),
        (((1,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST,
        preferred_element_type=total.dtype,
    )


def _inline(emit: Any, result: Any, *operands: tuple[Any, Any]) -> Any:
    """Emit instructions in a kernel.

    Args:
      emit: a function of operands as Mosaic GPU has them.
      result: shape, dtype and layout of what it returns.
      operands: arrays and references, each with its type.

    Returns:
      The result.
    """
    arrays, types = zip(*operands, strict=True)
    inline: Any = plgpu.inline_mgpu(arg_types=types, return_type=result)
    return inline(lambda _, *operands: emit(*operands))(*arrays)


def _like(total: jax.Array) -> Any:
    """Describe sums of the same shape and dtype."""
    return plgpu.ShapeDtypeStruct(total.shape, total.dtype, layout=_SUMS)
