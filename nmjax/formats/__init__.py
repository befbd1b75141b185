"""Compressed formats: small pytrees in place of sparse arrays.

- `NMArray`: n of every m values along an axis, positions packed in bytes.
- `FanInArray`: the same number of inputs for every active neuron.
- `BlockArray`: whole blocks.
- `compress` and `decompress`: whole trees of params, by plan or by masks.

Each is a frozen dataclass registered as a pytree: its arrays are leaves, its shape and
layout static. They pass through `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.export`,
and can be saved, sharded and differentiated with respect to their values.
"""

from nmjax.formats.blocks import BlockArray
from nmjax.formats.checks import Compressed
from nmjax.formats.fan_in import FanInArray
from nmjax.formats.grouped import NMArray
from nmjax.formats.trees import compress, decompress, is_compressed, sizes

__all__ = [
    "BlockArray",
    "Compressed",
    "FanInArray",
    "NMArray",
    "compress",
    "decompress",
    "is_compressed",
    "sizes",
]
