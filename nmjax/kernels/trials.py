"""Trials: 2:4 products of random operands, to be timed with some tiles."""

import dataclasses
import functools
import importlib
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from nmjax.formats import NMArray, PreparedArray
from nmjax.kernels import rotation
from nmjax.kernels.gpu import tiling
from nmjax.kernels.gpu.tiles import Tiles

DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "int8-weights")
"""Dtypes of weights and inputs; int8-weights are multiplied with bfloat16."""

LARGEST_DIFFERENCE = 2e-2
"""Largest `difference` from dense weights that is let pass; float8 is added up with
fewer bits than float32 has."""

ROUNDS, SECONDS = 7, 0.01
"""Rounds over all tiles, and how long each of them runs in a round."""


@dataclasses.dataclass(frozen=True)
class Product:
    """A product y = x w^T with 2:4 weights.

    Attributes:
      dtype: of `DTYPES`.
      features: outputs.
      inputs: inputs.
      rows: rows of x.
      kind: the kernel. Default: the one that `nmjax.matmul` takes.
    """

    dtype: str
    features: int
    inputs: int
    rows: int
    kind: str = ""

    def __post_init__(self) -> None:
        """Check the dtype and choose the kernel."""
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        if not self.kind:
            few = self.rows <= tiling.FEW_ROWS
            kind = "hopper_decode" if few else "hopper"
            kind = "hopper_weight_only" if self.dtype == "int8-weights" else kind
            object.__setattr__(self, "kind", kind)

    @property
    def values_dtype(self) -> jnp.dtype:
        """Dtype of the stored values."""
        return jnp.dtype("int8" if self.dtype == "int8-weights" else self.dtype)

    @property
    def inputs_dtype(self) -> jnp.dtype:
        """Dtype of x."""
        return jnp.dtype("bfloat16" if self.dtype == "int8-weights" else self.dtype)

    @property
    def result_dtype(self) -> jnp.dtype:
        """Dtype of the result: int32 of int8, bfloat16 of float8, else that of x."""
        if self.dtype == "int8":
            return jnp.dtype("int32")
        eight = self.inputs_dtype.itemsize == 1
        return jnp.dtype("bfloat16") if eight else self.inputs_dtype

    @property
    def operations(self) -> int:
        """Multiplications and additions of the dense product."""
        return 2 * self.features * self.inputs * self.rows

    @property
    def least_bytes(self) -> int:
        """Bytes of the kept values and of x."""
        values = self.features * self.inputs // 2 * self.values_dtype.itemsize
        return values + self.rows * self.inputs * self.inputs_dtype.itemsize

    @property
    def candidates(self) -> list[Tiles]:
        """Tiles that are worth a measurement, the default first."""
        return tiling.candidates(
            self.kind, self.values_dtype, self.features, self.inputs, self.rows
        )


