"""Sparse flax.nnx models.

- `attach`, `detach`: train a model that reads sparse weights and stores dense ones.
"""

from nmjax.nnx.attach import SparseRead, attach, detach

__all__ = ["SparseRead", "attach", "detach"]
