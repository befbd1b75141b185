"""Products with blocks that tensor cores are not made for.

As `fan_in`, except that the outputs of a block share its inputs: a thread that has read
an input multiplies it for up to eight outputs. The inputs of all blocks of a column
follow each other in memory and are what a warp goes through, a `slot` each.
"""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nmjax.kernels.gpu import chunks, floats, gathering, lanes
from nmjax.kernels.gpu.chunks import L2, WARPS, Adder, Work
from nmjax.kernels.gpu.gathers import CONFLICTS, LINE, PIECE, Lines
from nmjax.kernels.gpu.lanes import Int, Truth
from nmjax.kernels.gpu.memory import Memory
from nmjax.kernels.gpu.tiles import PROCESSORS

OUTPUTS = 8
"""Outputs of a thread at most."""

_INPUTS = ("float32", "bfloat16", "float16")
_VALUES = (*_INPUTS, "int8", "float8_e4m3fn", "float8_e5m2")


def refusal(values: Any, x: Any) -> str:
    """Say why the kernel does not serve a product; empty if it does.

    Args:
      values: blocks ``(blocks, inputs, outputs)``, an array or its shape and dtype.
      x: inputs ``(batch, K)``.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nmjax.kernels.gpu import narrow
      >>> w = jax.ShapeDtypeStruct((0, 1, 16), jnp.float32)
      >>> narrow.refusal(w, jax.ShapeDtypeStruct((3, 4), jnp.float32))
      'there is nothing to compute'
    """
    for name, array, known, rank in (
        ("values", values, _VALUES, 3),
        ("x", x, _INPUTS, 2),
    ):
        if array.ndim != rank:
            return f"{name} of shape {array.shape} have not {rank} axes"
        if str(array.dtype) not in known:
            return f"{name} are {array.dtype}; the kernel takes {', '.join(known)}"
    if not (math.prod(values.shape) and math.prod(x.shape)):
        return "there is nothing to compute"
    elements = max(values.size, x.size)
    if elements > 2**30:
        return f"an array has {elements} elements; the kernel counts up to 2**30"
    return ""


class Tiles(NamedTuple):
    """What a thread block computes, and how.

    Attributes:
      rows: rows of x, a power of two.
      outputs: outputs, a multiple of what all warps take at a time.
      inputs: inputs that are in shared memory at a time.
      warpgroups: warpgroups of a thread block: 1 or 2.
    """

    rows: int
    outputs: int
    inputs: int
    warpgroups: int


