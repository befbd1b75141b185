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

import jax
import jax.numpy as jnp

KINDS = ("hopper", "hopper_decode", "hopper_weight_only")
"""Kernels that take `Tiles`, by their modules."""

PROCESSORS = 132
"""Streaming multiprocessors of an H100 SXM and an H200."""

SHARED_BYTES = 232448
"""Shared memory of a block on Hopper."""

GROUPS = 2
"""Warpgroups of a block that compute."""

FEW_ROWS = 64
"""Up to as many rows, a product takes as long as reading the weights."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel on Hopper.

    Attributes:
      features: outputs of a warpgroup, 64 or 128; two of a block compute.
      rows: rows of x, a multiple of 8 up to 256, or up to 192 where `features` is 128.
      inputs: inputs of a step.
      stages: steps that are in shared memory at once.
      splits: parts that the inputs are cut into, to give work to more blocks.
      panel: tiles along the rows that are computed one after the other before the next
        outputs, so that weights and x are found in the L2 cache again.
      cluster: blocks, 1, 2 or 4, that share the rows of x that one of them loads.
      overlap: whether the instructions of a step start before those of the last one
        have ended.
      together: whether both warpgroups of a block have the same outputs, and each of
        them half of the inputs of a step.
    """

    features: int = 64
    rows: int = 256
    inputs: int = 64
    stages: int = 4
    splits: int = 1
    panel: int = 8
    cluster: int = 1
    overlap: bool = False
    together: bool = False

    @property
    def block(self) -> int:
        """Outputs of a block."""
        return self.features if self.together else GROUPS * self.features


def processors() -> int:
    """Count the streaming multiprocessors of the GPU that JAX runs on.

    Returns:
      Their number; that of an H100 SXM where there is no GPU.

    Example:
      >>> from nmjax.kernels.gpu import tiling
      >>> tiling.processors() > 0
      True
    """
    device: Any = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else PROCESSORS


def piece(tiles: Tiles, out_dtype: Any) -> int:
    """Give the rows of a tile that are stored at once, up to 8 KB of a warpgroup.

    Args:
      tiles: the sizes.
      out_dtype: dtype of what is stored.

    Returns:
      The largest multiple of 8 that divides the rows.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import tiling
      >>> tiling.piece(tiling.Tiles(rows=160), jnp.bfloat16)
      40
    """
    most = 8192 // tiles.features // jnp.dtype(out_dtype).itemsize
    return max(size for size in range(8, most + 1, 8) if tiles.rows % size == 0)


def shared_bytes(
    tiles: Tiles, values_dtype: Any, x_dtype: Any, out_dtype: Any, word_inputs: int = 64
) -> int:
    """Count the shared memory that a block takes.

    Args:
      tiles: the sizes.
      values_dtype: dtype of the values.
      x_dtype: dtype of the inputs.
      out_dtype: dtype of what is stored.
      word_inputs: inputs that a word of the image describes, 64 or 32.

    Returns:
      Bytes.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import tiling
      >>> tiling.shared_bytes(tiling.Tiles(), *[jnp.bfloat16] * 3)
      200768
    """
    weight, number, result = (
        jnp.dtype(dtype).itemsize for dtype in (values_dtype, x_dtype, out_dtype)
    )
    block = tiles.block
    values = block * tiles.inputs // 2 * weight
    image = tiles.inputs // word_inputs * 8 * block
    x = tiles.rows * tiles.inputs * number
    rows = piece(tiles, out_dtype)
    out = min(2, tiles.rows // rows) * rows * block * result
    barriers = 2 * 8
    if tiles.together:  # sums of one warpgroup, and their barriers
        out += tiles.rows * tiles.features * 4 + barriers
    return tiles.stages * (values + image + x + barriers) + out


def refusal(
    tiles: Tiles,
    values_dtype: Any,
    x_dtype: Any,
    out_dtype: Any,
    features: int,
    inputs: int,
    word_inputs: int = 64,
) -> str:
    """Say why a kernel cannot take tiles; empty where it can.

    Args:
      tiles: the sizes.
      values_dtype: dtype of the values.
      x_dtype: dtype of the inputs.
      out_dtype: dtype of what is stored.
      features: outputs of the product.
      inputs: its inputs.
      word_inputs: inputs that a word of the image describes, 64 or 32.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.kernels.gpu import tiling
      >>> wide = tiling.Tiles(features=128, rows=128)
      >>> tiling.refusal(wide, *[jnp.bfloat16] * 3, 384, 256)
      '256 outputs of 1 blocks do not divide the 384 of the product'
    """
    if tiles.features not in (64, 128):
        return f"features={tiles.features} must be 64 or 128"
    upcast = jnp.dtype(values_dtype) != jnp.dtype(x_dtype)
    # Rows whose sums fit into registers, beside values where these are widened.
    most = 256 if tiles.features == 64 else 128 if upcast else 192
    # Instructions on int8 take 8, 16, 24, 32, 48, 64 rows, and so on.
    step = 16 if jnp.dtype(x_dtype).itemsize == 1 and tiles.rows > 32 else 8
    if not 8 <= tiles.rows <= most or tiles.rows % step:
        return f"rows={tiles.rows} must be a multiple of {step} up to {most}"
    if tiles.cluster not in (1, 2, 4) or tiles.rows % (8 * tiles.cluster):
        return f"cluster={tiles.cluster} must be 1, 2 or 4 and divide rows / 8"
    if features % (tiles.block * tiles.cluster):
        return (
            f"{tiles.block} outputs of {tiles.cluster} blocks do not divide the "
            f"{features} of the product"
        )
    if tiles.together and (tiles.inputs < 128 or tiles.rows > 128):
        return "together=True takes inputs=128 or more, and up to 128 rows"
    if tiles.inputs not in (64, 128, 256, 512) or inputs % tiles.inputs:
        return f"inputs={tiles.inputs} must be 64, 128, 256 or 512 and divide {inputs}"
    if not 1 <= tiles.splits <= inputs // tiles.inputs:
        return f"splits={tiles.splits} must be 1 to {inputs // tiles.inputs}"
    if tiles.stages < 1 + tiles.overlap:
        return f"stages={tiles.stages} must be at least {1 + tiles.overlap}"
    if tiles.overlap and (upcast or tiles.together):
        return "overlap=True takes values of the dtype of x, and together=False"
    taken = shared_bytes(tiles, values_dtype, x_dtype, out_dtype, word_inputs)
    if taken > SHARED_BYTES:
        return f"they take {taken} bytes of the {SHARED_BYTES} of shared memory"
    return ""


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
    heights = [t for t in heights if t.features * piece(t, "bfloat16") >= 24 * 64]
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
        if tiles not in found and not refusal(tiles, *types, features, inputs):
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
        if shared_bytes(deep, *types, word_inputs) <= SHARED_BYTES:
            return deep
    return dataclasses.replace(tiles, stages=1)


def _rounds(count: int) -> int:
    """Give how often every multiprocessor takes a tile."""
    return -(-count // PROCESSORS)


def _multiple(count: int, step: int) -> int:
    """Round up to a multiple."""
    return -(-count // step) * step
