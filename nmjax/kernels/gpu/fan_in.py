"""Products with constant fan-in weights on a GPU, without dense ones."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num, UInt

from nmjax.kernels.gpu import lanes
from nmjax.kernels.gpu.finishing import ACTIVATIONS, finish
from nmjax.kernels.gpu.gathers import CONFLICTS, LINE, Filler, Lines, Sums
from nmjax.kernels.gpu.lanes import SCALAR, WARPGROUP, Int, Memory, Truth

SHARED = 200 * 1024
"""Bytes of shared memory that tiles of inputs take at most."""

_WARPS = WARPGROUP // lanes.WARP
_INPUTS = ("float32", "bfloat16", "float16")
_VALUES = (*_INPUTS, "int8", "float8_e4m3fn", "float8_e5m2")
_INDICES = ("uint8", "uint16", "uint32")


class Tiles(NamedTuple):
    """What a thread block computes, and how.

    Attributes:
      rows: rows of x, a power of two.
      neurons: neurons, a multiple of 4 for each warpgroup.
      inputs: inputs that are in shared memory at a time. If these are not all, the
        next ones are copied during the sums over these, and indices must ascend.
      slots: neighbouring weights that a thread loads at a time: 1, 2 or 4.
      warpgroups: warpgroups of a thread block: 1, 2 or 4.
    """

    rows: int
    neurons: int
    inputs: int
    slots: int
    warpgroups: int


def refusal(values: Any, indices: Any, x: Any) -> str:
    """Say why the kernel does not serve a product; empty if it does.

    Args:
      values: weights ``(alive, k)``, an array or its shape and dtype.
      indices: the input of each.
      x: inputs ``(batch, K)``.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from nmjax.kernels.gpu import fan_in
      >>> w = jax.ShapeDtypeStruct((8, 2), jnp.float32)
      >>> i = jax.ShapeDtypeStruct((8, 2), jnp.int64)
      >>> fan_in.refusal(w, i, w)
      'indices are int64; the kernel takes uint8, uint16, uint32'
    """
    for name, array, known in (
        ("values", values, _VALUES),
        ("indices", indices, _INDICES),
        ("x", x, _INPUTS),
    ):
        if array.ndim != 2:
            return f"{name} of shape {array.shape} are no matrix"
        if str(array.dtype) not in known:
            return f"{name} are {array.dtype}; the kernel takes {', '.join(known)}"
    if not (math.prod(values.shape) and math.prod(x.shape)):
        return "there is nothing to compute"
    elements = (values.size, x.size, values.shape[0] * x.shape[0])
    if max(elements) >= 2**31:
        return f"an array of {max(elements)} elements is counted with 32 bits"
    return ""


def multiply(
    values: Num[Array, "alive k"],
    indices: UInt[Array, "alive k"],
    x: Float[Array, "batch K"],
    *,
    scales: Float[Array, "alive 1"] | None = None,
    bias: Float[Array, " alive"] | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    tiles: Tiles | None = None,
    interpret: Any = False,
) -> Float[Array, "batch alive"]:
    r"""Multiply with the weights that each neuron keeps.

    .. math:: y_{bf} = \sigma\Big(s_f \sum_{j < k} v_{fj} \, x_{b, i_{fj}} + c_f\Big)

    Sums are float32; scales, bias and activation are applied to them before they are
    cast. One launch, and nothing is stored in between.

    Args:
      values: :math:`v`, weights of the neurons that have any, ``(alive, k)``, float32,
        bfloat16, float16, float8_e4m3fn, float8_e5m2 or int8.
      indices: :math:`i`, their inputs, ``(alive, k)``, uint8, uint16 or uint32;
        ascending in a row.
      x: inputs, ``(batch, K)``, float32, bfloat16 or float16.
      scales: :math:`s`, a factor of each neuron, ``(alive, 1)``.
      bias: :math:`c`, ``(alive,)``.
      activation: :math:`\sigma`: None, ``"relu"``, ``"gelu"`` (approximated by tanh)
        or ``"silu"``.
      out_dtype: float32, bfloat16 or float16. Default: that of x.
      tiles: sizes. Default: `choose`.
      interpret: `plgpu.InterpretGPUParams` to run without a GPU.

    Returns:
      The product.

    Raises:
      ValueError: the kernel does not serve this case, as `refusal` says, or shapes do
        not fit.

    Reference:
      Condensed layers: Lasby, Golubeva, Evci, Nica and Ioannou, "Dynamic Sparse
      Training with Structured Sparsity", 2024, arXiv 2305.02299.
    """
    if reason := refusal(values, indices, x):
        raise ValueError(f"the kernel does not serve this product: {reason}")
    (batch, length), (alive, k) = x.shape, values.shape
    _check(values, indices, scales, bias, activation)
    if tiles is None:
        tiles = choose(batch, length, alive, k, x.dtype, values.dtype, indices.dtype)
    out_dtype = jnp.dtype(x.dtype if out_dtype is None else out_dtype)
    work = _Work(tiles, batch, length, alive, k, Lines.of(tiles.rows, x.dtype))
    if interpret:
        # On a GPU, threads leave out what is not there.
        x = _pad(x, work.row_tiles * tiles.rows, work.chunks * tiles.inputs)
        rows = work.neuron_tiles * tiles.neurons
        values, indices = (_pad(array, rows, k) for array in (values, indices))
        scales = None if scales is None else _pad(scales, rows, 1)
        bias = None if bias is None else jnp.pad(bias, (0, rows - alive))
    given = [one for one in (scales, bias) if one is not None]
    shape = (x.shape[0], values.shape[0])

    def kernel(values: Any, indices: Any, x: Any, *rest: Any, **scratch: Any) -> None:
        *given, results = rest
        factors = given.pop(0) if scales is not None else None
        constants = given.pop(0) if bias is not None else None
        refs = _Refs(values, indices, x, factors, constants, results, **scratch)
        emit = _Interpreted if interpret else _Compiled
        _run(work, emit(work, refs, activation), refs)

    results = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        grid=(work.row_tiles, work.neuron_tiles),
        grid_names=("row_tile", "neuron_tile"),
        num_threads=tiles.warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "tile": plgpu.SMEM((work.stages, tiles.inputs, tiles.rows), work.lines.dtype),
            "sums": plgpu.SMEM((tiles.neurons, tiles.rows + 1), jnp.float32),
            "cursors": plgpu.SMEM((tiles.neurons,), jnp.int32),
            "barrier": plgpu.Barrier(num_arrivals=tiles.warpgroups),
        },
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(values, indices, x, *given)
    return results[:batch, :alive]


def choose(
    batch: int,
    length: int,
    alive: int,
    k: int,
    x_dtype: Any,
    values_dtype: Any,
    indices_dtype: Any,
) -> Tiles:
    """Choose tiles by an estimate of what is read, from shared memory and from L2.

    Args:
      batch: rows of x.
      length: inputs K.
      alive: neurons.
      k: weights of each.
      x_dtype: dtype of x.
      values_dtype: dtype of the weights.
      indices_dtype: dtype of their indices.

    Returns:
      The tiles.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import fan_in
      >>> f32, u16 = jnp.float32, jnp.uint16
      >>> fan_in.choose(1, 3072, 768, 307, f32, f32, u16).rows
      1
      >>> fan_in.choose(256, 3072, 768, 307, f32, f32, u16).rows
      32
    """
    weight = jnp.dtype(values_dtype).itemsize + jnp.dtype(indices_dtype).itemsize
    size = jnp.dtype(x_dtype).itemsize
    enough = 1 << (batch - 1).bit_length()
    options = []
    for rows in (1, 2, 4, 8, 16, 32, 64):
        if rows > enough or rows * size > LINE:
            continue
        lines = Lines.of(rows, x_dtype)
        tiles = _fill_processors(lines, batch, length, alive, k)
        work = _Work(tiles, batch, length, alive, k, lines)
        options.append((_clocks(work, weight, size), -rows, tiles))
    return min(options)[-1]


PROCESSORS = 132
"""Streaming multiprocessors of a Hopper GPU."""

_L2 = 24
"""Bytes that each of them gets from L2 in a clock, if all ask."""


def _fill_processors(
    lines: Lines, batch: int, length: int, alive: int, k: int
) -> Tiles:
    """Choose the other sizes for a number of rows."""
    row_tiles = -(-batch // lines.rows)
    neurons = -(-alive * row_tiles // PROCESSORS)
    warpgroups = 1 if neurons <= 4 else 2 if neurons <= 8 else 4
    step = _WARPS * warpgroups
    neurons = min(-(-neurons // step) * step, 128)
    most = SHARED // lines.bytes
    inputs = length
    if length > most:
        inputs = -(-length // -(-length // (most // 2)))
    slots = next(s for s in (4, 2, 1) if s * lines.groups <= max(k, WARPGROUP // 4))
    return Tiles(lines.rows, neurons, -(-inputs // 32) * 32, slots, warpgroups)


def _clocks(work: "_Work", weight: int, size: int) -> float:
    """Estimate how long a product takes, in clocks of a multiprocessor."""
    tiles, lines = work.tiles, work.lines
    filling = 2 * work.length * lines.bytes / LINE
    slots = work.k + work.chunks * tiles.slots * lines.groups / 2
    passes = CONFLICTS[lines.pieces] * lines.bytes / LINE
    # Weights reach every thread of a group.
    adding = tiles.neurons * slots * (passes + weight * lines.lanes / LINE)
    copied = tiles.rows * work.length * size
    weights = tiles.neurons * work.k * weight
    if work.chunks == 1:
        clocks = max(filling, copied / _L2) + max(adding, weights / _L2)
    else:
        clocks = max(filling + adding, (copied + weights) / _L2)
    blocks = work.row_tiles * work.neuron_tiles
    return clocks * max(1.0, blocks / PROCESSORS)


class _Work(NamedTuple):
    """Sizes of a product and of its tiles."""

    tiles: Tiles
    batch: int
    length: int
    alive: int
    k: int
    lines: Lines

    @property
    def row_tiles(self) -> int:
        return -(-self.batch // self.tiles.rows)

    @property
    def neuron_tiles(self) -> int:
        return -(-self.alive // self.tiles.neurons)

    @property
    def chunks(self) -> int:
        """Parts of the inputs that are in shared memory one after the other."""
        return -(-self.length // self.tiles.inputs)

    @property
    def stages(self) -> int:
        return min(2, self.chunks)

    @property
    def share(self) -> int:
        """Neurons of a warpgroup."""
        return self.tiles.neurons // self.tiles.warpgroups

    @property
    def filled(self) -> int:
        """Inputs of a chunk that a warpgroup copies."""
        return self.tiles.inputs // self.tiles.warpgroups


class _Refs(NamedTuple):
    """References of the kernel."""

    values: Any
    indices: Any
    x: Any
    scales: Any
    bias: Any
    results: Any
    tile: Any
    sums: Any
    cursors: Any
    barrier: Any


def _run(work: _Work, emit: Any, refs: _Refs) -> None:
    """Copy chunks of inputs, add up over each while the next one comes, store."""

    def synchronize() -> None:
        plgpu.barrier_arrive(refs.barrier)
        plgpu.barrier_wait(refs.barrier)

    emit.start()
    emit.fill(0)
    synchronize()

    def step(chunk: Any, _: None) -> None:
        emit.add(chunk, fill=True)
        synchronize()

    lax.fori_loop(0, work.chunks - 1, step, None)
    emit.add(work.chunks - 1, fill=False)
    emit.store()


class _Kernel:
    """Where a warpgroup works."""

    def __init__(self, work: _Work, refs: _Refs, activation: str | None):
        self.work, self.refs, self.activation = work, refs, activation
        self.warpgroup = lax.axis_index("warpgroup")
        self.row = lax.axis_index("row_tile") * work.tiles.rows
        first = lax.axis_index("neuron_tile") * work.tiles.neurons
        self.neuron = first + self.warpgroup * work.share
        self.own = pl.ds(self.warpgroup * work.share, work.share)
        self.part = pl.ds(self.warpgroup * work.filled, work.filled)

    def to_fill(self, chunk: Any) -> tuple[Any, Any]:
        """Give this warpgroup's part of a chunk's tile, and its first input."""
        stage = lax.rem(chunk, self.work.stages)
        first = chunk * self.work.tiles.inputs + self.warpgroup * self.work.filled
        return self.refs.tile.at[stage, self.part], first


class _Interpreted(_Kernel):
    """The same in plain JAX, on the same shared memory."""

    def start(self) -> None:
        self.refs.sums[self.own] = jnp.zeros(
            (self.work.share, self.work.tiles.rows + 1), jnp.float32
        )

    def fill(self, chunk: Any) -> None:
        tile, first = self.to_fill(chunk)
        rows = pl.ds(self.row, self.work.tiles.rows)
        tile[...] = self.refs.x[rows, pl.ds(first, self.work.filled)].T.astype(tile.dtype)

    def add(self, chunk: Any, fill: bool) -> None:
        if fill:
            self.fill(chunk + 1)
        tiles = self.work.tiles
        own = pl.ds(self.neuron, self.work.share)
        values = self.refs.values[own].astype(jnp.float32)
        places = self.refs.indices[own].astype(jnp.int32) - chunk * tiles.inputs
        here = (places >= 0) & (places < tiles.inputs)
        tile = self.refs.tile[lax.rem(chunk, self.work.stages)].astype(jnp.float32)
        lines = tile[jnp.where(here, places, 0)]
        products = jnp.where(here[..., None], values[..., None] * lines, 0)
        sums = self.refs.sums.at[self.own, pl.ds(0, tiles.rows)]
        sums[...] += products.sum(1)

    def store(self) -> None:
        refs, own = self.refs, pl.ds(self.neuron, self.work.share)
        rows = pl.ds(self.row, self.work.tiles.rows)
        total = refs.sums[self.own][:, : self.work.tiles.rows].T
        refs.results[rows, own] = finish(
            total,
            None if refs.scales is None else refs.scales[own][:, 0],
            None if refs.bias is None else refs.bias[own],
            self.activation,
            refs.results.dtype,
        )


class _Compiled(_Kernel):
    """The code of single threads."""

    def start(self) -> None:
        """Set cursors to the first weights, and sums to zero."""
        work, refs = self.work, self.refs
        if work.chunks == 1:
            return

        @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR))
        def emit(_: Any, sums: Any, cursors: Any, neuron: Any) -> None:
            sums, cursors, neuron = Memory(sums), Memory(cursors), Int.given(neuron)

            @lanes.loop(lanes.thread(), work.share, WARPGROUP, [])
            def _(i: Int) -> list[Any]:
                cursors.store(i, [((neuron + i) * work.k).value])
                return []

            size = work.share * (work.tiles.rows + 1)

            @lanes.loop(lanes.thread(), size, WARPGROUP, [])
            def _(i: Int) -> list[Any]:
                sums.store(i, [lanes.constant(0)])
                return []

        emit(refs.sums.at[self.own], refs.cursors.at[self.own], self.neuron)

    def fill(self, chunk: Any) -> None:
        tile, first = self.to_fill(jnp.int32(chunk))
        work = self.work

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(), plgpu.RefType(), SCALAR, SCALAR)
        )
        def emit(_: Any, x: Any, tile: Any, row: Any, first: Any) -> None:
            shape = work.batch, work.length
            filler = Filler(work.lines, x, shape, Int.given(row), tile)
            filler.run(Int.given(first), work.filled)

        emit(self.refs.x, tile, self.row, first)

    def add(self, chunk: Any, fill: bool) -> None:
        work, refs = self.work, self.refs
        chunk = jnp.int32(chunk)
        stage = lax.rem(chunk, jnp.int32(work.stages))
        target, first = self.to_fill(chunk + 1)
        arguments = [
            refs.values,
            refs.indices,
            refs.tile.at[stage],
            refs.sums.at[self.own],
            refs.cursors.at[self.own],
            refs.x,
            target,
        ]
        scalars = [self.neuron, chunk * work.tiles.inputs, self.row, first]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),) * len(arguments) + (SCALAR,) * len(scalars)
        )
        def emit(_: Any, *given: Any) -> None:
            values, indices, tile, sums, cursors, x, target, *integers = given
            neuron, start, row, first = map(Int.given, integers)
            adder = _Adder(work, values, indices, tile, sums, cursors, neuron, start)
            if not fill:
                adder.run(None, first)
                return
            shape = work.batch, work.length
            adder.run(Filler(work.lines, x, shape, row, target), first)

        emit(*arguments, *scalars)

    def store(self) -> None:
        work, refs = self.work, self.refs
        given = [one for one in (refs.scales, refs.bias) if one is not None]
        arguments = [refs.results, refs.sums.at[self.own], *given]

        @plgpu.inline_mgpu(
            arg_types=(plgpu.RefType(),) * len(arguments) + (SCALAR, SCALAR)
        )
        def emit(_: Any, results: Any, sums: Any, *rest: Any) -> None:
            *rest, neuron, row = rest
            rest = [Memory(one) for one in rest]
            scales = rest.pop(0) if refs.scales is not None else None
            bias = rest.pop(0) if refs.bias is not None else None
            neuron, row = Int.given(neuron), Int.given(row)
            _store(work, Memory(results), Memory(sums), scales, bias, neuron, row,
                   self.activation, refs.results.dtype)

        emit(*arguments, self.neuron, self.row)


class _Adder:
    """Sums over the weights of neurons whose inputs are in a tile; a warp takes one."""

    def __init__(
        self,
        work: _Work,
        values: Any,
        indices: Any,
        tile: Any,
        sums: Any,
        cursors: Any,
        neuron: Int,
        start: Int,
    ):
        self.work = work
        self.values, self.indices = Memory(values), Memory(indices)
        self.totals, self.cursors = Memory(sums), Memory(cursors)
        self.sums = Sums(work.lines, tile)
        self.neuron, self.start = neuron, start
        self.window = work.tiles.slots * work.lines.groups

    def run(self, filler: Filler | None, first: Int) -> None:
        """Take all neurons of the warpgroup, and copy the next tile meanwhile."""
        work = self.work
        steps = -(-work.share // _WARPS)
        units = 0 if filler is None else filler.units(work.filled)

        @lanes.loop(0, steps, 1, [])
        def _(i: Int) -> list[Any]:
            unit = lanes.thread() + i * WARPGROUP
            found = []
            if filler is not None:
                # Under way while a neuron's weights are added up.
                found = filler.load(unit.at_most(units - 1), first)
            mine = lanes.warp() + i * _WARPS
            there = mine.below(work.share) & (self.neuron + mine).below(work.alive)
            with lanes.when(there):
                self._neuron(mine)
            if filler is not None:
                with lanes.when(unit.below(units)):
                    filler.store(unit, found)
            return []

        if filler is not None:
            filler.run(first, work.filled, done=steps * WARPGROUP)

    def _neuron(self, mine: Int) -> None:
        work, slots = self.work, self.work.tiles.slots
        begin = (self.neuron + mine) * work.k
        end = begin + work.k
        several = work.chunks > 1
        start = begin
        if several:
            (start,) = self.cursors.load(mine)
            start = Int(start)
        # Weights are loaded from multiples of `slots` on: rows may start in between.
        start = start & -slots
        mine_in_window = self.sums.group * slots

        def load(start: Int) -> list[Any]:
            last = (work.alive * work.k - 1) // slots * slots
            place = (start + mine_in_window).at_most(last)
            return self.values.load(place, slots) + self.indices.load(place, slots)

        @lanes.repeat([start, *load(start), *self.sums.zeros()])
        def found(start: Int, *carry: Any) -> tuple[Truth, list[Any]]:
            values = [lanes.to_float(one) for one in carry[:slots]]
            places = [
                lanes.unsigned(one) - self.start for one in carry[slots : 2 * slots]
            ]
            total = list(carry[2 * slots :])
            stop = start + self.window
            following = load(stop)
            first = start + mine_in_window
            whole = (start >= begin) & (Int(end.value) >= stop)
            if several:
                strange = functools.reduce(
                    Truth.__or__, (place >= work.tiles.inputs for place in places)
                ) | functools.reduce(Truth.__or__, (place < 0 for place in places))
                whole = whole & strange.any_in_warp().no()
            no = lanes.Int(0).equals(1)

            def all_there() -> list[Any]:
                sums = total
                for value, place in zip(values, places, strict=True):
                    sums = self.sums.add(sums, value, self.sums.gather(place))
                return [no, *sums]

            def some_there() -> list[Any]:
                sums, beyond = total, no
                for i, (value, place) in enumerate(zip(values, places, strict=True)):
                    valid = (first + i - begin).below(work.k)
                    if several:
                        beyond = beyond | (valid & (place >= work.tiles.inputs))
                        valid = valid & place.below(work.tiles.inputs)
                    place = valid.choose(place, 0)
                    value = valid.choose(value, lanes.constant(0))
                    line = self.sums.gather(place, valid)
                    sums = self.sums.add(sums, value, line)
                return [beyond.any_in_warp() if several else no, *sums]

            beyond, *total = lanes.choose(whole, all_there, some_there, [no, *total])
            # A window with inputs of the next chunk is looked at again then.
            start = beyond.choose(start, stop)
            more = beyond.no() & (start < end)
            return more, [start, *following, *total]

        cursor, *rest = found
        first, row, total = self.sums.collect(rest[2 * slots :])
        if several:
            self.cursors.store(mine, [cursor.value])
        with lanes.when(first):
            for i, one in enumerate(total):
                place = mine * (work.tiles.rows + 1) + row + i
                if several:
                    (old,) = self.totals.load(place)
                    one = lanes.add(old, one)
                self.totals.store(place, [one])


def _store(
    work: _Work,
    results: Memory,
    sums: Memory,
    scales: Memory | None,
    bias: Memory | None,
    neuron: Int,
    row: Int,
    activation: str | None,
    dtype: Any,
) -> None:
    """Store the results of a warpgroup's neurons."""
    lanes.warpgroup_barrier()

    @lanes.loop(lanes.thread(), work.share * work.tiles.rows, WARPGROUP, [])
    def _(i: Int) -> list[Any]:
        mine, line = i % work.share, i // work.share
        at, to = neuron + mine, row + line
        with lanes.when(at.below(work.alive) & to.below(work.batch)):
            (total,) = sums.load(mine * (work.tiles.rows + 1) + line)
            factor = None if scales is None else lanes.to_float(*scales.load(at))
            constant = None if bias is None else lanes.to_float(*bias.load(at))
            result = lanes.finish(total, factor, constant, activation, dtype)
            results.store(to * work.alive + at, [result])
        return []


def _check(
    values: Array,
    indices: Array,
    scales: Array | None,
    bias: Array | None,
    activation: str | None,
) -> None:
    alive, _ = values.shape
    expected = {"indices": values.shape, "scales": (alive, 1), "bias": (alive,)}
    given = {"indices": indices, "scales": scales, "bias": bias}
    for name, shape in expected.items():
        array = given[name]
        if array is not None and array.shape != shape:
            raise ValueError(
                f"{name} has shape {array.shape}; for values of shape {values.shape} "
                f"it must have {shape}"
            )
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation={activation!r} is none of {ACTIVATIONS}")


def _pad(array: Array, rows: int, columns: int) -> Array:
    missing = rows - array.shape[0], columns - array.shape[1]
    return jnp.pad(array, tuple((0, count) for count in missing))
