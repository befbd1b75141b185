"""The choice of tiles for the kernels of Hopper.

A table, `tiles.json`, has what was fastest where it was measured. Elsewhere a default
is taken, which follows from the sizes alone: it fits into shared memory, divides the
arrays and gives work to as many multiprocessors as it can.
"""

import dataclasses
import functools
import importlib.resources
import json
from typing import Any

import jax.numpy as jnp

from nmjax.kernels.gpu.tiles import PROCESSORS, SHARED_BYTES, Tiles

KINDS = ("hopper", "hopper_decode", "hopper_weight_only")
"""Kernels that take `Tiles`, by their modules."""

FEW_ROWS = 64
"""Up to as many rows, a product takes as long as reading the weights."""


def bucket(rows: int) -> int:
    """Give the batch that a number of rows counts as in the table.

    Args:
      rows: rows of x.

    Returns:
      The next power of two, from 8 to 16384.

    Example:
      >>> from nmjax.kernels.gpu import tiling
      >>> tiling.bucket(1), tiling.bucket(70)
      (8, 128)
    """
    return min(16384, max(8, 1 << (rows - 1).bit_length()))


@functools.cache
def table() -> dict[tuple[str, str, int, int, int], Tiles]:
    """Read the tiles that were measured.

    Returns:
      Tiles by kernel, dtype of the values, outputs, inputs and `bucket` of the rows.

    Example:
      >>> from nmjax.kernels.gpu import tiling
      >>> all(key[0] in tiling.KINDS for key in tiling.table())
      True
    """
    text = (
        importlib.resources.files("nmjax.kernels.gpu")
        .joinpath("tiles.json")
        .read_text()
    )
    return {
        (e["kernel"], e["dtype"], e["features"], e["inputs"], e["rows"]): Tiles(
            **e["tiles"]
        )
        for e in json.loads(text)["entries"]
    }


