"""Products with large blocks of 16 bits, which tensor cores multiply.

A thread block computes the outputs of one column of blocks, or a part of them, for a
tile of rows. One warpgroup loads the blocks of the column, and of x the inputs that
they stand at; one or two others multiply. Columns have as many steps as they have
blocks; where there are none, zeros get the bias and the activation like all sums.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nmjax.kernels.gpu import finishing, instructions

_GROUP = 64
"""Rows that a warpgroup multiplies."""

_SHARED = 224 * 1024
"""Bytes of shared memory that a thread block takes at most."""


class Tiles(NamedTuple):
    """What a thread block computes on tensor cores, and how.

    Attributes:
      groups: warpgroups that multiply, 64 rows each.
      inputs: inputs of a step, which divide those of a block.
      outputs: outputs, which divide those of a block.
      stages: steps that are in shared memory at once.
    """

    groups: int
    inputs: int
    outputs: int
    stages: int


def choose(values: Any, x: Any) -> Tiles:
    """Choose tiles: as large steps as blocks allow, as many as there is room for.

    Args:
      values: blocks ``(blocks, inputs, outputs)``, an array or its shape and dtype.
      x: inputs ``(batch, K)``.

    Returns:
      The tiles.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nmjax.kernels.gpu import wide
      >>> w = jax.ShapeDtypeStruct((8, 64, 64), jnp.bfloat16)
      >>> wide.choose(w, jax.ShapeDtypeStruct((256, 128), jnp.bfloat16))
      Tiles(groups=2, inputs=64, outputs=64, stages=8)
    """
    _, inputs, outputs = values.shape
    groups = 1 if x.shape[0] <= _GROUP else 2
    part = next(size for size in range(128, 0, -16) if outputs % size == 0)
    rows = _GROUP * groups
    room = _SHARED - 4 * rows * part  # beside results of 32 bits
    steps = [size for size in (128, 64, 32, 16) if inputs % size == 0]
    stages = [room // (2 * step * (rows + part)) for step in steps]
    step, most = next(
        (one for one in zip(steps, stages, strict=True) if one[1] >= 4), (16, 4)
    )
    return Tiles(groups, step, part, min(16, most))


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The kernel for operands of certain shapes.

    Attributes:
      block: inputs and outputs of a block.
      tiles: sizes.
      activation: what is applied to the results.
      biased: whether a bias follows x.
    """

    block: tuple[int, int]
    tiles: Tiles
    activation: str | None
    biased: bool

    def body(self, *refs: Any, **shared: Any) -> None:
        """Run in every warpgroup."""
        lax.cond(
            lax.axis_index("group") == self.tiles.groups,
            lambda: self.load(*refs[:4], **shared),
            lambda: self.compute(refs[2], refs[4:], **shared),
        )

    def steps(self, starts: Any) -> tuple[Any, Any]:
        """Give the first and the last step of this column."""
        column = lax.div(lax.axis_index("part"), jnp.int32(self.parts))
        a_block = self.block[0] // self.tiles.inputs
        return starts[column] * a_block, starts[column + 1] * a_block

    @property
    def parts(self) -> int:
        """Parts of the outputs of a block."""
        return self.block[1] // self.tiles.outputs

    def slot(self, step: Any) -> Any:
        """Give the stage of a step."""
        return lax.rem(step, jnp.int32(self.tiles.stages))

    def load(
        self,
        values: Any,
        rows: Any,
        starts: Any,
        x: Any,
        *,
        x_shared: Any,
        values_shared: Any,
        full: Any,
        free: Any,
        **_: Any,
    ) -> None:
        """Load what steps multiply, as soon as there is room for it."""
        plgpu.set_max_registers(40, action="decrease")
        tiles = self.tiles
        first, last = self.steps(starts)
        a_block = self.block[0] // tiles.inputs
        part = lax.rem(lax.axis_index("part"), jnp.int32(self.parts)) * tiles.outputs
        count = _GROUP * tiles.groups
        own = pl.ds(lax.axis_index("row_tile") * count, count)

        def load_step(step: Any, _: None) -> None:
            slot = self.slot(step - first)

            @pl.when(step - first >= tiles.stages)
            def _wait() -> None:
                plgpu.barrier_wait(free.at[slot])

            block = lax.div(step, jnp.int32(a_block))
            inside = lax.rem(step, jnp.int32(a_block)) * tiles.inputs
            start = rows[block].astype(jnp.int32) * self.block[0] + inside
            plgpu.copy_gmem_to_smem(
                x.at[own, pl.ds(start, tiles.inputs)], x_shared.at[slot], full.at[slot]
            )
            plgpu.copy_gmem_to_smem(
                values.at[
                    block, pl.ds(inside, tiles.inputs), pl.ds(part, tiles.outputs)
                ],
                values_shared.at[slot],
                full.at[slot],
            )

        lax.fori_loop(first, last, load_step, None)

        # Every signal is waited for, as Pallas asks for where a barrier ends.
        @pl.loop(lax.max(last - first - tiles.stages, jnp.int32(0)), last - first)
        def _drain(step: Any) -> None:
            plgpu.barrier_wait(free.at[self.slot(step)])

    def compute(
        self,
        starts: Any,
        refs: Any,
        *,
        x_shared: Any,
        values_shared: Any,
        out: Any,
        full: Any,
        free: Any,
    ) -> None:
        """Multiply, finish and store."""
        plgpu.set_max_registers(232, action="increase")
        tiles, group = self.tiles, lax.axis_index("group")
        *bias, results = refs
        first, last = self.steps(starts)
        outputs = pl.ds(lax.axis_index("part") * tiles.outputs, tiles.outputs)
        if bias:
            # Loaded now, to be there when the sums are.
            layout = plgpu.Layout.WGMMA.reduce(0)
            bias = [instructions.load(bias[0].at[outputs], layout)]

        def add_up(total: Any) -> Any:
            def step(step: Any, _: None) -> None:
                slot = self.slot(step - first)
                plgpu.barrier_wait(full.at[slot])
                own = x_shared.at[slot, pl.ds(group * _GROUP, _GROUP)]
                plgpu.wgmma(total, own, values_shared.at[slot])
                # The step before this one is done, and its stage free.
                plgpu.wgmma_wait(1)

                @pl.when(step > first)
                def _free() -> None:
                    plgpu.barrier_arrive(free.at[self.slot(step - first - 1)])

            lax.fori_loop(first, last, step, None)
            found = total[...]

            @pl.when(last > first)
            def _free_last() -> None:
                plgpu.barrier_arrive(free.at[self.slot(last - first - 1)])

            return found

        sums = plgpu.WGMMAAccumulatorRef((_GROUP, tiles.outputs), jnp.float32)
        total = pl.run_scoped(add_up, sums)
        wide = [
            lax.broadcast_in_dim(one.astype(jnp.float32), total.shape, (1,))
            for one in bias
        ]
        total = finishing.finish(
            total, None, wide[0] if bias else None, self.activation, out.dtype
        )
        out[group] = total
        plgpu.commit_smem()
        row = (lax.axis_index("row_tile") * tiles.groups + group) * _GROUP
        plgpu.copy_smem_to_gmem(out.at[group], results.at[pl.ds(row, _GROUP), outputs])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def scratch(self, dtype: Any, out_dtype: Any) -> dict[str, Any]:
        """Give shared memory and barriers."""
        tiles = self.tiles

        def stored(*shape: int, dtype: Any, width: int) -> Any:
            transforms = instructions.layout_in_memory(width, dtype)
            return plgpu.SMEM(shape, dtype, transforms=transforms)

        count = _GROUP * tiles.groups
        # The instruction wants both operands swizzled alike.
        width = math.gcd(tiles.inputs, tiles.outputs, 64)
        return {
            "x_shared": stored(
                tiles.stages, count, tiles.inputs, dtype=dtype, width=width
            ),
            "values_shared": stored(
                tiles.stages, tiles.inputs, tiles.outputs, dtype=dtype, width=width
            ),
            "out": stored(
                tiles.groups,
                _GROUP,
                tiles.outputs,
                dtype=out_dtype,
                width=tiles.outputs,
            ),
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=tiles.stages),
            "free": plgpu.Barrier(num_arrivals=tiles.groups, num_barriers=tiles.stages),
        }


