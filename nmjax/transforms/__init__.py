"""The optax side: stages for `optax.chain` that train sparse networks.

- `decay`: `srste`, the sparse-refined straight-through estimator (SR-STE), in the
  published form and in two forms for Adam.
- `step`: `scale_by_step`, Adam in two phases (STEP).
- `smooth`: `smooth_scales` and `smooth_sparsify`, a continuous forward (S-STE).
- `fixed`: `static`, which keeps params exactly sparse around an inner optimizer.
- `growing`: `set_`, `rigl` and `srigl`, which drop and grow weights besides.
- `pruning`: `one_shot`, `gradual` and `progressive_nm`, which become sparse on the way.
- `holding`, `clearing`, `zeros`, `dynamics`, `scoring`: their mechanism.
- `lasso`: `group_lasso`, a penalty on blocks and channels.
- `state`: `masks` and `sparse_phase`, which find masks and phase in any nesting of
  optimizer states.
"""

from nmjax.transforms.decay import SRSTEHybridState, SRSTEState, srste
from nmjax.transforms.fixed import static
from nmjax.transforms.growing import rigl, set_, srigl
from nmjax.transforms.lasso import group_lasso
from nmjax.transforms.pruning import gradual, one_shot, progressive_nm
from nmjax.transforms.smooth import smooth_scales, smooth_sparsify, soft_threshold
from nmjax.transforms.state import masks, sparse_phase
from nmjax.transforms.step import ScaleByStepState, scale_by_step

__all__ = [
    "SRSTEHybridState",
    "SRSTEState",
    "ScaleByStepState",
    "gradual",
    "group_lasso",
    "masks",
    "one_shot",
    "progressive_nm",
    "rigl",
    "scale_by_step",
    "set_",
    "smooth_scales",
    "smooth_sparsify",
    "soft_threshold",
    "sparse_phase",
    "srigl",
    "srste",
    "static",
]
