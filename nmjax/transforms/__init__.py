"""The optax side: stages for `optax.chain` that train sparse networks.

- `decay`: `srste`, the sparse-refined straight-through estimator (SR-STE), in the
  published form and in two forms for Adam.
- `step`: `scale_by_step`, Adam in two phases (STEP).
- `smooth`: `smooth_scales` and `smooth_sparsify`, a continuous forward (S-STE).
- `state`: `masks` and `sparse_phase`, which find masks and phase in any nesting of
  optimizer states.
"""

from nmjax.transforms.decay import SRSTEHybridState, SRSTEState, srste
from nmjax.transforms.smooth import smooth_scales, smooth_sparsify, soft_threshold
from nmjax.transforms.state import masks, sparse_phase
from nmjax.transforms.step import ScaleByStepState, scale_by_step

__all__ = [
    "SRSTEHybridState",
    "SRSTEState",
    "ScaleByStepState",
    "masks",
    "scale_by_step",
    "smooth_scales",
    "smooth_sparsify",
    "soft_threshold",
    "sparse_phase",
    "srste",
]
