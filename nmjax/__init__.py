"""Hardware-usable sparse networks in JAX.

`plan` says which leaf of a params tree holds which pattern, `sparsify` makes the
forward pass sparse, and stages such as `srste` train it within any optax chain.
"""

from importlib import import_module as _import_module
from importlib.metadata import version as _version
from typing import Any as _Any

from nmjax.budgets import Block, Channel, FanIn, Unstructured
from nmjax.compression import compress
from nmjax.distributions import er, erk, global_, uniform
from nmjax.formats import decompress, prepare
from nmjax.initial import sparse_init
from nmjax.kernels import backends, conv_general_dilated, dot_general, matmul
from nmjax.lottery import rewind
from nmjax.masking import (
    block_mask,
    channel_mask,
    fan_in_mask,
    global_topk_mask,
    nm_mask,
    topk_mask,
    transposable_nm_mask,
    vnm_mask,
)
from nmjax.neurons import active_neurons
from nmjax.patterns import NM, VNM, Dense, TransposableNM
from nmjax.planning import plan
from nmjax.plans import LeafPlan, Plan
from nmjax.projection import apply_masks, compute_masks, project, sparsify
from nmjax.removal import remove_neurons
from nmjax.topology import rigl_update, set_update, srigl_update
from nmjax.tracking import tracker
from nmjax.transforms import (
    gradual,
    group_lasso,
    masks,
    one_shot,
    progressive_nm,
    rigl,
    scale_by_step,
    set_,
    smooth_scales,
    smooth_sparsify,
    sparse_phase,
    srigl,
    srste,
    static,
)

__version__ = _version("nmjax")

__all__ = [
    "NM",
    "VNM",
    "Block",
    "Channel",
    "Dense",
    "FanIn",
    "LeafPlan",
    "Plan",
    "TransposableNM",
    "Unstructured",
    "active_neurons",
    "apply_masks",
    "backends",
    "block_mask",
    "channel_mask",
    "compress",
    "compute_masks",
    "conv_general_dilated",
    "decompress",
    "dot_general",
    "er",
    "erk",
    "fan_in_mask",
    "global_",
    "global_topk_mask",
    "gradual",
    "group_lasso",
    "masks",
    "matmul",
    "nm_mask",
    "one_shot",
    "plan",
    "progressive_nm",
    "prepare",
    "project",
    "remove_neurons",
    "rewind",
    "rigl",
    "rigl_update",
    "scale_by_step",
    "set_",
    "set_update",
    "smooth_scales",
    "smooth_sparsify",
    "sparse_init",
    "sparse_phase",
    "sparsify",
    "srigl",
    "srigl_update",
    "srste",
    "static",
    "topk_mask",
    "tracker",
    "transposable_nm_mask",
    "uniform",
    "vnm_mask",
]


def __getattr__(name: str) -> _Any:
    """Import the rooms for flax when they are first used: it is not needed before."""
    if name in ("linen", "nnx"):
        return _import_module(f"nmjax.{name}")
    raise AttributeError(f"module 'nmjax' has no attribute {name!r}")
