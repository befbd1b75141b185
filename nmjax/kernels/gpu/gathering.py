"""The kernel of products that gather inputs, see `chunks`."""

from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nmjax.kernels.gpu import floats, lanes
from nmjax.kernels.gpu.chunks import Plan, Work
from nmjax.kernels.gpu.finishing import finish
from nmjax.kernels.gpu.gathers import Filler
from nmjax.kernels.gpu.lanes import SCALAR, WARPGROUP, Int
from nmjax.kernels.gpu.memory import Memory


def product(
    work: Work,
    plan: Plan,
    weights: list[Array],
    x: Array,
    *,
    scales: Array | None,
    bias: Array | None,
    activation: str | None,
    out_dtype: Any,
    interpret: Any,
) -> Array:
    """Run the kernel.

    Args:
      work: sizes.
      plan: how outputs are added up.
      weights: what the plan reads.
      x: inputs, ``(batch, length)``.
      scales: factors of the outputs, ``(outputs,)``.
      bias: ``(outputs,)``.
      activation: of `finishing.ACTIVATIONS`.
      out_dtype: dtype of the results.
      interpret: `plgpu.InterpretGPUParams` to run without a GPU.

    Returns:
      The product, ``(batch, outputs)``.
    """
    shape = work.batch, work.outputs
    if interpret:
        # On a GPU, threads leave out what is not there.
        shape = work.row_tiles * work.lines.rows, work.output_tiles * work.tile
        x = pad(x, shape[0], work.chunks * work.inputs)
        scales, bias = (
            None if one is None else pad(one, shape[1]) for one in (scales, bias)
        )
    given = [one for one in (scales, bias) if one is not None]

    def kernel(x: Any, *refs: Any, **scratch: Any) -> None:
        reading, rest = list(refs[: len(weights)]), list(refs[len(weights) :])
        factors = rest.pop(0) if scales is not None else None
        constants = rest.pop(0) if bias is not None else None
        (results,) = rest
        everything = _Refs(x, reading, factors, constants, results, **scratch)
        kind = _Interpreted if interpret else _Compiled
        _run(work, kind(work, plan, everything, activation), scratch["barrier"])

    cursors = max(1, work.tile // work.unit)
    results = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct(shape, out_dtype),
        grid=(work.row_tiles, work.output_tiles),
        grid_names=("row_tile", "output_tile"),
        num_threads=work.warpgroups,
        thread_name="warpgroup",
        scratch_types={
            "tile": plgpu.SMEM(
                (work.stages, work.inputs, work.lines.rows), work.lines.dtype
            ),
            "sums": plgpu.SMEM((work.tile, work.lines.rows + 1), jnp.float32),
            "cursors": plgpu.SMEM((cursors,), jnp.int32),
            "barrier": plgpu.Barrier(num_arrivals=work.warpgroups),
        },
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret,
    )(x, *weights, *given)
    return results[: work.batch, : work.outputs]


def pad(array: Array, *shape: int) -> Array:
    """Fill up with zeros behind the last elements.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import gathering
      >>> gathering.pad(jnp.ones((1, 2)), 2, 3).tolist()
      [[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]
    """
    widths = [(0, new - old) for old, new in zip(array.shape, shape, strict=True)]
    return jnp.pad(array, widths)


class _Refs(NamedTuple):
    """References of the kernel."""

    x: Any
    weights: list[Any]
    scales: Any
    bias: Any
    results: Any
    tile: Any
    sums: Any
    cursors: Any
    barrier: Any


def _run(work: Work, kernel: Any, barrier: Any) -> None:
    """Copy chunks of inputs, add up over each while the next one comes, store."""

    def synchronize() -> None:
        plgpu.barrier_arrive(barrier)
        plgpu.barrier_wait(barrier)

    ahead = kernel.begin()
    kernel.fill(jnp.int32(0))
    synchronize()

    def step(chunk: Any, _: None) -> None:
        kernel.add(chunk, None, fill=True)
        synchronize()

    last = work.chunks - 1
    if last:
        lax.fori_loop(0, last, step, None)
    kernel.add(jnp.int32(last), ahead, fill=False)
    kernel.store()


