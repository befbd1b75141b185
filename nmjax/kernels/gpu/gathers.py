"""Tiles of inputs in shared memory, and sums of rows gathered from them.

Products with few weights an output read an input wherever a weight points to, and use
it for one weight (constant fan-in) or for a few (narrow blocks). Here a tile of x lies
in shared memory with its inputs first, so that one input of all rows of the tile is one
contiguous line, and a warp gathers lines.

How a warp reads a line of up to 128 bytes: `lanes` threads take one weight, each a
piece of 16 bytes of the line, or two pieces where the line has eight. Shared memory
serves eight threads at a time, with 128 bytes if no two pieces share their banks:

- 128 bytes a line: two weights at a time, one from the first half of its line and the
  other from the second half of its own, then the reverse. Never a conflict.
- 64 bytes: two whole lines at a time, which share banks in one of two cases: 1.5 times
  as long for weights at random places.
- 32 and 16 bytes: four and eight lines, 2.1 and 2.6 times as long.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp

from nmjax.kernels.gpu.floats import add, constant, exchange, multiply_add, to_float
from nmjax.kernels.gpu.lanes import WARP, WARPGROUP, Int, Truth, loop, thread
from nmjax.kernels.gpu.memory import Memory

LINE, PIECE = 128, 16
"""Bytes of a line at most, and of one load of a thread."""

CONFLICTS = {8: 1.0, 4: 1.5, 2: 2.1, 1: 2.6}
"""Expected passes for lines of so many pieces at random places, over the fewest."""


@dataclasses.dataclass(frozen=True)
class Lines:
    """How a tile of inputs is stored in shared memory.

    Attributes:
      rows: rows of x in a line; a power of two.
      dtype: dtype of the inputs in the tile.
    """

    rows: int
    dtype: Any

    @classmethod
    def of(cls, rows: int, dtype: Any) -> "Lines":
        """Take the dtype of x, or float32 where a line would be shorter than a piece.

        Example:
          >>> import jax.numpy as jnp
          >>> from nmjax.kernels.gpu import gathers
          >>> gathers.Lines.of(32, jnp.bfloat16).bytes
          64
          >>> gathers.Lines.of(1, jnp.bfloat16).bytes
          4
        """
        short = rows * jnp.dtype(dtype).itemsize < PIECE
        return cls(rows, jnp.dtype(jnp.float32 if short else dtype))

    @property
    def bytes(self) -> int:
        """Bytes of a line."""
        return self.rows * self.dtype.itemsize

    @property
    def width(self) -> int:
        """Rows of a piece."""
        return min(self.rows, PIECE // self.dtype.itemsize)

    @property
    def pieces(self) -> int:
        """Pieces of a line."""
        return self.rows // self.width

    @property
    def lanes(self) -> int:
        """Threads that take one weight together."""
        return min(self.pieces, 4)

    @property
    def turns(self) -> int:
        """Pieces that each of them reads."""
        return self.pieces // self.lanes

    @property
    def groups(self) -> int:
        """Weights that a warp takes at a time."""
        return WARP // self.lanes


class Filler:
    """Copies inputs of a tile from x, turning them over on the way.

    A unit is what a thread copies at a time. It loads pieces of 16 bytes of several
    rows, neighbouring threads from the same rows, and stores pieces of lines,
    neighbouring threads to the same line.
    """

    def __init__(
        self, lines: Lines, x: Any, shape: tuple[int, int], row: Int, tile: Any
    ):
        """Describe the copy.

        Args:
          lines: how the tile is stored.
          x: reference to the inputs in global memory.
          shape: rows and inputs of x.
          row: first row of the tile.
          tile: reference to inputs of the tile in shared memory, ``(inputs, rows)``.
        """
        self.lines, self.x, self.tile = lines, Memory(x), Memory(tile)
        self.shape, self.row = shape, row
        # Short lines are converted on the way, an input at a time.
        self.step = lines.width if self.x.size == self.tile.size else 1
        self.step = self.step if self.step * self.x.size == PIECE else 1

    def units(self, inputs: int) -> int:
        """Count the units of so many inputs."""
        return self.lines.pieces * (inputs // self.step)

    def load(self, unit: Int, first: Int) -> list[Any]:
        """Load a unit of the inputs from `first` on into registers."""
        batch, length = self.shape
        piece, place = unit % self.lines.pieces, unit // self.lines.pieces
        at = first + place * self.step
        found = []
        for i in range(self.lines.width):
            row = self.row + piece * self.lines.width + i
            # Rows and inputs behind the last are not used: read others instead.
            start = row.at_most(batch - 1) * length
            if length % self.step:
                for j in range(self.step):
                    found += self.x.load(start + (at + j).at_most(length - 1))
            else:
                last = length - self.step
                found += self.x.load(start + at.at_most(last), self.step)
        return found

    def store(self, unit: Int, found: list[Any]) -> None:
        """Store a unit to the tile."""
        lines = self.lines
        piece, place = unit % lines.pieces, unit // lines.pieces
        packed = []
        for j in range(self.step):
            elements = found[j :: self.step]
            if self.x.size != self.tile.size:
                elements = [to_float(element) for element in elements]
            packed.append(self.tile.pack(elements))
        # Eight threads store 128 bytes at a time. Where these are of several units,
        # each begins with another one of its lines, or they would share their banks.
        shared = LINE // lines.bytes
        turn = place // max(1, shared // self.step) % min(shared, self.step)
        distance = 1
        while distance < min(shared, self.step):
            odd = (turn & distance).equals(distance)
            packed = [
                [odd.choose(b, a) for a, b in zip(*two, strict=True)]
                for two in zip(
                    packed, packed[distance:] + packed[:distance], strict=True
                )
            ]
            distance *= 2
        for j, words in enumerate(packed):
            line = place * self.step + (turn + j) % self.step
            self.tile.store_words(line * lines.rows + piece * lines.width, words)

    def run(self, first: Int, inputs: int, done: int = 0) -> None:
        """Copy all units from `done` on, with the threads of a warpgroup.

        Args:
          first: the first of the inputs in x.
          inputs: how many.
          done: units that are there already.
        """

        @loop(thread() + done, self.units(inputs), WARPGROUP, [])
        def _(unit: Int) -> list[Any]:
            self.store(unit, self.load(unit, first))
            return []


class Sums:
    """Sums of the rows of a tile, spread over the threads of a warp.

    Thread l of a warp adds up the weights of group ``l // lanes``, for the rows of
    its pieces of a line.
    """

    def __init__(self, lines: Lines, tile: Any = None):
        """Describe where a thread reads.

        Args:
          lines: how the tile is stored.
          tile: reference to the tile in shared memory, if it is to be read.
        """
        self.lines = lines
        lane = thread() % WARP
        self.group, self.lane = lane // lines.lanes, lane % lines.lanes
        self.pieces = []
        for turn in range(lines.turns) if tile is not None else ():
            piece = self.lane + (self.group % lines.turns ^ turn) * lines.lanes
            self.pieces.append(Memory(tile).shifted(piece * lines.width))

    def count(self, truth: Truth) -> Int:
        """Count the groups for which it holds."""
        return truth.count_in_warp() // self.lines.lanes

    def zeros(self) -> list[Any]:
        """Start."""
        return [constant(0)] * (self.lines.turns * self.lines.width)

    def gather(self, place: Int, valid: Truth | None = None) -> list[Any]:
        """Load this thread's part of a line, as float32.

        Args:
          place: the line.
          valid: whether there is one; zeros if not.
        """
        start, width = place * self.lines.rows, self.lines.width
        found = []
        for piece in self.pieces:
            if valid is None:
                found += piece.load_floats(start, width)
            else:
                found += piece.load_floats_if(valid, start, width)
        return found

    def add(self, total: list[Any], value: Any, line: list[Any]) -> list[Any]:
        """Add a multiple of a line."""
        return [multiply_add(value, a, b) for a, b in zip(line, total, strict=True)]

    def collect(self, total: list[Any]) -> tuple[Truth, Int, list[Any]]:
        """Add up the sums of all groups.

        Returns:
          Whether this thread has rows that no other has, the first of them, and their
          sums.
        """
        width, distance = self.lines.width, self.lines.lanes
        # Groups have taken the pieces in different orders: each keeps some of them.
        parts = [total[i : i + width] for i in range(0, len(total), width)]
        piece = self.lane
        while len(parts) > 1:
            parts = [
                [add(x, exchange(y, distance)) for x, y in zip(*two, strict=True)]
                for two in zip(parts[::2], parts[1::2], strict=True)
            ]
            piece = piece + (thread() & distance)
            distance *= 2
        (total,) = parts
        row = piece * width
        while distance < WARP and len(total) > 1:
            half = len(total) // 2
            upper = (thread() & distance).equals(distance)
            kept = [upper.choose(total[half + i], total[i]) for i in range(half)]
            sent = [upper.choose(total[i], total[half + i]) for i in range(half)]
            total = [
                add(a, exchange(b, distance)) for a, b in zip(kept, sent, strict=True)
            ]
            row = row + upper.choose(Int(half), Int(0))
            distance *= 2
        first = (thread() % WARP).below(distance)
        while distance < WARP:
            total = [add(a, exchange(a, distance)) for a in total]
            distance *= 2
        return first, row, total
