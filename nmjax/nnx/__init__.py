"""Sparse flax.nnx models: train them unchanged, run them on compressed params.

- `attach`, `detach`: the model reads sparse weights and stores dense ones.
- `compress`, `load`, `decompress`: the model stores and computes with compressed ones.
- `CompressedParam`, `dense_params`: tell the one kind of params from the other.
- `FanInDense`, `NMDense`: layers that store and train sparse kernels from the start.
"""

from nmjax.nnx.attach import SparseRead, attach, detach
from nmjax.nnx.layers import FanInDense, NMDense, Positions
from nmjax.nnx.running import compress, decompress, load
from nmjax.nnx.variables import CompressedParam, dense_params

__all__ = [
    "CompressedParam",
    "FanInDense",
    "NMDense",
    "Positions",
    "SparseRead",
    "attach",
    "compress",
    "decompress",
    "dense_params",
    "detach",
    "load",
]
