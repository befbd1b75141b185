"""The device: whether it is a GPU, and whether it still answers."""

import jax
import jax.numpy as jnp


def on_gpu() -> bool:
    """Tell whether JAX runs on a GPU."""
    return jax.default_backend() == "gpu"


def device_answers() -> bool:
    """Tell whether the device can still be used, after an error."""
    try:
        return float(jnp.sum(jnp.ones(1024) + jnp.ones(1024))) == 2048.0
    except Exception:  # noqa: BLE001 - whatever it is, the answer is no
        return False
