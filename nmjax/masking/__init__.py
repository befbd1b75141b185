"""Masks: arrays of scores to boolean arrays of the same shape, True = kept.

Every function is pure, takes scores of any real floating dtype (higher = kept) and
works under `jax.jit`, `jax.vmap`, `jax.export` and meshes with Auto or Explicit axes.

- Counts are exact. Ties keep the lowest index.
- NaN ranks above ``+inf``, so it is kept and stays visible; ``-0.0`` equals ``0.0``.
- Axes are split in place and only counts cross devices: no sharded array is gathered.
- A length that is no multiple of its group is a ValueError, never padded.
"""

from nmjax.masking.grouped import nm_mask, vnm_mask
from nmjax.masking.selection import fan_in_mask, global_topk_mask, topk_mask
from nmjax.masking.structured import block_mask, block_sums, channel_mask
from nmjax.masking.transposable import transposable_nm_mask

__all__ = [
    "block_mask",
    "block_sums",
    "channel_mask",
    "fan_in_mask",
    "global_topk_mask",
    "nm_mask",
    "topk_mask",
    "transposable_nm_mask",
    "vnm_mask",
]
