"""Products that gather inputs: what goes through shared memory when.

A thread block computes some outputs for a tile of rows of x. The inputs of these rows
are cut into chunks. One chunk lies in shared memory while its warpgroups add up what
the weights make of it, and while they copy the next one beside it, a piece before each
output and stored after it. Every warpgroup copies a part of each chunk and has outputs
of its own, so that one barrier a chunk is all that they wait for.

How outputs are added up is up to a `Plan`: `fan_in` and `narrow` have one each.
"""

import dataclasses
from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array

from nmjax.kernels.gpu import floats, lanes
from nmjax.kernels.gpu.gathers import Filler, Lines, Sums
from nmjax.kernels.gpu.lanes import WARPGROUP, Int
from nmjax.kernels.gpu.memory import Memory

SHARED = 224 * 1024
"""Bytes of shared memory that a thread block takes at most."""

L2 = 24
"""Bytes that a multiprocessor of Hopper gets from L2 in a clock, if all ask."""

WARPS = WARPGROUP // lanes.WARP
"""Warps of a warpgroup."""


@dataclasses.dataclass(frozen=True)
class Work:
    """Sizes of a product and of its tiles.

    Attributes:
      batch: rows of x.
      length: inputs.
      outputs: outputs.
      lines: how a tile of x is stored.
      tile: outputs of a thread block.
      inputs: inputs of a chunk.
      warpgroups: warpgroups of a thread block.
      unit: outputs that a warp takes at a time.
    """

    batch: int
    length: int
    outputs: int
    lines: Lines
    tile: int
    inputs: int
    warpgroups: int
    unit: int = 1

    @property
    def row_tiles(self) -> int:
        """Tiles of rows."""
        return -(-self.batch // self.lines.rows)

    @property
    def output_tiles(self) -> int:
        """Tiles of outputs."""
        return -(-self.outputs // self.tile)

    @property
    def chunks(self) -> int:
        """Chunks of the inputs."""
        return -(-self.length // self.inputs)

    @property
    def stages(self) -> int:
        """Chunks that are in shared memory at once."""
        return min(2, self.chunks)

    @property
    def share(self) -> int:
        """Outputs of a warpgroup."""
        return self.tile // self.warpgroups

    @property
    def filled(self) -> int:
        """Inputs of a chunk that a warpgroup copies."""
        return self.inputs // self.warpgroups


def chunk(lines: Lines, length: int, outputs: int) -> int:
    """Give the inputs of a chunk: all, or so many that two have room.

    Args:
      lines: how a tile of x is stored.
      length: inputs.
      outputs: outputs of a thread block, whose sums are in shared memory too.

    Returns:
      A multiple of 32.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import chunks
      >>> from nmjax.kernels.gpu.gathers import Lines
      >>> chunks.chunk(Lines(8, jnp.dtype("float32")), 3072, 48)
      3072
      >>> chunks.chunk(Lines(32, jnp.dtype("float32")), 3072, 48)
      768
    """
    room = SHARED - 4 * outputs * (lines.rows + 2)
    whole = -(-length // 32) * 32
    if whole * lines.bytes <= room:
        return whole
    most = room // (2 * lines.bytes) // 32 * 32
    return -(-length // -(-length // most) // 32) * 32


@runtime_checkable
class Plan(Protocol):
    """How outputs are added up."""

    @property
    def cursors(self) -> bool:
        """Whether `Adder` wants cursors also where there is one chunk only."""
        ...

    @property
    def ahead(self) -> int:
        """How many values `Adder.load` gives."""
        ...

    def interpret(
        self, work: Work, refs: list[Any], first: Any, start: Any, tile: Array
    ) -> Array:
        """Add up over a chunk in plain JAX.

        Args:
          work: sizes.
          refs: references to the weights.
          first: the first output of the warpgroup.
          start: the first input of the chunk.
          tile: the chunk, float32 ``(inputs, rows)``.

        Returns:
          Sums of the warpgroup's outputs, ``(share, rows)``.
        """
        ...

    def adder(self, work: Work, refs: list[Any]) -> "Adder":
        """Make what emits the code of a warp."""
        ...


class Adder:
    """Emits code that adds up the outputs of a warpgroup over a chunk."""

    def __init__(self, work: Work):
        """Take the sizes."""
        self.work = work
        self.first = self.start = Int(0)
        self.sums = Sums(work.lines)
        self.cursors: Any = None

    def place(
        self, tile: Any, totals: Any, cursors: Any, first: Int, start: Int
    ) -> None:
        """Say where the warpgroup and its chunk are, as `Plan.interpret` is told."""
        self.sums = Sums(self.work.lines, tile)
        self.totals, self.cursors = Memory(totals), Memory(cursors)
        self.first, self.start = first, start

    def cursor(self, unit: Int) -> Int:
        """Give the first weight of a unit, not knowing where earlier chunks ended."""
        raise NotImplementedError

    def load(self, unit: Int) -> list[Any]:
        """Load what is needed first for a unit, which may be behind the last one."""
        raise NotImplementedError

    def kinds(self) -> list[Any]:
        """Give the types of what `load` gives."""
        raise NotImplementedError

    def add(self, unit: Int, window: list[Any]) -> None:
        """Add up a unit, given what was loaded for it; store it with `keep`."""
        raise NotImplementedError

    def keep(self, output: Int, total: list[Any]) -> None:
        """Store the sums of one output of this warpgroup, spread over the warp."""
        first, row, total = self.sums.collect(total)
        with lanes.when(first):
            for i, one in enumerate(total):
                place = output * (self.work.lines.rows + 1) + row + i
                if self.work.chunks > 1:
                    (old,) = self.totals.load(place)
                    one = floats.add(old, one)
                self.totals.store(place, [one])

    def run(self, ahead: Any, filler: Filler | None, first: Int) -> None:
        """Take all units of the warpgroup, and copy the next chunk meanwhile.

        Args:
          ahead: what was loaded for the first unit, or None.
          filler: copies the next chunk, if there is one.
          first: the first input of the warpgroup's part of it.
        """
        work = self.work
        units = work.share // work.unit
        steps = -(-units // WARPS)
        pieces = 0 if filler is None else filler.units(work.filled)
        warp = lanes.warp()

        if ahead is None:
            ahead = self.load(warp)

        @lanes.loop(0, steps, 1, ahead)
        def _(i: Int, *window: Any) -> list[Any]:
            piece = lanes.thread() + i * WARPGROUP
            found = []
            if filler is not None:
                # Under way while a unit is added up.
                found = filler.load(piece.at_most(pieces - 1), first)
            unit = warp + i * WARPS
            # So is what the next one needs.
            following = self.load(unit + WARPS)
            output = self.first + unit * work.unit
            with lanes.when(unit.below(units) & output.below(work.outputs)):
                self.add(unit, list(window))
            if filler is not None:
                with lanes.when(piece.below(pieces)):
                    filler.store(piece, found)
            return following

        if filler is not None:
            filler.run(first, work.filled, done=steps * WARPGROUP)
