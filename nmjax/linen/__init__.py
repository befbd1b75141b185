"""Run Flax linen models on compressed params, and linen layers that are sparse.

- `apply`, `intercept`: an unmodified model on params whose leaves may be compressed.
- `FanInDense`, `NMDense`: layers that store and train sparse kernels from the start.
"""

from nmjax.linen.layers import FanInDense, NMDense
from nmjax.linen.running import apply, intercept

__all__ = ["FanInDense", "NMDense", "apply", "intercept"]
