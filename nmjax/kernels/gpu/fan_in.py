"""Products with constant fan-in weights on a GPU, without dense ones."""

import functools
import math
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.numpy as jnp
from jaxtyping import Array, Float, Num, UInt

from nmjax.kernels.gpu import chunks, floats, gathering, lanes
from nmjax.kernels.gpu.chunks import L2, WARPS, Adder, Work
from nmjax.kernels.gpu.finishing import ACTIVATIONS
from nmjax.kernels.gpu.gathers import CONFLICTS, LINE, Lines
from nmjax.kernels.gpu.lanes import Int, Truth
from nmjax.kernels.gpu.memory import Memory
from nmjax.kernels.gpu.tiles import PROCESSORS

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
    if max(elements) > 2**30:
        return f"an array has {max(elements)} elements; the kernel counts up to 2**30"
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
    work = _work(tiles, batch, length, alive, x.dtype)
    weights = [values, indices]
    if interpret:
        rows = work.output_tiles * work.tile
        weights = [gathering.pad(array, rows, k) for array in weights]
    return gathering.product(
        work,
        _FanIn(k, tiles.slots),
        weights,
        x,
        scales=None if scales is None else scales[:, 0],
        bias=bias,
        activation=activation,
        out_dtype=jnp.dtype(x.dtype if out_dtype is None else out_dtype),
        interpret=interpret,
    )


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
        work = _work(tiles, batch, length, alive, x_dtype)
        clocks = _clocks(work, k, tiles.slots, weight, size)
        options.append((clocks, -rows, tiles))
    return min(options)[-1]


