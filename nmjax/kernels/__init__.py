"""Matmuls with compressed weights: one primitive, and how each platform computes it.

- `matmul` and `backends`: what users call.
- `reference`: the forms in plain XLA operations.
- `dispatch`: the primitive, its derivatives and batching, and its lowering rules.
"""

from nmjax.kernels.matmuls import Backend, backends, matmul

__all__ = ["Backend", "backends", "matmul"]
