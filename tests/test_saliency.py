"""Scores of weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nmjax import saliency


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_magnitude_of_every_16_bit_float(dtype):
    patterns = np.arange(2**16, dtype=np.uint16)
    weights = patterns.view(dtype)
    found = np.asarray(jax.jit(saliency.magnitude)(jnp.asarray(weights)))
    np.testing.assert_array_equal(found.view(np.uint16), patterns & 0x7FFF)


def test_magnitude_keeps_dtype_and_takes_absolute_values():
    for dtype in (jnp.float32, jnp.bfloat16):
        weights = jnp.array([-2.0, -0.0, 0.5, -jnp.inf], dtype)
        found = saliency.magnitude(weights)
        assert found.dtype == dtype
        assert found.tolist() == [2.0, 0.0, 0.5, float("inf")]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_magnitude_has_the_gradient_of_the_absolute_value(dtype):
    weights = jnp.array([-2.0, 3.0, 0.0], dtype)
    grads = jax.grad(lambda w: saliency.magnitude(w).sum())(weights)
    assert grads[:2].tolist() == [-1.0, 1.0]