class _Kernel:
    """Where a warpgroup works."""

    def __init__(self, work: Work, plan: Plan, refs: _Refs, activation: str | None):
        self.work, self.plan, self.refs = work, plan, refs
        self.activation = activation
        self.warpgroup = lax.axis_index("warpgroup")
        self.row = lax.axis_index("row_tile") * work.lines.rows
        tile = lax.axis_index("output_tile") * work.tile
        self.first = tile + self.warpgroup * work.share
        own = pl.ds(self.warpgroup * work.share, work.share)
        self.sums = refs.sums.at[own]
        units = work.share // work.unit
        self.cursors = refs.cursors.at[pl.ds(self.warpgroup * units, units)]

    def stage(self, chunk: Any) -> Any:
        """Give a chunk's place in shared memory."""
        return self.refs.tile.at[lax.rem(chunk, jnp.int32(self.work.stages))]

    def to_fill(self, chunk: Any) -> tuple[Any, Any]:
        """Give this warpgroup's part of a chunk, and its first input."""
        start = self.warpgroup * self.work.filled
        stage = lax.rem(chunk, jnp.int32(self.work.stages))
        part = self.refs.tile.at[stage, pl.ds(start, self.work.filled)]
        return part, chunk * self.work.inputs + start


class _Interpreted(_Kernel):
    """Plain JAX on the same shared memory."""

    def begin(self) -> None:
        self.sums[...] = jnp.zeros(self.sums.shape, jnp.float32)

    def fill(self, chunk: Any) -> None:
        part, first = self.to_fill(chunk)
        rows = pl.ds(self.row, self.work.lines.rows)
        found = self.refs.x[rows, pl.ds(first, self.work.filled)]
        part[...] = found.T.astype(part.dtype)

    def add(self, chunk: Any, ahead: Any, fill: bool) -> None:
        if fill:
            self.fill(chunk + 1)
        work = self.work
        tile = self.stage(chunk)[...].astype(jnp.float32)
        start = chunk * work.inputs
        found = self.plan.interpret(work, self.refs.weights, self.first, start, tile)
        self.sums[:, : work.lines.rows] += found

    def store(self) -> None:
        work, refs = self.work, self.refs
        rows, own = pl.ds(self.row, work.lines.rows), pl.ds(self.first, work.share)
        refs.results[rows, own] = finish(
            self.sums[:, : work.lines.rows].T,
            None if refs.scales is None else refs.scales[own],
            None if refs.bias is None else refs.bias[own],
            self.activation,
            refs.results.dtype,
        )