def multiply(
    values: Array,
    rows: Array,
    starts: Array,
    x: Array,
    outputs: int,
    *,
    scales: Array | None = None,
    bias: Array | None = None,
    activation: str | None = None,
    out_dtype: Any,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Array:
    """Multiply with blocks of any size.

    Args:
      values: the blocks, ``(blocks, inputs, outputs)``.
      rows: number of each block along the inputs, ``(blocks,)``, unsigned.
      starts: the first block of each column, and behind the last column the number of
        blocks, int32 ``(columns + 1,)``.
      x: inputs, ``(batch, K)``.
      outputs: outputs F of the product.
      scales: None, or a factor of each block, ``(blocks, 1, 1)``.
      bias: None, or ``(F,)``.
      activation: of `finishing.ACTIVATIONS`.
      out_dtype: dtype of the results.
      tiles: sizes. Default: `choose`.
      interpret: `plgpu.InterpretGPUParams` to run without a GPU.

    Returns:
      The product, ``(batch, F)``.
    """
    (batch, length), block = x.shape, values.shape[1:]
    if tiles is None:
        tiles = choose(values, x, outputs)
    work = Work(
        batch=batch,
        length=length,
        outputs=outputs,
        lines=Lines.of(tiles.rows, x.dtype),
        tile=tiles.outputs,
        inputs=tiles.inputs,
        warpgroups=tiles.warpgroups,
        unit=unit(block[1]),
    )
    weights = [values, rows, starts]
    if scales is not None:
        weights.append(scales.reshape(-1).astype(jnp.float32))
    return gathering.product(
        work,
        _Blocks(len(values), block[0], block[1], scales is not None),
        weights,
        x,
        scales=None,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype,
        interpret=interpret,
    )


def unit(outputs: int) -> int:
    """Give how many outputs of a block a thread takes.

    Example:
      >>> from nmjax.kernels.gpu import narrow
      >>> narrow.unit(16), narrow.unit(6), narrow.unit(1)
      (8, 2, 1)
    """
    return math.gcd(outputs, OUTPUTS)


def choose(values: Any, x: Any, outputs: int) -> Tiles:
    """Choose tiles by an estimate of what is read and multiplied.

    Args:
      values: blocks ``(blocks, inputs, outputs)``, an array or its shape and dtype.
      x: inputs ``(batch, K)``.
      outputs: outputs F of the product.

    Returns:
      The tiles.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nmjax.kernels.gpu import narrow
      >>> w = jax.ShapeDtypeStruct((14_736, 1, 16), jnp.float32)
      >>> x = jax.ShapeDtypeStruct((1, 3072), jnp.float32)
      >>> narrow.choose(w, x, 768).rows
      1
    """
    batch, length = x.shape
    size = jnp.dtype(x.dtype).itemsize
    own = unit(values.shape[2])
    # Slots of an output, on average.
    slots = values.size / outputs
    options = []
    for rows in (1, 2, 4, 8, 16, 32):
        if rows > 1 << (batch - 1).bit_length():
            continue
        lines = Lines.of(rows, x.dtype)
        row_tiles = -(-batch // rows)
        units = -(-outputs * row_tiles // own // PROCESSORS)
        warpgroups = 1 if units <= WARPS else 2
        step = own * WARPS * warpgroups
        tile = min(-(-units * own // step) * step, 256)
        inputs = chunks.chunk(lines, length, tile)
        parts = -(-length // inputs)
        weight = own * jnp.dtype(values.dtype).itemsize + 4
        copied = rows * length * size
        weights = tile / own * slots * weight
        # Of a slot: its line and weights, for each thread, and the multiplications.
        passes = CONFLICTS[lines.pieces] * lines.bytes / LINE
        passes = max(passes + weight * lines.lanes / LINE, own * rows / 128)
        adding = tile / own * (slots + parts * lines.groups / 2) * passes
        adding += tile * parts * 10  # sums of threads are added up
        if parts > 1:
            clocks = max((copied + weights) / L2, adding)
        else:
            clocks = copied / L2 + max(weights / L2, adding)
        tiles = row_tiles * -(-outputs // tile)
        clocks *= max(1.0, tiles / PROCESSORS)
        options.append((clocks, -rows, Tiles(rows, tile, inputs, warpgroups)))
    return min(options)[-1]


class _Blocks(NamedTuple):
    """Sums over the inputs of all blocks of a column."""

    blocks: int
    inputs: int
    outputs: int
    scaled: bool
    cursors: bool = True

    @property
    def ahead(self) -> int:
        return 2 + self.scaled + unit(self.outputs)

    def interpret(
        self, work: Work, refs: list[Any], first: Any, start: Any, tile: Array
    ) -> Array:
        values, rows, starts, *scales = (ref[...] for ref in refs)
        values = values.astype(jnp.float32)
        if scales:
            values = values * scales[0][:, None, None]
        mine = first + jnp.arange(work.share, dtype=jnp.int32)
        # Outputs behind the last one have no blocks.
        column = jnp.minimum(lax.div(mine, self.outputs), len(starts) - 2)
        block = jnp.arange(self.blocks, dtype=jnp.int32)
        here = (block >= starts[column][:, None]) & (
            block < starts[column + 1][:, None]
        )
        inside = jnp.arange(self.inputs, dtype=jnp.int32)
        places = rows.astype(jnp.int32)[:, None] * self.inputs + inside - start
        there = (places >= 0) & (places < work.inputs)
        lines = jnp.where(
            there[..., None], tile[jnp.where(there, places, 0)], 0
        )  # blocks, inputs, rows
        own = values[:, :, lax.rem(mine, self.outputs)]
        own = jnp.where(here.T[:, None], own, 0)
        return jnp.einsum("nio,nir->or", own, lines, precision="highest")

    def adder(self, work: Work, refs: list[Any]) -> "_Adder":
        return _Adder(work, self, *refs)


class _Adder(Adder):
    """The code of a warp."""

    def __init__(self, work: Work, plan: _Blocks, *refs: Any):
        super().__init__(work)
        self.plan = plan
        self.values, self.rows, self.starts, *self.scales = map(Memory, refs)

    def _bound(self, unit: Int, behind: int) -> Int:
        """Give the first slot of a unit, or the one behind its last."""
        last = self.work.outputs - 1
        output = (self.first + unit * self.work.unit).at_most(last)
        (block,) = self.starts.load(output // self.plan.outputs + behind)
        return Int(block) * self.plan.inputs

    def cursor(self, unit: Int) -> Int:
        return self._bound(unit, 0)

    def load(self, unit: Int) -> list[Any]:
        units = self.work.share // self.work.unit
        unit = unit.at_most(units - 1)
        if self.cursors is None:
            start = self.cursor(unit)
        else:
            start = Int(*self.cursors.load(unit))
        place, *found = self._load(unit, start)
        return [self._bound(unit, 1).value, place.value, *found]

    def kinds(self) -> list[Any]:
        return lanes.integers(2) + [
            *[scales.dtype for scales in self.scales],
            *[self.values.dtype] * self.work.unit,
        ]

    def _load(self, unit: Int, start: Int) -> list[Any]:
        """Load this thread's slot of a window: its input and its weights."""
        plan, own = self.plan, self.work.unit
        slot = (start + self.sums.group).at_most(plan.blocks * plan.inputs - 1)
        block = slot // plan.inputs
        (row,) = self.rows.load(block)
        place = lanes.unsigned(row) * plan.inputs + slot % plan.inputs - self.start
        column = (self.first + unit * own) % plan.outputs
        found = [place]
        for scales in self.scales:
            found += scales.load(block)
        count = min(own, PIECE // self.values.size)
        for i in range(0, own, count):
            at = slot * plan.outputs + column + i
            found += self.values.load(at, count)
        return found

    def add(self, unit: Int, window: list[Any]) -> None:
        work, own = self.work, self.work.unit
        end, place = map(Int, window[:2])
        several = work.chunks > 1
        (start,) = self.cursors.load(unit)
        zeros = self.sums.zeros()
        width = len(zeros)

        @lanes.repeat([Int(start), place, *window[2:], *zeros * own])
        def found(start: Int, place: Int, *carry: Any) -> tuple[Truth, list[Any]]:
            scales = carry[: len(self.scales)]
            values = [floats.to_float(one) for one in carry[len(scales) :][:own]]
            for scale in scales:
                values = [floats.multiply(scale, value) for value in values]
            total = list(carry[len(scales) + own :])
            parts = [total[i : i + width] for i in range(0, len(total), width)]
            stop = start + self.sums.lines.groups
            following = self._load(unit, stop)
            whole = end >= stop
            if several:
                whole = whole & place.below(work.inputs).no().any_in_warp().no()

            def add(values: list[Any], line: list[Any]) -> list[Any]:
                sums = [
                    self.sums.add(part, value, line)
                    for part, value in zip(parts, values, strict=True)
                ]
                return [one for part in sums for one in part]

            def all_there() -> list[Any]:
                return [stop, *add(values, self.sums.gather(place))]

            def some_there() -> list[Any]:
                valid, cursor = start + self.sums.group < end, stop
                if several:
                    # Up to the first input of the next chunk.
                    before = valid & (place < work.inputs)
                    cursor = start + self.sums.count(before)
                    valid = valid & place.below(work.inputs)
                some = [valid.choose(value, floats.constant(0)) for value in values]
                return [cursor, *add(some, self.sums.gather(place, valid))]

            cursor, *total = lanes.choose(whole, all_there, some_there, [stop, *total])
            more = (cursor >= stop) & (cursor < end)
            return more, [cursor, *following, *total]

        cursor, *rest = found
        if several:
            self.cursors.store(unit, [cursor.value])
        total = rest[len(rest) - own * width :]
        for i in range(own):
            self.keep(unit * own + i, total[i * width : (i + 1) * width])
