"""The kernel of all 2:4 products on Hopper.

A thread block has three warpgroups: two compute, and one loads what they need, some
steps ahead. The two have other outputs and the same rows of x; or, for few rows, the
same outputs, of which each adds up half of every step. A block stays on its
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
from nmjax.kernels.gpu import finishing, instructions
from nmjax.kernels.gpu.tiles import GROUPS, Tiles

_LOADING, _COMPUTING = 40, 232
"""Registers of a thread that loads and of one that computes; a block has 64 K."""


class _Place(NamedTuple):
    """Where a tile of sums is: first output and row, split, first and last step."""

    feature: Any
    row: Any
    split: Any
    first: Any
    last: Any


class _Shared(NamedTuple):
    """Shared memory and barriers of a block.

    Attributes:
      values: kept values, ``(stages, parts, outputs, kept)``.
      image: their positions, ``(stages, parts, tiles, words, 128)``.
      x: inputs, ``(stages, parts, rows, inputs)``.
      out: results that are being stored, ``(groups, slots, rows, outputs)``.
      full: of every stage, that it was loaded.
      free: of every stage, that nobody reads it any more.
      other: sums of the second warpgroup, where it has the outputs of the first.
      given: that it has stored them.
      taken: that the first one has read them.
    """

    values: Any
    image: Any
    x: Any
    out: Any
    full: Any
    free: Any
    other: Any = None
    given: Any = None
    taken: Any = None


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
    def parts(self) -> int:
        """Parts of a step that different warpgroups add up."""
        return GROUPS if self.tiles.together else 1

    @property
    def grid(self) -> tuple[int, int]:
        """Tiles along the outputs, those of a cluster counted once, and along rows."""
        along = self.features // (self.tiles.block * self.tiles.cluster)
        return along, -(-self.batch // self.tiles.rows)

    @property
    def count(self) -> int:
        """Tiles that a block, or a cluster of them, takes from."""
        return self.grid[0] * self.grid[1] * self.tiles.splits

    @property
    def piece(self) -> int:
        """Rows that are stored at once."""
        return self.tiles.piece(self.out_dtype)

    def scratch(self) -> dict[str, Any]:
        """Give shared memory and barriers."""
        tiles, parts = self.tiles, self.parts
        inputs = tiles.inputs // parts
        first = (tiles.stages, parts)
        slots = min(2, tiles.rows // self.piece)
        sums = instructions.sum_dtype(self.x_dtype)

        def stored(shape: tuple[int, ...], dtype: Any) -> Any:
            transforms = instructions.layout_in_memory(shape[-1], dtype)
            return plgpu.SMEM(shape, dtype, transforms=transforms)

        free = plgpu.Barrier(num_arrivals=GROUPS, num_barriers=tiles.stages)
        if tiles.cluster > 1:  # what one block frees, another may fill
            free = plgpu.ClusterBarrier(
                collective_axes=("member",),
                num_arrivals=GROUPS,
                num_barriers=tiles.stages,
            )
        words = (tiles.block // images.FEATURES, inputs // self.word_inputs)
        shared = _Shared(
            values=stored((*first, tiles.block, inputs // 2), self.values_dtype),
            image=plgpu.SMEM((*first, *words, images.THREADS), jnp.int32),
            x=stored((*first, tiles.rows, inputs), self.x_dtype),
            out=stored(
                (tiles.block // tiles.features, slots, self.piece, tiles.features),
                self.out_dtype,
            ),
            full=plgpu.Barrier(num_arrivals=3 * parts, num_barriers=tiles.stages),
            free=free,
        )
        if tiles.together:
            shared = shared._replace(
                other=stored((tiles.features, tiles.rows), sums),
                given=plgpu.Barrier(),
                taken=plgpu.Barrier(),
            )
        return {name: a for name, a in shared._asdict().items() if a is not None}

    def body(self, *arrays: Any, **shared: Any) -> None:
        """Run in every warpgroup of every block."""
        *operands, results = arrays
        lax.cond(
            lax.axis_index("group") == GROUPS,
            lambda: self.load(operands[:3], _Shared(**shared)),
            lambda: self.compute(operands[3:], results, _Shared(**shared)),
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
        return _Place(feature * tiles.block, row * tiles.rows, split, first, last)

    def slot(self, step: Any) -> Any:
        """Give the stage of a step."""
        return lax.rem(step, jnp.int32(self.tiles.stages))

    def each_tile(self, body: Any) -> Any:
        """Run a body for all tiles of this block; carry the number of steps done."""
        return plgpu.nd_loop(
            (self.count,), collective_axes="processor", init_carry=jnp.int32(0)
        )(body)

    def load(self, arrays: Any, shared: _Shared) -> None:
        """Load blocks of all operands, as soon as there is room for them."""
        plgpu.set_max_registers(_LOADING, action="decrease")
        tiles = self.tiles
        values, image, x = arrays
        inputs = tiles.inputs // self.parts
        together = {"collective_axes": "member"} if tiles.cluster > 1 else {}

        def load_tile(info: Any, carry: Any) -> Any:
            place = self.place(info.index[0])
            outputs = pl.ds(place.feature, tiles.block)
            word_rows = pl.ds(
                lax.div(place.feature, jnp.int32(images.FEATURES)),
                tiles.block // images.FEATURES,
            )
            rows = pl.ds(place.row, tiles.rows)

            def load_step(step: Any, done: Any) -> Any:
                slot = self.slot(done)

                @pl.when(done >= tiles.stages)
                def _() -> None:
                    plgpu.barrier_wait(shared.free.at[slot])

                def copy(array: Any, rows: Any, size: int, to: Any, **how: Any) -> None:
                    for part in range(self.parts):
                        columns = pl.ds((step * self.parts + part) * size, size)
                        plgpu.copy_gmem_to_smem(
                            array.at[rows, columns],
                            to.at[slot, part],
                            shared.full.at[slot],
                            **how,
                        )

                copy(values, outputs, inputs // 2, shared.values)
                copy(image, word_rows, inputs // self.word_inputs, shared.image)
                copy(x, rows, inputs, shared.x, **together)
                return done + 1

            return lax.fori_loop(place.first, place.last, load_step, carry)

        done = self.each_tile(load_tile)

        # A block must not end while others still signal to it.
        @pl.loop(lax.max(done - tiles.stages, jnp.int32(0)), done)
        def _(step: Any) -> None:
            plgpu.barrier_wait(shared.free.at[self.slot(step)])

    def compute(self, vectors: Any, results: Any, shared: _Shared) -> None:
        """Compute sums, finish and store them."""
        plgpu.set_max_registers(_COMPUTING, action="increase")
        tiles = self.tiles

        def compute_tile(info: Any, carry: Any) -> Any:
            place = self.place(info.index[0])
            first = 0 if tiles.together else lax.axis_index("group") * tiles.features
            outputs = pl.ds(place.feature + first, tiles.features)
            # Loaded now, to be there when the sums are.
            by_output = plgpu.Layout.WGMMA.reduce(1)
            loaded = {
                name: instructions.load(array.at[outputs], by_output)
                for name, array in zip(self.given, vectors, strict=True)
            }
            done, total = self.add_up(place, carry, shared)

            def store(total: Any) -> None:
                rows = results.at[place.split]
                self.store(total, loaded, shared.out, rows, place.row, outputs)

            if tiles.together:
                self.join(total, shared, store)
            else:
                store(total)
            return done

        self.each_tile(compute_tile)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    def add_up(self, place: _Place, done: Any, shared: _Shared) -> tuple[Any, Any]:
        """Add up the steps of a tile; give the number of steps done and the sums."""
        tiles = self.tiles
        in_flight = tiles.overlap and not self.interpreted

        def add_step(step: Any, carry: Any) -> Any:
            done, total = carry
            slot = self.slot(done)
            plgpu.barrier_wait(shared.full.at[slot])
            total = self.add(slot, total, shared)
            if not tiles.overlap:
                plgpu.barrier_arrive(shared.free.at[slot])
                return done + 1, total
            if in_flight:
                plgpu.wgmma_wait(1)

            @pl.when(step > place.first)
            def _() -> None:
                plgpu.barrier_arrive(shared.free.at[self.slot(done - 1)])

            return done + 1, total

        sums = instructions.sum_dtype(self.x_dtype)
        total = jnp.zeros((tiles.features, tiles.rows), sums)
        total = plgpu.layout_cast(total, plgpu.Layout.WGMMA)
        if in_flight:
            total = instructions.start(total)
        done, total = lax.fori_loop(place.first, place.last, add_step, (done, total))
        if in_flight:
            total = instructions.finish(total)
        if tiles.overlap:
            plgpu.barrier_arrive(shared.free.at[self.slot(done - 1)])
        return done, total

    def add(self, slot: Any, total: Any, shared: _Shared) -> Any:
        """Add the products of one step."""
        tiles = self.tiles
        group, count = lax.axis_index("group"), tiles.features // images.FEATURES
        part, own = (group, 0) if tiles.together else (0, group)
        values = shared.values.at[
            slot, part, pl.ds(own * tiles.features, tiles.features)
        ]
        image = shared.image.at[slot, part, pl.ds(own * count, count)]
        x = shared.x.at[slot, part]
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

    def join(self, total: Any, shared: _Shared, store: Any) -> None:
        """Give the sums of the second warpgroup to the first one, which stores both."""

        def give() -> None:
            shared.other[...] = total
            plgpu.barrier_arrive(shared.given)
            plgpu.barrier_wait(shared.taken)

        def take() -> None:
            plgpu.barrier_wait(shared.given)
            other = instructions.load(shared.other, plgpu.Layout.WGMMA)
            plgpu.barrier_arrive(shared.taken)
            store(total + other)

        lax.cond(lax.axis_index("group") == 0, take, give)

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
        slots = out.shape[1]
        own = 0 if self.tiles.together else lax.axis_index("group")
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
            staged = out.at[own, i % slots]
            # Of an odd number of parts, the last one and the next tile's first one are
            # staged in the same place.
            plgpu.wait_smem_to_gmem(slots - 1 if i else 0, wait_read_only=True)
            staged.T[...] = plgpu.layout_cast(part, plgpu.Layout.WGMMA_TRANSPOSED)
            plgpu.commit_smem()
            rows = pl.ds(row + i * self.piece, self.piece)
            plgpu.copy_smem_to_gmem(staged, results.at[rows, outputs])
