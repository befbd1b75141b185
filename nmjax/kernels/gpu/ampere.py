"""2:4 products on Ampere and Ada: warp-level sparse instructions, experimental.

Never run on hardware: it is compiled for the A100, and the tests run its assembly on a
machine in Python.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as mosaic_gpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir.dialects import memref
from jaxtyping import Array, Int32, Num

from nmjax.formats import images
from nmjax.kernels.gpu import finishing, instructions, mma, operands

plgpu: Any = mosaic_gpu  # types are checked with a JAX that has no such kernels


class Tiles(NamedTuple):
    """What one thread block computes.

    Attributes:
      outputs: outputs of a block, 64 or 128.
      rows: rows of x of a block: 16 (of 16-bit inputs, 128 of them in a step) or a
        multiple of 32.
      inputs: inputs of one step, 64 or 128.
      warps: warps, of 4, along the outputs; the others are along the rows.
      stages: steps in shared memory at the same time.
    """

    outputs: int
    rows: int
    inputs: int
    warps: int
    stages: int


def default_tiles(rows: int, dtype: Any) -> Tiles:
    """Choose tiles by the number of rows of x. None was measured.

    Args:
      rows: rows of x.
      dtype: dtype of x.

    Returns:
      The largest tiles of which two blocks fit into a multiprocessor of an A100.
    """
    size = jnp.dtype(dtype).itemsize
    if rows <= 64:
        few = max(32 // size, pl.next_power_of_2(rows))
        return Tiles(64, few, 128 if few <= 32 else 64, 4, 4)
    return Tiles(128, 128, 64, 2, 5 if size == 1 else 3)


def refusal(values: Any, x: Any) -> str:
    """Say why the kernel cannot multiply; empty where it can.

    Args:
      values: kept values, an array or its shape and dtype.
      x: inputs, likewise.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import ampere
      >>> ampere.refusal(jnp.ones((128, 64)), jnp.ones((1, 128)))
      'Ampere multiplies bfloat16, float16 and int8, not float32'
    """
    if str(x.dtype) not in ("bfloat16", "float16", "int8"):
        return f"Ampere multiplies bfloat16, float16 and int8, not {x.dtype}"
    if values.dtype != x.dtype:
        return (
            "the kernel for Ampere multiplies values with inputs of their dtype, not "
            f"{values.dtype} with {x.dtype}"
        )
    if jax.__version_info__ < (0, 11):
        return f"the kernel for Ampere needs jax >= 0.11, this is {jax.__version__}"
    return ""


def multiply(
    values: Num[Array, "F half"],
    image: Int32[Array, "tiles steps 128"],
    x: Num[Array, "batch K"],
    *,
    scales: Num[Array, "F 1"] | None = None,
    bias: Num[Array, "F"] | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Num[Array, "batch F"]:
    r"""Multiply with a 2:4 array on Ampere; experimental, never run on hardware.

    .. math:: y_{bf} = \sigma \Bigl( s_f \sum_k x_{bk} w_{fk} + b_f \Bigr)

    A block of four warps copies tiles of all operands to shared memory some steps ahead
    (``cp.async``), and multiplies them with ``mma.sp``. The sums are float32, of int8
    int32; scales, bias and activation are applied to them before they are stored.

    Args:
      values: kept values of a `PreparedArray`.
      image: its positions, made for sm80 or sm90.
      x: inputs, of the dtype of the values.
      scales: None, or a factor of each output.
      bias: None, or a summand of each output.
      activation: None, ``"relu"``, ``"gelu"`` (tanh approximation) or ``"silu"``.
      out_dtype: dtype of the result. Default: `finishing.result_dtype`.
      tiles: what a thread block computes. Default: `default_tiles`.
      interpret: settings of Pallas' interpreter, for tests on a CPU.

    Returns:
      The product.

    Raises:
      NotImplementedError: `refusal` gives a reason.
      ValueError: shapes or activation do not fit.
      TypeError: dtypes do not fit.
    """
    if reason := refusal(values, x):
        raise NotImplementedError(reason)
    operands.check(values, image, x, scales, bias, activation, out_dtype)
    features, inputs, rows = operands.sizes(values, x)
    if image.shape[1] != inputs // images.INPUTS:
        raise ValueError(
            f"image of shape {image.shape} has words for each instruction; the kernel "
            "for Ampere takes those of formats.images.encode"
        )
    tiles = default_tiles(rows, x.dtype) if tiles is None else tiles
    x = jnp.pad(x, [(0, -rows % tiles.rows), (0, 0)])
    if out_dtype is None:
        out_dtype = finishing.result_dtype(x.dtype, scales, bias, activation)
    vectors = [] if scales is None else [scales.reshape(features)]
    vectors += [] if bias is None else [bias]
    body = functools.partial(
        _body,
        tiles=tiles,
        scaled=scales is not None,
        biased=bias is not None,
        activation=activation,
        interpret=interpret is not False,
    )
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], features), out_dtype),
        grid=(features // tiles.outputs, x.shape[0] // tiles.rows),
        grid_names=("outputs", "rows"),
        scratch_types={
            "values_smem": _matrix(
                (tiles.stages, tiles.outputs, tiles.inputs // 2), values.dtype
            ),
            "image_smem": plgpu.SMEM(
                (tiles.stages, tiles.outputs // 64, tiles.inputs // 64, 128), jnp.int32
            ),
            "x_smem": _matrix((tiles.stages, tiles.rows, tiles.inputs), x.dtype),
            # Longer rows than needed, so that columns are in different banks.
            "out_smem": plgpu.SMEM(
                (16, tiles.outputs + 16 // jnp.dtype(out_dtype).itemsize), out_dtype
            ),
        },
        # Each step has the one barrier that it needs, see `_body`.
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        interpret=interpret,
    )
    return kernel(values, image, x, *vectors)[:rows]


def _matrix(shape: tuple[int, ...], dtype: Any) -> Any:
    """Ask for shared memory whose rows are read without conflicts."""
    transforms = instructions.layout_in_memory(shape[-1], dtype)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _body(
    values_gmem: Any,
    image_gmem: Any,
    x_gmem: Any,
    *refs: Any,
    tiles: Tiles,
    scaled: bool,
    biased: bool,
    activation: str | None,
    interpret: bool,
    values_smem: Any,
    image_smem: Any,
    x_smem: Any,
    out_smem: Any,
) -> None:
    """Compute one tile of the result."""
    *vectors, out_gmem = refs
    vectors = iter(vectors)
    scales_gmem = next(vectors) if scaled else None
    bias_gmem = next(vectors) if biased else None
    dtype = x_gmem.dtype
    wide = instructions.sum_dtype(dtype)
    acc, lhs, rhs = (
        layout(dtype, m_warps=tiles.warps)
        for layout in (
            plgpu.Layout.MMA_ACC,
            plgpu.Layout.MMA_LHS,
            plgpu.Layout.MMA_RHS,
        )
    )
    output, row = lax.axis_index("outputs"), lax.axis_index("rows")
    here = pl.ds(output * tiles.outputs, tiles.outputs)
    steps = x_gmem.shape[1] // tiles.inputs
    across, along = tiles.outputs // 64, tiles.inputs // 64
    copy = functools.partial(_copy, interpret=interpret)
    wait = functools.partial(_wait, interpret=interpret)

    def fetch(step: Any, slot: Any) -> None:
        # The last steps fetch the last tiles once more, to keep the count of copies.
        step = jnp.minimum(step, steps - 1)
        kept = pl.ds(step * (tiles.inputs // 2), tiles.inputs // 2)
        copy(values_gmem.at[here, kept], values_smem.at[slot])
        rows = pl.ds(row * tiles.rows, tiles.rows)
        copy(x_gmem.at[rows, pl.ds(step * tiles.inputs, tiles.inputs)], x_smem.at[slot])
        for i in range(across):
            source = image_gmem.at[output * across + i, pl.ds(step * along, along)]
            copy(source, image_smem.at[slot, i])

    def advance(step: Any, sums: Any) -> Any:
        # What this step reads has arrived, and, behind the barrier in `wait`, no warp
        # reads the slot of the step before any more: it can be filled again.
        wait((tiles.stages - 2) * (across + 2))
        ahead = step + tiles.stages - 1
        fetch(ahead, lax.rem(ahead, tiles.stages))
        slot = lax.rem(step, tiles.stages)
        kept = plgpu.load(values_smem.at[slot], layout=lhs)
        inputs = plgpu.load(x_smem.at[slot].T, layout=rhs)
        return product(sums, kept, inputs, image_smem.at[slot])

    for stage in range(tiles.stages - 1):
        fetch(jnp.int32(stage), stage)
    if interpret:
        product = _interpreted_product
    else:
        product = _product((tiles.outputs, tiles.rows), wide, (acc, lhs, rhs), tiles)
    zeros = jnp.zeros((tiles.outputs, tiles.rows), wide)
    sums = lax.fori_loop(0, steps, advance, plgpu.layout_cast(zeros, acc))

    def of_outputs(vector: Any) -> Any:
        return plgpu.load(vector.at[here], layout=acc.reduce(1), optimized=False)

    vectors = [of_outputs(scales_gmem) if scaled else None]
    vectors += [of_outputs(bias_gmem) if biased else None]
    # Through shared memory, so that neighbouring threads store neighbouring outputs.
    stored = out_smem.shape[0]
    shape = tiles.outputs, stored
    store = _store_interpreted if interpret else _store_transposed(acc)
    width = min(16 // out_gmem.dtype.itemsize, stored * tiles.outputs // 128)
    layout = plgpu.Layout.WG_STRIDED(shape[::-1], vec_size=width)
    for start in range(0, tiles.rows, stored):
        part = sums[:, start : start + stored]
        scales, bias = (
            None if vector is None else lax.broadcast_in_dim(vector, shape, (0,))
            for vector in vectors
        )
        part = finishing.finish(part, scales, bias, activation, out_gmem.dtype)
        store(part, out_smem)
        wait(0)
        there = pl.ds(row * tiles.rows + start, stored)
        whole = plgpu.load(out_smem.at[:, pl.ds(0, tiles.outputs)], layout=layout)
        out_gmem[there, here] = whole
        wait(0)


def _store_interpreted(sums: Any, target: Any) -> None:
    """Do on a CPU what `_store_transposed` does."""
    target[:, : sums.shape[0]] = sums.T


def _store_transposed(acc: Any) -> Any:
    """Give the function that stores sums ``(F, rows)`` to shared memory as rows."""

    @plgpu.inline_mgpu(arg_types=(acc, plgpu.RefType(())))
    def store(_: Any, sums: Any, target: Any) -> None:
        sums.foreach(lambda value, place: memref.store(value, target, place[::-1]))

    return store


def _copy(source: Any, target: Any, interpret: bool) -> None:
    """Start a copy to shared memory; each is a group of its own for `_wait`."""
    if interpret:  # The interpreter knows copies with barriers only.
        target[...] = source[...]
    else:
        promise = plgpu.OOBFillMode.PROMISE_IN_BOUNDS
        plgpu.copy_gmem_to_smem(source, target, oob_mode=promise)


def _wait(count: int, interpret: bool) -> None:
    """Wait until at most so many copies are under way, and for all warps."""
    if not interpret:
        plgpu.wait_gmem_to_smem(count)


def _interpreted_product(sums: Any, kept: Any, inputs: Any, image: Any) -> Any:
    """Compute on a CPU what `_product` computes."""
    return instructions.emulate(sums, kept, image[...], inputs.T)


def _product(
    shape: tuple[int, int], wide: Any, layouts: tuple[Any, ...], tiles: Tiles
) -> Any:
    """Give the function that multiplies one step's tiles and adds them up."""
    acc, lhs, rhs = layouts

    @plgpu.inline_mgpu(
        arg_types=(acc, lhs, rhs, plgpu.RefType(())),
        return_type=plgpu.ShapeDtypeStruct(shape, wide, layout=acc),
    )
    def product(_: Any, sums: Any, kept: Any, inputs: Any, image: Any) -> Any:
        return mma.multiply(sums, kept, inputs, image, tiles.warps)

    return product