def _fill_processors(
    lines: Lines, batch: int, length: int, alive: int, k: int
) -> Tiles:
    """Choose the other sizes for a number of rows."""
    row_tiles = -(-batch // lines.rows)
    neurons = -(-alive * row_tiles // PROCESSORS)
    warpgroups = 1 if neurons <= 4 else 2 if neurons <= 8 else 4
    step = WARPS * warpgroups
    neurons = min(-(-neurons // step) * step, 128)
    inputs = chunks.chunk(lines, length, neurons)
    # More at a time hide more of the latency, and cut more at the end of a chunk.
    known = (4, 2, 1) if inputs >= length else (2, 1)
    slots = next(s for s in known if s == 1 or s * lines.groups <= k)
    return Tiles(lines.rows, neurons, inputs, slots, warpgroups)


def _clocks(work: Work, k: int, slots: int, weight: int, size: int) -> float:
    """Estimate how long a product takes, in clocks of a multiprocessor."""
    lines, several = work.lines, work.chunks > 1
    filling = 2 * work.length * lines.bytes / LINE
    taken = k + work.chunks * slots * lines.groups / 4
    # Of a weight: its line, and what reaches every thread of its group.
    passes = CONFLICTS[lines.pieces] * lines.bytes / LINE
    passes += weight * lines.lanes / LINE
    # At the end, sums of threads are added up.
    adding = work.tile * (taken * passes + work.chunks * 10)
    # Instructions, counted in compiled code.
    issued = work.tile * k * (0.1 + lines.rows / 30) * (1.25 if several else 1)
    copied = lines.rows * work.length * size / L2
    weights = work.tile * k * weight / L2
    if several:
        clocks = max(filling + adding, issued, copied + weights)
    else:
        clocks = max(filling, copied) + max(adding, issued, weights)
    return clocks * max(1.0, work.row_tiles * work.output_tiles / PROCESSORS)


def _work(tiles: Tiles, batch: int, length: int, alive: int, dtype: Any) -> Work:
    return Work(
        batch=batch,
        length=length,
        outputs=alive,
        lines=Lines.of(tiles.rows, dtype),
        tile=tiles.neurons,
        inputs=tiles.inputs,
        warpgroups=tiles.warpgroups,
    )


class _FanIn(NamedTuple):
    """Sums over the weights of neurons; a warp takes one."""

    k: int
    slots: int
    cursors: bool = False

    @property
    def ahead(self) -> int:
        return 2 * self.slots

    def interpret(
        self, work: Work, refs: list[Any], first: Any, start: Any, tile: Array
    ) -> Array:
        own = pl.ds(first, work.share)
        values, indices = (ref[own] for ref in refs)
        places = indices.astype(jnp.int32) - start
        here = (places >= 0) & (places < work.inputs)
        lines = tile[jnp.where(here, places, 0)]
        products = values.astype(jnp.float32)[..., None] * lines
        return jnp.where(here[..., None], products, 0).sum(1)

    def adder(self, work: Work, refs: list[Any]) -> "_Adder":
        return _Adder(work, self, *refs)


class _Adder(Adder):
    """The code of a warp."""

    def __init__(self, work: Work, plan: _FanIn, values: Any, indices: Any):
        super().__init__(work)
        self.k, self.slots = plan.k, plan.slots
        self.values, self.indices = Memory(values), Memory(indices)
        self.window = plan.slots * work.lines.groups

    def cursor(self, unit: Int) -> Int:
        # A neuron behind the last one is taken for that; what is read is not used.
        return (self.first + unit).at_most(self.work.outputs - 1) * self.k

    def load(self, unit: Int) -> list[Any]:
        return self._load(self._start(unit))

    def kinds(self) -> list[Any]:
        return [self.values.dtype] * self.slots + [self.indices.dtype] * self.slots

    def _start(self, unit: Int) -> Int:
        """Give the weight at which a neuron's first window starts."""
        if self.work.chunks > 1 and self.cursors is not None:
            start = Int(*self.cursors.load(unit.at_most(self.work.share - 1)))
        else:
            start = self.cursor(unit)
        # Weights are loaded from multiples of `slots` on: rows may start in between.
        return start & -self.slots

    def _load(self, start: Int) -> list[Any]:
        """Load this thread's weights of a window, and their indices."""
        last = (self.work.outputs * self.k - 1) // self.slots * self.slots
        place = (start + self.sums.group * self.slots).at_most(last)
        values = self.values.load(place, self.slots)
        return values + self.indices.load(place, self.slots)

    def add(self, unit: Int, window: list[Any]) -> None:
        work, slots = self.work, self.slots
        begin = (self.first + unit) * self.k
        end = begin + self.k
        several = work.chunks > 1

        @lanes.repeat([self._start(unit), *window, *self.sums.zeros()])
        def found(start: Int, *carry: Any) -> tuple[Truth, list[Any]]:
            values = [floats.to_float(one) for one in carry[:slots]]
            places = [
                lanes.unsigned(one) - self.start for one in carry[slots : 2 * slots]
            ]
            total = list(carry[2 * slots :])
            stop = start + self.window
            following = self._load(stop)
            first = start + self.sums.group * slots
            whole = (start >= begin) & (end >= stop)
            if several:
                inside = [place.below(work.inputs) for place in places]
                strange = functools.reduce(Truth.both, inside).no()
                whole = whole & strange.any_in_warp().no()

            def all_there() -> list[Any]:
                sums = total
                for value, place in zip(values, places, strict=True):
                    sums = self.sums.add(sums, value, self.sums.gather(place))
                return [stop, *sums]

            def some_there() -> list[Any]:
                sums, cursor = total, stop
                if several:
                    cursor = start
                for i, (value, place) in enumerate(zip(values, places, strict=True)):
                    slot = first + i
                    valid = (slot - begin).below(self.k)
                    if several:
                        # Up to the first input of the next chunk.
                        before = (slot < begin) | (place < work.inputs)
                        cursor = cursor + self.sums.count((slot < end) & before)
                        valid = valid & place.below(work.inputs)
                    value = valid.choose(value, floats.constant(0))
                    line = self.sums.gather(place, valid)
                    sums = self.sums.add(sums, value, line)
                return [cursor, *sums]

            cursor, *total = lanes.choose(whole, all_there, some_there, [stop, *total])
            more = (cursor >= stop) & (cursor < end)
            return more, [cursor, *following, *total]

        cursor, *rest = found
        if several:
            self.cursors.store(unit, [cursor.value])
        self.keep(unit, rest[2 * slots :])


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
