"""Run Flax linen models on compressed params, and linen layers that are sparse.

- `apply` and `intercept`: an unmodified model on params whose leaves may be compressed.
"""

from nmjax.linen.running import apply, intercept

__all__ = ["apply", "intercept"]
