"""Cases of matmul.py: chains of layers, their weights in every format, their limit.

A `Case` is a chain of layers of one format, ReLU between them, in one jitted function;
a single layer is a chain of one. Or its layers are apart: each call runs the next one.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing

import nmjax as nm
from nmjax import formats


class Unavailable(Exception):
    """What a case needs is not there; the message says what."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A chain of layers of one format.

    Attributes:
      section: the section of the benchmark it belongs to.
      shapes: ``(inputs, outputs)`` of every layer.
      format: "FanIn", "Window" (prepared FanIn), "NM" or "Block".
      density: kept fraction.
      sides: n and m of NM, outputs and inputs of Block, nothing of the others.
      values: dtype of the stored values: float32, bfloat16 or int8.
      apart: whether each call runs one layer, the next one, all of one shape.
    """

    section: str
    shapes: tuple[tuple[int, int], ...]
    format: str
    density: float
    sides: tuple[int, ...] = ()
    values: str = "float32"
    apart: bool = False

    @property
    def layers(self) -> str:
        """Name the layers."""
        name = layers_of(self.shapes)
        return f"{name}, one a call" if self.apart else name

    @property
    def layout(self) -> str:
        """Name the parameters of the format: "2:4", "16x1"; nothing of the others."""
        return {"NM": ":", "Block": "x"}.get(self.format, "").join(map(str, self.sides))

    @property
    def inputs_dtype(self) -> Any:
        """Dtype of x: the values', and float32 for int8."""
        return jnp.dtype("bfloat16" if self.values == "bfloat16" else "float32")

    @property
    def title(self) -> str:
        """Name the case."""
        name = f"{self.section}: {self.layers}, {self.format} {self.layout}".rstrip()
        return f"{name} {self.density:.3g}, {self.values}"

    def units(self, batch: int) -> int:
        """Count the entries of inputs and results of all layers."""
        return batch * sum(map(sum, self.shapes))

    def fields(self) -> dict[str, Any]:
        """Give what every row of results says about the case."""
        names = ("section", "layers", "format", "layout", "density", "values")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """Weights of a chain, one entry per layer.

    Attributes:
      plain: dense arrays in float32.
      dense: dense arrays in the dtype of x.
      masks: active weights.
      small: compressed arrays.
    """

    plain: Sequence[jax.Array]
    dense: Sequence[jax.Array]
    masks: Sequence[jax.Array]
    small: Sequence[formats.Compressed]

    @functools.cached_property
    def prepared(self) -> Sequence[formats.Compressed]:
        """Give the compressed arrays, prepared for the CPU."""
        return nm.prepare(list(self.small), "cpu")


@dataclasses.dataclass(frozen=True)
class Form:
    """A way to run a case.

    Attributes:
      call: runs it, without arguments.
      touched: bytes it has to read or write at least.
      flipped: whether the result has outputs first.
      note: what else there is to say.
    """

    call: Callable[[], Any] | timing.PeerFunction
    touched: int
    flipped: bool = False
    note: str = ""


def layers_of(shapes: Sequence[tuple[int, int]]) -> str:
    """Name a chain by its shapes: "6 x (768 -> 3072 -> 768)"."""
    first, last = shapes[0], shapes[-1]
    name = f"{first[0]} -> {first[1]}"
    if len(shapes) == 1:
        return name
    if first != last:
        return f"{len(shapes) // 2} x ({name} -> {last[1]})"
    return f"{len(shapes)} x ({name})"


def chain_of(
    product: Callable[[Any, Any], Any],
    activated: Callable[[Any, Any], Any] | None = None,
) -> Callable[[Any, Any], Any]:
    """Give a function that runs layers, ReLU between them.

    Args:
      product: of the last layer.
      activated: of the others, with ReLU at its end; default `jax.nn.relu` after it.
    """

    def chain(x: jax.Array, weights: Sequence[Any]) -> jax.Array:
        for w in weights[:-1]:
            x = activated(x, w) if activated else jax.nn.relu(product(x, w))
        return product(x, weights[-1])

    return chain


def nbytes(tree: Any) -> int:
    """Count the bytes of all arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def short(error: Exception) -> str:
    """Give the first line of a message, cut where it is long."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 90 else f"{text[:87]}..."


