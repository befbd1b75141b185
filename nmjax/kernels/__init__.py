"""Matmuls with compressed weights: one primitive, and how each platform computes it.

- `matmul` and `backends`: what users call.
- `dot_general` and `conv_general_dilated`: what layers call.
- `reference`: the forms in plain XLA operations.
- `dispatch`: the primitive, its derivatives and batching.
- `lowering`: what each platform does with it; `settings`: its static parameters.
- `choosing` and `native`: CPUs; `gpu`: NVIDIA GPUs.
"""

from nmjax.kernels.contractions import conv_general_dilated, dot_general
from nmjax.kernels.matmuls import Backend, backends, matmul

__all__ = ["Backend", "backends", "conv_general_dilated", "dot_general", "matmul"]