def multiply(
    values: Array,
    rows: Array,
    starts: Array,
    x: Array,
    outputs: int,
    *,
    tiles: Tiles,
    bias: Array | None,
    activation: str | None,
    out_dtype: Any,
    interpret: Any,
) -> Array:
    """Run the kernel, as `blocks.multiply` asks for it."""
    batch = x.shape[0]
    # The memory engine reads zeros where rows are missing and leaves out what it would
    # write there, but a tile of eight rows is missing as a whole or, if it is the only
    # one, in part. The interpreter reads nothing beyond an array.
    count = _GROUP * tiles.groups
    step = count if interpret else 8 if batch > 8 else batch
    if missing := -batch % step:
        x = jnp.pad(x, ((0, missing), (0, 0)))
    _, inside, across = values.shape
    kernel = _Kernel((inside, across), tiles, activation, bias is not None)
    results = plgpu.kernel(
        kernel.body,
        out_type=jax.ShapeDtypeStruct((x.shape[0], outputs), out_dtype),
        scratch_types=kernel.scratch(x.dtype, out_dtype),
        grid=(-(-batch // count), outputs // tiles.outputs),
        grid_names=("row_tile", "part"),
        num_threads=tiles.groups + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # exp by the instruction, to 2 ulp
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
    )(values, rows, starts, x, *([] if bias is None else [bias]))
    return results[:batch]