# Weights -----------------------------------------------------------------------------


def make_weights(case: Case) -> Weights:
    """Make weights that keep the size of activations.

    Layers of one shape have copies of the same weights: each has memory of its own.

    Raises:
      Unavailable: nmjax cannot store such values.
    """
    made = {}
    for shape in dict.fromkeys(case.shapes):
        noise = normal(shape)
        mask = _mask(case, noise)
        sparse = np.where(mask, noise * math.sqrt(2 / (shape[0] * case.density)), 0)
        sparse = jnp.asarray(sparse.astype(case.inputs_dtype))
        small = _compress(case, sparse, mask)
        if case.values == "int8":
            sparse = small.todense()
        made[shape] = np.asarray(sparse, np.float32), sparse, mask, small
    plain, dense, masks, small = zip(
        *(made[shape] for shape in case.shapes), strict=True
    )
    parts = [jax.tree.map(jnp.array, list(part)) for part in (plain, masks, small)]
    plain, masks, small = jax.block_until_ready(parts)
    if case.inputs_dtype != jnp.float32:
        dense = jax.tree.map(jnp.array, list(dense))
    else:
        dense = plain
    return Weights(plain, dense, masks, small)


def normal(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Draw normal numbers in float32."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _mask(case: Case, noise: np.ndarray) -> jax.Array:
    """Choose active weights by the magnitude of noise."""
    scores = jnp.asarray(np.abs(noise))
    if case.format == "NM":
        return nm.nm_mask(scores, *case.sides)
    if case.format in ("FanIn", "Window"):
        return nm.fan_in_mask(scores, max(1, round(case.density * noise.shape[0])))
    outputs, inputs = case.sides
    count = max(1, round(case.density * noise.size / (outputs * inputs)))
    return nm.block_mask(scores, count, (inputs, outputs))


def _compress(case: Case, sparse: jax.Array, mask: jax.Array) -> Any:
    """Store in the format of the case."""
    if case.format in ("FanIn", "Window"):
        small = formats.FanInArray.from_dense(sparse, mask=mask)
        if case.format == "Window":
            small = formats.WindowArray.from_canonical(small)
    elif case.format == "NM":
        small = formats.NMArray.from_dense(sparse, *case.sides, mask=mask)
    else:
        small = formats.BlockArray.from_dense(sparse, *case.sides, mask=mask)
    if case.values != "int8":
        return small
    quantize = getattr(formats, "quantize", None)
    if quantize is None:
        raise Unavailable("nmjax.formats has no quantize")
    try:
        return quantize(small, jnp.int8)
    except (NotImplementedError, TypeError, ValueError) as error:
        raise Unavailable(short(error)) from error


# Limit -------------------------------------------------------------------------------


class ReadSpeed:
    """How long reading takes: a jitted sum over arrays of many sizes, timed."""

    def __init__(self, largest: int, seconds: float = 0.05):
        """Time sums of arrays of 64 KiB up to this many bytes."""
        self.sizes, self.times = [], []
        total = jax.jit(lambda x: x.reshape(256, -1).sum(1))
        size = 2**16
        while size <= largest:
            call = partial(total, jnp.ones(size // 4, jnp.float32))
            timing.seconds(call)
            times, end = [], time.perf_counter() + seconds
            while not times or time.perf_counter() < end:
                times.append(timing.seconds(call, max(1, 2**22 // size)))
            self.sizes.append(size)
            self.times.append(min(times))  # a limit: without other users
            size *= 2

    def ms(self, touched: int) -> float:
        """Give the milliseconds that reading this many bytes takes."""
        beyond = max(1.0, touched / self.sizes[-1])
        logs = np.log(self.sizes), np.log(self.times)
        return 1e3 * beyond * float(np.exp(np.interp(np.log(touched), *logs)))

    def __str__(self) -> str:
        """Name the bandwidth of the smallest, a middle and the largest array."""
        shown = sorted({0, len(self.sizes) // 2, len(self.sizes) - 1})
        return ", ".join(
            f"{self.sizes[i] / 2**20:g} MiB at "
            f"{self.sizes[i] / self.times[i] / 2**30:.1f} GiB/s"
            for i in shown
        )
