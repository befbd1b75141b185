"""Theoretical cost: the multiply-accumulates that a plan leaves to be done.

`macs` counts what a forward pass spends on every leaf, by tracing alone. `forward`
weighs the counts by the densities of a plan or of masks; `dynamic_training`,
`soft_training` and `phased_training` do the same for whole trainings.

These are counts, not times: they take a dropped weight to cost nothing. Hardware
does not: unstructured masks rarely run faster at all, and norms, activations and the
optimizer, which cost time too, are not counted. A FLOP count is twice a MAC count, so
fractions are the same for both.
"""

from nmjax.flops.costs import (
    Forward,
    LeafCost,
    dynamic_training,
    forward,
    phased_training,
    soft_training,
)
from nmjax.flops.tracing import Macs, macs

__all__ = [
    "Forward",
    "LeafCost",
    "Macs",
    "dynamic_training",
    "forward",
    "macs",
    "phased_training",
    "soft_training",
]
