"""The kernel of all 2:4 products on Hopper.

A thread block has three warpgroups: two compute the sums of 64 or 128 outputs each, of
the same rows of x, and one loads what they need, some steps ahead. A block stays on its
multiprocessor and takes one tile of sums after the other, and loads for the next tile
while it stores the last one.

The sparse operand of the instruction is its first one, so that sums are (F, rows); they
are turned on their way out.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from nmjax.formats import images
from nmjax.kernels.gpu import finishing, instructions, tiling
from nmjax.kernels.gpu.tiling import Tiles

_LOADING, _COMPUTING = 40, 232
"""Registers of a thread that loads and of one that computes; a block has 64 K."""


class _Place(NamedTuple):
    """Where a tile of sums is: first output and row, split, first and last step."""

    feature: Any
    row: Any
    split: Any
    first: Any
    last: Any


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel for operands of certain shapes and dtypes.

    Attributes:
      batch: rows of x.
      features: F.
      inputs: K.
      word_inputs: inputs that a word of the image describes.
      values_dtype: dtype of the values.
      x_dtype: dtype of x.
      out_dtype: dtype of the results.
      given: names of the vectors that follow x: "scales", "bias".
      activation: what is applied to the results.
      tiles: sizes.
      interpreted: whether instructions are emulated.
    """

    batch: int
    features: int
    inputs: int
    word_inputs: int
    values_dtype: Any
    x_dtype: Any
    out_dtype: Any
    given: tuple[str, ...]
    activation: str | None
    tiles: Tiles
    interpreted: bool

    @property
    def block(self) -> int:
        """Outputs of a tile."""
        return tiling.GROUPS * self.tiles.features

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along the outputs, those of a cluster counted once, and along rows."""
        along = self.features // (self.block * self.tiles.cluster)
        return along, -(-self.batch // self.tiles.rows)

    @property
    def count(self) -> int:
        """Tiles that a block, or a cluster of them, takes from."""
        return self.grid[0] * self.grid[1] * self.tiles.splits

    @property
    def piece(self) -> int:
        """Rows that are stored at once."""
        return tiling.piece(self.tiles, self.out_dtype)

    def scratch(self) -> dict[str, Any]:
        """Give shared memory and barriers."""
        tiles, kept = self.tiles, self.tiles.inputs // 2
        words = tiles.inputs // self.word_inputs
        slots = min(2, tiles.rows // self.piece)

        def stored(shape: tuple[int, ...], dtype: Any) -> Any:
            transforms = instructions.layout_in_memory(shape[-1], dtype)
            return plgpu.SMEM(shape, dtype, transforms=transforms)

        empty: Any = plgpu.Barrier
        if tiles.cluster > 1:  # what one block frees, another may fill
            empty = lambda **sizes: plgpu.ClusterBarrier(  # noqa: E731
                collective_axes=("member",), **sizes
            )
        return {
            "values_in": stored((tiles.stages, self.block, kept), self.values_dtype),
            "image_in": plgpu.SMEM(
                (tiles.stages, self.block // images.FEATURES, words, images.THREADS),
                jnp.int32,
            ),
            "x_in": stored((tiles.stages, tiles.rows, tiles.inputs), self.x_dtype),
            "out": stored(
                (tiling.GROUPS, slots, self.piece, tiles.features), self.out_dtype
            ),
            "full": plgpu.Barrier(num_arrivals=3, num_barriers=tiles.stages),
            "free": empty(num_arrivals=tiling.GROUPS, num_barriers=tiles.stages),
        }

    def body(self, *arrays: Any, full: Any, free: Any, out: Any, **blocks: Any) -> None:
        """Run in every warpgroup of every block."""
        *operands, results = arrays
        lax.cond(
            lax.axis_index("group") == tiling.GROUPS,
            lambda: self.load(operands[:3], blocks, full, free),
            lambda: self.compute(operands[3:], blocks, full, free, out, results),
        )

    def place(self, index: Any) -> _Place:
        """Give the place of a tile in this block."""
        tiles, splits = self.tiles, jnp.int32(self.tiles.splits)
        split, index = lax.rem(index, splits), lax.div(index, splits)
        feature, row = plgpu.planar_snake(index, self.grid, 1, tiles.panel)
        if tiles.cluster > 1:
            feature = feature * tiles.cluster + lax.axis_index("member")
        steps = self.inputs // tiles.inputs
        first, last = (lax.div((split + i) * steps, splits) for i in (0, 1))
        return _Place(feature * self.block, row * tiles.rows, split, first, last)

    def slot(self, step: Any) -> Any:
        """Give the part of shared memory for a step."""
        return lax.rem(step, jnp.int32(self.tiles.stages))

    def load(self, arrays: Any, blocks: Any, full: Any, free: Any) -> None:
        """Load blocks of all operands, as soon as there is room for them."""
        plgpu.set_max_registers(_LOADING, action="decrease")
        tiles = self.tiles
        values, image, x = arrays

        def load_tile(info: Any, carry: Any) -> Any:
            place = self.place(info.index[0])
            words = tiles.inputs // self.word_inputs
            outputs = pl.ds(place.feature, self.block)
            word_rows = pl.ds(
                lax.div(place.feature, jnp.int32(images.FEATURES)),
                self.block // images.FEATURES,
            )
            rows = pl.ds(place.row, tiles.rows)

            def load_step(step: Any, done: Any) -> Any:
                slot = self.slot(done)

                @pl.when(done >= tiles.stages)
                def _() -> None:
                    plgpu.barrier_wait(free.at[slot])

                def copy(
                    array: Any, rows: Any, size: int, name: str, **to: Any
                ) -> None:
                    plgpu.copy_gmem_to_smem(
                        array.at[rows, pl.ds(step * size, size)],
                        blocks[name].at[slot],
                        full.at[slot],
                        **to,
                    )

                copy(values, outputs, tiles.inputs // 2, "values_in")
                copy(image, word_rows, words, "image_in")
                shared = {"collective_axes": "member"} if tiles.cluster > 1 else {}
                copy(x, rows, tiles.inputs, "x_in", **shared)
                return done + 1

            return lax.fori_loop(place.first, place.last, load_step, carry)

        done = self.each_tile(load_tile)

        # A block must not end while others still signal to it.
        @pl.loop(lax.max(done - tiles.stages, jnp.int32(0)), done)
        def _(step: Any) -> None:
            plgpu.barrier_wait(free.at[self.slot(step)])

    def each_tile(self, body: Any) -> Any:
        """Run a body for all tiles of this block; carry the number of steps done."""
        return plgpu.nd_loop(
            (self.count,), collective_axes="processor", init_carry=jnp.int32(0)
        )(body)

    def compute(
        self, vectors: Any, blocks: Any, full: Any, free: Any, out: Any, results: Any
    ) -> None:
        """Compute sums, finish and store them."""
        plgpu.set_max_registers(_COMPUTING, action="increase")
        tiles = self.tiles
        group = lax.axis_index("group")

        def compute_tile(info: Any, carry: Any) -> Any:
            place = self.place(info.index[0])
            outputs = pl.ds(place.feature + group * tiles.features, tiles.features)
            # Loaded now, to be there when the sums are.
            by_output = plgpu.Layout.WGMMA.reduce(1)
            loaded = {
                name: instructions.load(array.at[outputs], by_output)
                for name, array in zip(self.given, vectors, strict=True)
            }

            def add_step(step: Any, carry: Any) -> Any:
                done, total = carry
                slot = self.slot(done)
                plgpu.barrier_wait(full.at[slot])
                total = self.add({n: b.at[slot] for n, b in blocks.items()}, total)
                if not tiles.overlap:
                    plgpu.barrier_arrive(free.at[slot])
                else:
                    if not self.interpreted:
                        plgpu.wgmma_wait(1)

                    @pl.when(step > place.first)
                    def _() -> None:
                        plgpu.barrier_arrive(free.at[self.slot(done - 1)])

                return done + 1, total

            total = jnp.zeros(
                (tiles.features, tiles.rows), instructions.sum_dtype(self.x_dtype)
            )
            total = plgpu.layout_cast(total, plgpu.Layout.WGMMA)
            if tiles.overlap and not self.interpreted:
                total = instructions.start(total)
            done, total = lax.fori_loop(
                place.first, place.last, add_step, (carry, total)
            )
            if tiles.overlap:
                if not self.interpreted:
                    total = instructions.finish(total)
                plgpu.barrier_arrive(free.at[self.slot(done - 1)])
            self.store(total, loaded, out, results.at[place.split], place.row, outputs)
            return done

        self.each_tile(compute_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def add(self, blocks: dict[str, Any], total: Any) -> Any:
        """Add the products of one step."""
        tiles = self.tiles
        group = lax.axis_index("group")
        values = blocks["values_in"].at[pl.ds(group * tiles.features, tiles.features)]
        count = tiles.features // images.FEATURES
        image = blocks["image_in"].at[pl.ds(group * count, count)]
        x = blocks["x_in"]
        if self.interpreted:
            total = instructions.emulate(total, values[...], image[...], x[...])
            plgpu.commit_smem()
            return total
        if self.values_dtype != self.x_dtype:
            narrow = instructions.load(values, plgpu.Layout.WGMMA_UPCAST_2X)
            values = instructions.widen(narrow, self.x_dtype)
        apart = not tiles.overlap
        return instructions.multiply_add(
            total, values, image, x, wait=apart, fence=apart
        )

    def store(
        self,
        total: Any,
        vectors: dict[str, Any],
        out: Any,
        results: Any,
        row: Any,
        outputs: Any,
    ) -> None:
        """Finish sums and store them, some rows at a time."""
        group, slots = lax.axis_index("group"), out.shape[1]
        for i in range(self.tiles.rows // self.piece):
            part = total[:, i * self.piece : (i + 1) * self.piece]
            wide = {
                name: lax.broadcast_in_dim(vector.astype(jnp.float32), part.shape, (0,))
                for name, vector in vectors.items()
            }
            part = finishing.finish(
                part,
                wide.get("scales"),
                wide.get("bias"),
                self.activation,
                self.out_dtype,
            )
            staged = out.at[group, i % slots]
            # Of an odd number of parts, the last one and the next tile's first one are
            # staged in the same place.
            plgpu.wait_smem_to_gmem(slots - 1 if i else 0, wait_read_only=True)
            staged.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            rows = pl.ds(row + i * self.piece, self.piece)
            plgpu.copy_smem_to_gmem(staged, results.at[rows, outputs])
