"""2:4 products on Blackwell: sparse instructions on tensor memory, experimental.

Compiled for the B200 and interpreted on a CPU, never run on hardware.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as mosaic_gpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, Num

from nmjax.formats import PreparedArray, images
from nmjax.kernels.gpu import finishing, instructions, operands

plgpu: Any = mosaic_gpu  # types are checked with a JAX that has no such kernels

OUTPUTS = images.BLOCK
"""Outputs of a tile: the lanes of tensor memory."""

INPUTS = images.BLOCK
"""Inputs of one step."""


class Tiles(NamedTuple):
    """What one thread block computes at a time, besides `OUTPUTS` and `INPUTS`.

    Attributes:
      rows: rows of x, 16, 32, 64, 128 or 256.
      stages: steps of 128 inputs in shared memory at the same time.
      blocks: thread blocks; each takes one tile of the result after the other.
    """

    rows: int
    stages: int
    blocks: int = 148


def default_tiles(rows: int) -> Tiles:
    """Choose tiles by the number of rows of x. None was measured.

    Args:
      rows: rows of x.

    Returns:
      The tiles.
    """
    return Tiles(min(128, max(16, pl.next_power_of_2(rows))), 3)


def refusal(values: Any, x: Any) -> str:
    """Say why the kernel cannot multiply; empty where it can.

    Args:
      values: kept values, an array or its shape and dtype.
      x: inputs, likewise.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import blackwell
      >>> blackwell.refusal(jnp.ones((128, 64)), jnp.ones((1, 128)))
      'Blackwell multiplies bfloat16, float16, float8_e4m3fn, ... not float32'
    """
    known = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
    if str(x.dtype) not in known:
        return f"Blackwell multiplies {', '.join(known)}, not {x.dtype}"
    if values.dtype != x.dtype:
        return (
            "the kernel for Blackwell multiplies values with inputs of their dtype, "
            f"not {values.dtype} with {x.dtype}"
        )
    if jax.__version_info__ < (0, 11):
        return f"the kernel for Blackwell needs jax >= 0.11, this is {jax.__version__}"
    return ""


def multiply(
    values: Num[Array, "F half"],
    image: Int32[Array, "tiles steps 128 4"],
    x: Num[Array, "batch K"],
    *,
    scales: Num[Array, "F 1"] | None = None,
    bias: Num[Array, "F"] | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Num[Array, "batch F"]:
    r"""Multiply with a 2:4 array on Blackwell; experimental, never run on hardware.

    .. math:: y_{bf} = \sigma \Bigl( s_f \sum_k x_{bk} w_{fk} + b_f \Bigr)

    In each block one warp fetches tiles to shared memory (TMA), one issues the sparse
    instruction ``tcgen05.mma.sp``, and four store the tile before while the next one is
    computed. The sums are float32, of int8 int32; scales, bias and activation are
    applied to them before they are stored.

    Args:
      values: kept values of a `PreparedArray`.
      image: its positions, made for sm100.
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
    operands.check(values, None, x, scales, bias, activation, out_dtype)
    features, inputs, rows = operands.sizes(values, x)
    expected = features // OUTPUTS, inputs // INPUTS, OUTPUTS, 4
    if image.shape != expected:
        raise ValueError(
            f"image of shape {image.shape} does not belong to values of shape "
            f"{values.shape}: it must be {expected}, from "
            "formats.images.encode_blackwell"
        )
    tiles = default_tiles(rows) if tiles is None else tiles
    x = jnp.pad(x, [(0, -rows % tiles.rows), (0, 0)])
    if out_dtype is None:
        out_dtype = finishing.result_dtype(x.dtype, scales, bias, activation)
    vectors = [] if scales is None else [scales.reshape(features)]
    vectors += [] if bias is None else [bias]
    count = features // OUTPUTS * (x.shape[0] // tiles.rows)
    tiles = tiles._replace(blocks=min(tiles.blocks, count))
    body = functools.partial(
        _body,
        tiles=tiles,
        scaled=scales is not None,
        biased=bias is not None,
        activation=activation,
        interpret=interpret is not False,
    )
    stages, stored = tiles.stages, min(32, tiles.rows)
    ordered = functools.partial(plgpu.Barrier, num_arrivals=1, orders_tensor_core=True)
    scratch = {
        "values_smem": _matrix((stages, OUTPUTS, INPUTS // 2), values.dtype),
        "x_smem": _matrix((stages, tiles.rows, INPUTS), x.dtype),
        # The words as they come, and as the instruction names them.
        "image_smem": plgpu.RefUnion(
            plgpu.SMEM((stages, 1, 1, OUTPUTS, 4), jnp.int32),
            plgpu.SMEM((stages, 1, 1, OUTPUTS, INPUTS // 2), jnp.uint2),
        ),
        "out_smem": _matrix((2, stored, OUTPUTS), out_dtype),
        "sums_tmem": plgpu.TMEM(
            (OUTPUTS, 2 * tiles.rows), instructions.sum_dtype(x.dtype)
        ),
        "image_tmem": plgpu.TMEM(
            (OUTPUTS, stages * INPUTS // 2),
            jnp.uint2,
            layout=plgpu.TMEMLayout.SPARSE_METADATA_LAYOUT,
        ),
        "fetched": plgpu.Barrier(num_arrivals=3, num_barriers=stages),
        "consumed": ordered(num_barriers=stages),
        "summed": ordered(num_barriers=2),
        "stored": ordered(num_barriers=2),
    }
    if interpret is not False:
        # The interpreter has no sparse instruction: it decompresses.
        scratch["image_smem"] = scratch["image_smem"].refs[0]
        scratch["image_tmem"] = _matrix((stages, OUTPUTS, INPUTS), values.dtype)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], features), out_dtype),
        grid=(tiles.blocks,),
        grid_names=("blocks",),
        num_threads=2,
        thread_name="warpgroup",
        scratch_types=scratch,
        interpret=interpret,
    )
    return kernel(values, image, x, *vectors)[:rows]


def _matrix(shape: tuple[int, ...], dtype: Any) -> Any:
    """Ask for shared memory as the instruction reads it."""
    transforms = instructions.layout_in_memory(shape[-1], dtype)
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def _decompress(kept: Any, image: Any) -> Any:
    """Give the dense matrix of one step, for the interpreter."""
    shape = kept.shape[0], 2 * kept.shape[1]
    return PreparedArray(kept, None, image, "sm100", -1, shape).todense()


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
    sums_tmem: Any,
    image_tmem: Any,
    fetched: Any,
    consumed: Any,
    summed: Any,
    stored: Any,
) -> None:
    """Compute tiles of the result, those of one block after the other.

    Barriers: `fetched` and `consumed` of every stage, `summed` and `stored` of the two
    halves of the sums in tensor memory.
    """
    *vectors, out_gmem = refs
    vectors = iter(vectors)
    scales_gmem = next(vectors) if scaled else None
    bias_gmem = next(vectors) if biased else None
    image_words, image_codes = (image_smem,) * 2 if interpret else image_smem
    steps = x_gmem.shape[1] // INPUTS
    shape = out_gmem.shape[1] // OUTPUTS, out_gmem.shape[0] // tiles.rows
    count = shape[0] * shape[1]
    parts = tiles.rows // out_smem.shape[1]
    warpgroup = lax.axis_index("warpgroup")

    @plgpu.nd_loop((count,), collective_axes="blocks")
    def _(loop: Any) -> None:
        (tile,) = loop.index
        # Neighbouring blocks share outputs or rows, which stay in the cache.
        output, row = plgpu.planar_snake(tile, shape, 1, 8)
        here = pl.ds(output * OUTPUTS, OUTPUTS)
        half = lax.rem(loop.local_index, jnp.int32(2))

        def fetch(step: Any, _: Any) -> None:
            number = loop.local_index * steps + step
            slot = lax.rem(number, tiles.stages)

            @pl.when(number >= tiles.stages)
            def _() -> None:
                plgpu.barrier_wait(consumed.at[slot])

            kept = pl.ds(step * (INPUTS // 2), INPUTS // 2)
            rows = pl.ds(row * tiles.rows, tiles.rows)
            for source, target in (
                (values_gmem.at[here, kept], values_smem),
                (image_gmem.at[pl.ds(output, 1), pl.ds(step, 1)], image_words),
                (x_gmem.at[rows, pl.ds(step * INPUTS, INPUTS)], x_smem),
            ):
                plgpu.copy_gmem_to_smem(source, target.at[slot], fetched.at[slot])

        def advance(step: Any, _: Any) -> None:
            slot = lax.rem(loop.local_index * steps + step, tiles.stages)
            plgpu.barrier_wait(fetched.at[slot])
            sums = sums_tmem.at[:, pl.ds(half * tiles.rows, tiles.rows)]
            multiply = functools.partial(
                plgpu.tcgen05_mma,
                sums,
                b=x_smem.at[slot].T,
                barrier=consumed.at[slot],
                accumulate=step > 0,
            )
            if interpret:
                dense = image_tmem.at[slot]
                dense[...] = _decompress(values_smem[slot], image_words[slot])
                plgpu.commit_smem()
                multiply(dense)
            else:
                # A part of tensor memory for each stage: it is free when the stage is.
                codes = image_tmem.at[:, pl.ds(slot * (INPUTS // 2), INPUTS // 2)]
                plgpu.async_copy_sparse_metadata_to_tmem(image_codes.at[slot], codes)
                multiply(values_smem.at[slot], a_sparse_metadata=codes)

            @pl.when(step == steps - 1)
            def _() -> None:
                plgpu.tcgen05_commit_arrive(summed.at[half])

        @pl.when(warpgroup == 0)
        def _() -> None:
            @plgpu.warp_map
            def _(warp: Any) -> None:
                @pl.when(warp == 0)
                def _() -> None:
                    lax.fori_loop(0, steps, fetch, None)

                # The half was stored before it is summed into again.
                @pl.when((warp == 1) & (loop.local_index > 1))
                def _() -> None:
                    plgpu.barrier_wait(stored.at[half])

                @pl.when(warp == 1)
                def _() -> None:
                    lax.fori_loop(0, steps, advance, None)

        @pl.when(warpgroup == 1)
        def _() -> None:
            plgpu.barrier_wait(summed.at[half])
            rows = out_smem.shape[1]
            for part in range(parts):
                columns = pl.ds(half * tiles.rows + part * rows, rows)
                sums = plgpu.async_load_tmem(sums_tmem.at[:, columns])

                def of_outputs(vector: Any, shape: Any = sums.shape) -> Any:
                    layout = plgpu.Layout.TCGEN05.reduce(1)
                    loaded = plgpu.load(vector.at[here], layout=layout, optimized=False)
                    return lax.broadcast_in_dim(loaded, shape, (0,))

                scales = of_outputs(scales_gmem) if scaled else None
                bias = of_outputs(bias_gmem) if biased else None
                done = finishing.finish(sums, scales, bias, activation, out_gmem.dtype)
                done = plgpu.layout_cast(done, plgpu.Layout.TCGEN05_TRANSPOSED)
                # All but the last copy have read what they store.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                place = out_smem.at[lax.rem(loop.local_index * parts + part, 2)]
                place.T[...] = done
                plgpu.commit_smem()
                there = pl.ds(row * tiles.rows + part * rows, rows)
                plgpu.copy_smem_to_gmem(place, out_gmem.at[there, here])
            plgpu.wait_load_tmem()
            plgpu.barrier_arrive(stored.at[half])

    # A block ends when nothing arrives at its barriers any more.
    @pl.when(warpgroup == 0)
    def _() -> None:
        own = lax.div(count - 1 - lax.axis_index("blocks"), tiles.blocks) + 1

        @plgpu.warp_map
        def _(warp: Any) -> None:
            for slot in range(tiles.stages):

                @pl.when((warp == 0) & (slot < own * steps))
                def _(slot: int = slot) -> None:
                    plgpu.barrier_wait(consumed.at[slot])

            for half in range(2):

                @pl.when((warp == 1) & (half < own))
                def _(half: int = half) -> None:
                    plgpu.barrier_wait(stored.at[half])

    plgpu.wait_smem_to_gmem(0)
