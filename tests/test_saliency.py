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


def test_snip_and_gradient_score_by_the_product_and_the_gradient():
    weights, grads = jnp.array([2.0, -3.0, 0.0]), jnp.array([-1.0, 0.5, 7.0])
    assert saliency.snip(weights, grads).tolist() == [2.0, 1.5, 0.0]
    assert saliency.gradient(weights, grads).tolist() == [1.0, 0.5, 7.0]


def test_snip_is_the_change_of_a_quadratic_loss_to_first_order():
    weights = jax.random.normal(jax.random.key(0), (6,))

    def loss(gates):
        return jnp.sum((gates * weights - 1.0) ** 2)

    grads = jax.grad(lambda w: jnp.sum((w - 1.0) ** 2))(weights)
    by_gates = jnp.abs(jax.grad(loss)(jnp.ones(6)))
    np.testing.assert_allclose(saliency.snip(weights, grads), by_gates, rtol=1e-6)


def test_snip_of_different_shapes_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\) and grads of shape \(1,\)"):
        saliency.snip(jnp.ones(2), jnp.ones(1))
