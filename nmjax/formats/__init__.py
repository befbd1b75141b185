"""Compressed formats: small pytrees in place of sparse arrays.

- `NMArray`: n of every m values along an axis, positions packed in bytes.
- `FanInArray`: the same number of inputs for every active neuron.
- `BlockArray`: whole blocks.
- `PreparedArray`: an `NMArray` as the tensor cores of a GPU take it, by `prepare`.
- `WindowArray`: a `FanInArray` as AVX-512 takes it, by `prepare`.
- `validate`: checks what was read from somewhere.
- `quantize`: integers or float8 with scales in place of the values.
- `decompress`, `sizes`: whole trees of params, as `nmjax.compress` makes them.

Each is a frozen dataclass registered as a pytree: its arrays are leaves, its shape and
layout static. They pass through `jax.jit`, `jax.vmap`, `jax.lax.scan` and `jax.export`,
and can be saved, sharded and differentiated with respect to their values.
"""

from nmjax.formats.blocks import BlockArray
from nmjax.formats.checks import Compressed
from nmjax.formats.fan_in import FanInArray
from nmjax.formats.grouped import NMArray
from nmjax.formats.prepared import PreparedArray, prepare
from nmjax.formats.quantizing import quantize
from nmjax.formats.trees import decompress, is_compressed, sizes
from nmjax.formats.validation import validate
from nmjax.formats.windows import WindowArray

__all__ = [
    "BlockArray",
    "Compressed",
    "FanInArray",
    "NMArray",
    "PreparedArray",
    "WindowArray",
    "decompress",
    "is_compressed",
    "prepare",
    "quantize",
    "sizes",
    "validate",
]