@functools.partial(jax.jit, static_argnames="product")
def draw(key: Array, product: Product) -> tuple[NMArray, Array]:
    """Draw weights and inputs on the device.

    Each of the six ways to keep two of four is as likely.

    Args:
      key: a random key.
      product: the product; its inputs are a multiple of 8.

    Returns:
      Weights of dense shape ``(K, F)``, and x ``(rows, K)``.

    Example:
      >>> import jax
      >>> from nmjax.kernels import trials
      >>> small, x = trials.draw(jax.random.key(0), trials.Product("int8", 16, 32, 3))
      >>> small, x.shape
      (NMArray(2:4 along -2, int8[32, 16], 320 bytes, 0.625 of dense), (3, 32))
    """
    keys = jax.random.split(key, 4)
    features, inputs = product.features, product.inputs
    values = _normal(keys[0], (features, inputs // 2), product.values_dtype)
    # First position in the low bits: 01, 02, 03, 12, 13, 23.
    pairs = (0b0100, 0b1000, 0b1100, 0b1001, 0b1101, 0b1110)
    ways = jax.random.randint(keys[1], (features, inputs // 4), 0, len(pairs))
    halves = jnp.asarray(pairs, jnp.uint8)[ways]
    codes = halves[:, ::2] | halves[:, 1::2] << 4
    scales = None
    if product.values_dtype != product.inputs_dtype:
        scales = jax.random.uniform(keys[2], (features, 1), minval=0.5, maxval=2.0)
        scales = (scales / 127).astype(product.inputs_dtype)
    small = NMArray(values, scales, codes, 2, 4, -2, (inputs, features))
    return small, _normal(keys[3], (product.rows, inputs), product.inputs_dtype)


def _normal(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Draw normal numbers; int8 numbers that are all as likely."""
    if dtype == jnp.int8:
        return jax.random.randint(key, shape, -127, 128, jnp.int8)
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


@jax.jit
def prepare(small: NMArray) -> PreparedArray:
    """Lay weights out for Hopper.

    Args:
      small: 2:4 weights.

    Returns:
      The same weights.
    """
    return PreparedArray.from_canonical(small, "sm90")


def multiplier(
    product: Product, tiles: Tiles | None = None, **settings: Any
) -> Callable[[PreparedArray, Array], Array]:
    """Give the product by its kernel.

    Args:
      product: the product.
      tiles: its tiles. Default: what the kernel chooses.
      settings: other arguments of the kernel.

    Returns:
      A function of prepared weights and x; x has as many columns as they have inputs.
    """
    kernel = importlib.import_module(f"nmjax.kernels.gpu.{product.kind}")
    settings = {"out_dtype": product.result_dtype, "tiles": tiles} | settings

    def multiply(w: PreparedArray, x: Array) -> Array:
        return kernel.multiply(w.values, w.image, x, scales=w.scales, **settings)

    return multiply


@jax.jit
def difference(found: Array, expected: Array) -> Array:
    """Compare results: the norm of the difference, relative to that of the expected.

    Args:
      found: a result.
      expected: what it should be, of the same shape. Integers are counted: the fraction
        of entries that differ.

    Returns:
      The difference, a float32 number.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels import trials
      >>> float(trials.difference(jnp.array([3.0, 4.5]), jnp.array([3.0, 4.0])))
      0.1...
    """
    if jnp.issubdtype(expected.dtype, jnp.integer):
        return jnp.mean((found != expected).astype(jnp.float32))
    found, expected = found.astype(jnp.float32), expected.astype(jnp.float32)
    return jnp.linalg.norm(found - expected) / jnp.linalg.norm(expected)


@functools.partial(jax.jit, static_argnames="product")
def by_dense(small: NMArray, x: Array, product: Product) -> Array:
    """Multiply with the dense weights.

    Args:
      small: the weights.
      x: inputs.
      product: the product.

    Returns:
      The result, of the product's dtype.
    """
    weights = small.todense().astype(x.dtype)
    return lax.dot(x, weights, preferred_element_type=product.result_dtype)


def measure(product: Product, tiles: Sequence[Tiles]) -> list[float | str]:
    """Measure tiles on the GPU that JAX runs on, in turn.

    Args:
      product: the product.
      tiles: the tiles.

    Returns:
      For each of them the median time of a product in seconds, or why there is none:
      the first line of an error, or by how much the result was wrong.
    """
    count = rotation.sets_for(product.least_bytes)
    passes = rotation.passes_for(product.operations, product.least_bytes, count)
    drawn = [draw(jax.random.key(i), product) for i in range(count)]
    sets = [(prepare(small), x) for small, x in drawn]
    expected = by_dense(*drawn[0], product)
    programs: list[rotation.Program | str] = []
    for one in tiles:
        try:
            function = multiplier(product, one)
            wrong = float(difference(jax.jit(function)(*sets[0]), expected))
            if not wrong <= LARGEST_DIFFERENCE:
                programs.append(f"wrong by {wrong:.2g}")
                continue
            programs.append(rotation.Program(function, sets, passes, rotation.SERIAL))
        except Exception as error:  # noqa: BLE001 - tiles that fail are not chosen
            lines = str(error).splitlines()
            programs.append(lines[0] if lines else type(error).__name__)
    return measure_in_turn(programs)


def measure_in_turn(
    programs: Sequence[rotation.Program | str],
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> list[float | str]:
    """Time programs in rounds, so that a change of clocks meets all of them.

    Args:
      programs: the programs; strings stay as they are.
      rounds: number of rounds.
      seconds: how long a program runs in a round.

    Returns:
      For each program the median time of one of its products, in seconds.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels import rotation, trials
      >>> program = rotation.Program(jnp.sin, [(jnp.ones(2),)])
      >>> times = trials.measure_in_turn([program, "failed"], rounds=1, seconds=0.0)
      >>> times[0] > 0, times[1]
      (True, 'failed')
    """
    ready = {i: p for i, p in enumerate(programs) if not isinstance(p, str)}
    repeats = {i: max(1, round(seconds / p.seconds())) for i, p in ready.items()}
    times: dict[int, list[float]] = {i: [] for i in ready}
    for _ in range(rounds):
        for i, program in ready.items():
            times[i].append(program.seconds(repeats[i]) / program.calls)
    return [
        program if isinstance(program, str) else statistics.median(times[i])
        for i, program in enumerate(programs)
    ]