class _Compiled(_Kernel):
    """Code of single threads."""

    def begin(self) -> Any:
        work, weights = self.work, self.refs.weights
        if work.chunks == 1:
            # Under way while the inputs are copied: what the first units need.
            def load(given: list[Any], first: Int) -> Any:
                adder = self.plan.adder(work, given)
                adder.first = first
                return lanes.as_words(adder.load(lanes.warp()))

            ahead = _emit(load, weights, self.first, words=self.plan.ahead)
        else:
            ahead = None
        if work.chunks > 1 or self.plan.cursors:
            _emit(self._start, [*weights, self.sums, self.cursors], self.first)
        return ahead

    def _start(self, given: list[Any], first: Int) -> None:
        """Set cursors to the first weights, and sums to zero."""
        work = self.work
        *weights, sums, cursors = given
        adder = self.plan.adder(work, weights)
        adder.first = first

        @lanes.loop(lanes.thread(), work.share // work.unit, WARPGROUP, [])
        def _(unit: Int) -> list[Any]:
            Memory(cursors).store(unit, [adder.cursor(unit).value])
            return []

        if work.chunks > 1:
            size = work.share * (work.lines.rows + 1)

            @lanes.loop(lanes.thread(), size, WARPGROUP, [])
            def _(i: Int) -> list[Any]:
                Memory(sums).store(i, [floats.constant(0)])
                return []

    def fill(self, chunk: Any) -> None:
        work = self.work
        part, first = self.to_fill(chunk)

        def emit(given: list[Any], row: Int, first: Int) -> None:
            x, part = given
            shape = work.batch, work.length
            Filler(work.lines, x, shape, row, part).run(first, work.filled)

        _emit(emit, [self.refs.x, part], self.row, first)

    def add(self, chunk: Any, ahead: Any, fill: bool) -> None:
        work = self.work
        part, part_first = self.to_fill(chunk + 1)

        def emit(
            given: list[Any], first: Int, start: Int, row: Int, part_first: Int
        ) -> None:
            loaded = None if ahead is None else given.pop()
            *weights, x, tile, part, sums, cursors = given
            adder = self.plan.adder(work, weights)
            adder.place(tile, sums, cursors, first, start)
            if loaded is not None:
                loaded = lanes.from_words(loaded, adder.kinds())
            filler = None
            if fill:
                shape = work.batch, work.length
                filler = Filler(work.lines, x, shape, row, part)
            adder.run(loaded, filler, part_first)

        given = [*self.refs.weights, self.refs.x, self.stage(chunk), part]
        given += [self.sums, self.cursors]
        integers = self.first, chunk * work.inputs, self.row, part_first
        _emit(emit, given, *integers, ahead=ahead)

    def store(self) -> None:
        work, refs = self.work, self.refs
        given = [one for one in (refs.scales, refs.bias) if one is not None]

        def emit(given: list[Any], first: Int, row: Int) -> None:
            sums, *rest = map(Memory, given)
            results = rest.pop()
            scales = rest.pop(0) if refs.scales is not None else None
            bias = rest.pop(0) if refs.bias is not None else None
            lanes.warpgroup_barrier()

            @lanes.loop(lanes.thread(), work.share * work.lines.rows, WARPGROUP, [])
            def _(i: Int) -> list[Any]:
                mine, line = i % work.share, i // work.share
                output, to = first + mine, row + line
                with lanes.when(output.below(work.outputs) & to.below(work.batch)):
                    (total,) = sums.load(mine * (work.lines.rows + 1) + line)
                    factor, constant = (
                        None if one is None else floats.to_float(*one.load(output))
                        for one in (scales, bias)
                    )
                    result = floats.finish(
                        total, factor, constant, self.activation, refs.results.dtype
                    )
                    results.store(to * work.outputs + output, [result])
                return []

        _emit(emit, [self.sums, *given, refs.results], self.first, self.row)


def _emit(
    build: Any, refs: list[Any], *integers: Any, words: int = 0, ahead: Any = None
) -> Any:
    """Put code of single threads into the kernel.

    Args:
      build: what emits it, given the references and then the integers; it gives an
        array if `words` are asked for.
      refs: references.
      integers: integers, the same for all threads of a warpgroup.
      words: words of each thread in the array.
      ahead: None, or such an array; `build` gets it as the last reference.
    """
    kinds: list[Any] = [plgpu.RefType()] * len(refs)
    if ahead is not None:
        count = ahead.shape[0] // WARPGROUP
        kinds, refs = [*kinds, lanes.words_layout(count)], [*refs, ahead]
    result = None
    if words:
        shape, layout = (WARPGROUP * words,), lanes.words_layout(words)
        result = plgpu.ShapeDtypeStruct(shape, jnp.int32, layout=layout)

    @plgpu.inline_mgpu(
        arg_types=(*kinds, *[SCALAR] * len(integers)), return_type=result
    )
    def emit(_: Any, *given: Any) -> Any:
        scalars = map(Int.given, given[len(refs) :])
        return build(list(given[: len(refs)]), *scalars)

    return emit(*refs, *integers)