def choose(kind: str, dtype: Any, features: int, inputs: int, rows: int) -> Tiles:
    """Choose tiles for a product.

    Args:
      kind: the kernel, of `KINDS`.
      dtype: dtype of the values.
      features: outputs, a multiple of 128.
      inputs: inputs, a multiple of 128.
      rows: rows of x.

    Returns:
      The tiles that were fastest, or a default where none were measured.

    Raises:
      ValueError: there is no such kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import tiling
      >>> tiling.choose("hopper", jnp.bfloat16, 4096, 4096, 512).rows
      128
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} is none of {', '.join(KINDS)}")
    key = kind, jnp.dtype(dtype).name, features, inputs, bucket(rows)
    return table().get(key) or default(kind, dtype, features, inputs, rows)


def default(kind: str, dtype: Any, features: int, inputs: int, rows: int) -> Tiles:
    """Give tiles that follow from the sizes alone.

    Few rows: all of them in one tile, and as many blocks and parts of the inputs as end
    first, by what a multiprocessor and the memory read in a time (see `_SPEEDS`). Many
    rows: the tiles that end first, if the time of one is that of what it reads from
    shared memory and writes there, which is more than that of its instructions.

    Args:
      kind: the kernel.
      dtype: dtype of the values.
      features: outputs.
      inputs: inputs.
      rows: rows of x.

    Returns:
      The tiles.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import tiling
      >>> tiling.default("hopper_decode", jnp.bfloat16, 4096, 4096, 1)
      Tiles(features=64, rows=8, inputs=512, stages=4, splits=1, ... together=True)
    """
    if rows > FEW_ROWS:
        return _default_of_many(kind, dtype, features, rows)
    size = _operands(kind, dtype)[1].itemsize
    tiles = Tiles(rows=_multiple(rows, 8 if rows <= 32 or size == 2 else 16))
    if kind == "hopper":
        return _deepen(dataclasses.replace(tiles, inputs=128 // size), kind, dtype)
    return _default_of_few(kind, dtype, features, inputs, tiles)


_SPEEDS = {"multiprocessor": 0.085, "memory": 3.3, "second kernel": 2.0}
"""What defaults follow from: MB that a multiprocessor and that all of them read in a
microsecond, and microseconds. They are guesses from data sheets, not measured."""


def _default_of_few(
    kind: str, dtype: Any, features: int, inputs: int, tiles: Tiles
) -> Tiles:
    """Give the default for few rows, see `default`."""
    weight, number = (operand.itemsize for operand in _operands(kind, dtype))
    reads = features * inputs * (weight / 2 + 1 / 8)
    found = []
    for together in (False, True):
        sizes = [s for s in (512, 256, 128, 64) if inputs % s == 0][: 4 - together]
        deep = [
            _deepen(
                dataclasses.replace(tiles, inputs=s, together=together), kind, dtype
            )
            for s in sizes
            if s * number <= 512 * (1 + together)
        ]
        first = next((t for t in deep if t.stages >= 4), deep[-1])
        most = max(1, inputs // first.inputs // 2)
        found += [dataclasses.replace(first, splits=s + 1) for s in range(most)]

    def microseconds(tiles: Tiles) -> tuple[float, float]:
        blocks = features // tiles.block * tiles.splits
        own = reads / blocks + tiles.rows * inputs * number / tiles.splits
        one = _rounds(blocks) * own / 1e6 / _SPEEDS["multiprocessor"]
        second = _SPEEDS["second kernel"] if tiles.splits > 1 else 0.0
        return max(reads / 1e6 / _SPEEDS["memory"], one) + second, one

    return min(found, key=microseconds)


def _default_of_many(kind: str, dtype: Any, features: int, rows: int) -> Tiles:
    """Give the default for many rows, see `default`."""
    size = _operands(kind, dtype)[1].itemsize

    def moved(tiles: Tiles) -> int:
        block = tiles.block
        # Bytes for 128 bytes of every row of x, which take two instructions each.
        written = block * (64 + 8) + tiles.rows * 128
        read = 2 * block // 64 * (64 * 32 + tiles.rows * 64)
        return _rounds(features // block * -(-rows // tiles.rows)) * (written + read)

    step = 16 // size
    heights = [Tiles(rows=height) for height in range(64, 257, step)]
    if features % 256 == 0:
        most = 128 if kind == "hopper_weight_only" else 192
        heights += [
            Tiles(features=128, rows=height) for height in range(64, most + 1, step)
        ]
    # Tiles that are stored in many small parts are left out.
    heights = [t for t in heights if t.features * t.piece("bfloat16") >= 24 * 64]
    # The widest, where several take the same time.
    best = min(heights, key=lambda t: (moved(t), -t.features, -t.rows))
    return _deepen(dataclasses.replace(best, inputs=128 // size), kind, dtype)


def candidates(
    kind: str, dtype: Any, features: int, inputs: int, rows: int
) -> list[Tiles]:
    """List tiles that are worth a measurement, the default first.

    Args:
      kind: the kernel, of `KINDS`.
      dtype: dtype of the values.
      features: outputs.
      inputs: inputs.
      rows: rows of x.

    Returns:
      Tiles that the kernel can take.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import tiling
      >>> found = tiling.candidates("hopper", jnp.bfloat16, 4096, 4096, 4096)
      >>> found[0] == tiling.default("hopper", jnp.bfloat16, 4096, 4096, 4096)
      True
    """
    first = default(kind, dtype, features, inputs, rows)
    found = [first]

    def add(**changes: Any) -> None:
        tiles = _deepen(dataclasses.replace(first, **changes), kind, dtype)
        sums = "int32" if tiles.splits == 1 and dtype == jnp.int8 else "float32"
        types = (*_operands(kind, dtype), sums)
        if tiles not in found and not tiles.refusal(*types, features, inputs):
            found.append(tiles)

    if kind == "hopper" or rows > FEW_ROWS:
        shapes = ((first.features, first.rows), (64, 256), (128, 192), (128, 128))
        for wide, height in (*shapes, (64, 192), (64, 128)):
            for cluster in (1, 2):
                add(features=wide, rows=height, cluster=cluster)
        for wide, height in ((64, 256), (128, 192)):
            add(features=wide, rows=height, cluster=2, overlap=True)
            add(features=wide, rows=height, cluster=2, panel=16)
            add(features=wide, rows=height, cluster=4)
        add(overlap=True)
        add(inputs=2 * first.inputs)
    else:
        for together in (False, True):
            for splits in (1, 2, 4, 8):
                add(together=together, splits=splits)
            add(together=together, splits=max(1, first.splits // 2))
            add(together=together, splits=2 * first.splits)
        for step in (first.inputs // 2, 2 * first.inputs):
            add(inputs=step)
    return found


def _operands(kind: str, dtype: Any) -> tuple[Any, Any]:
    """Give the dtypes of values and inputs."""
    values = jnp.dtype(dtype)
    return values, jnp.dtype("bfloat16") if kind == "hopper_weight_only" else values


def _deepen(tiles: Tiles, kind: str, dtype: Any) -> Tiles:
    """Take as many stages as fit, at least one and up to six."""
    types = (*_operands(kind, dtype), "float32")
    # With the longer image too.
    word_inputs = 32 if types[1].itemsize == 2 else 64
    for stages in range(6, 1, -1):
        deep = dataclasses.replace(tiles, stages=stages)
        if deep.shared_bytes(*types, word_inputs) <= SHARED_BYTES:
            return deep
    return dataclasses.replace(tiles, stages=1)


def _rounds(count: int) -> int:
    """Give how often every multiprocessor takes a tile."""
    return -(-count // PROCESSORS)


def _multiple(count: int, step: int) -> int:
    """Round up to a multiple."""
    return -(-count // step) * step
