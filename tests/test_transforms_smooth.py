"""S-STE: the smooth projection, its factor and its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_oracles as oracles
from hypothesis import given
from hypothesis import strategies as st

import nmjax as nm
from nmjax.transforms import soft_threshold

W = np.random.default_rng(2).normal(size=(16, 8)).astype(np.float32)


@pytest.fixture
def params():
    return {"kernel": jnp.asarray(W), "bias": jnp.ones(8)}


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (1, 2), (4, 8), (3, 4), (4, 4)])
def test_projection_is_the_published_one(n, m):
    soft = soft_threshold(jnp.asarray(W), n, m)
    np.testing.assert_allclose(soft, oracles.soft_threshold(W, n, m), rtol=1e-6)


@given(
    st.lists(
        st.integers(-3, 3).map(float),
        min_size=4,
        max_size=4,
    )
)
def test_ties_and_zeros_keep_at_most_n(group):
    soft = soft_threshold(jnp.array(group), 2, 4, axis=0)
    expected = oracles.soft_threshold(np.array(group)[:, None], 2, 4)[:, 0]
    assert soft.tolist() == expected.tolist()
    assert int((soft != 0).sum()) <= 2


def test_projection_has_no_jump_where_ranks_swap():
    below = soft_threshold(jnp.array([1.0, 0.5, 0.4999, 0.1]), 2, 4, axis=0)
    above = soft_threshold(jnp.array([1.0, 0.4999, 0.5, 0.1]), 2, 4, axis=0)
    assert float(jnp.abs(below - above).max()) < 1e-3


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_projection_runs_along_any_axis(axis):
    soft = soft_threshold(jnp.asarray(W), 2, 4, axis=axis)
    moved = np.moveaxis(W, axis, 0)
    expected = np.moveaxis(oracles.soft_threshold(moved, 2, 4), 0, axis)
    np.testing.assert_allclose(soft, expected, rtol=1e-6)


def test_scale_is_the_published_factor(params):
    plan = nm.plan(params, nm.NM(2, 4))
    scales = nm.smooth_scales(params, plan)
    expected = oracles.smooth_scale(W.astype(np.float64), 2, 4)
    np.testing.assert_allclose(scales["kernel"], expected, rtol=1e-5)
    assert scales["bias"] == optax.MaskedNode()


def test_scale_of_a_zero_tensor_is_one():
    params = {"kernel": jnp.zeros((8, 8))}
    scales = nm.smooth_scales(params, nm.plan(params, nm.NM(2, 4)))
    assert float(scales["kernel"]) == 1.0


def test_stacked_layers_get_one_scale_each(params):
    layers = {"kernel": jnp.stack([W, 3 * W[::-1]])}
    plan = nm.plan(layers, nm.NM(2, 4), stacked="kernel")
    scales = nm.smooth_scales(layers, plan)
    assert scales["kernel"].shape == (2, 1, 1)
    one = nm.plan({"kernel": layers["kernel"][1]}, nm.NM(2, 4))
    expected = nm.smooth_sparsify(
        {"kernel": layers["kernel"][1]},
        one,
        nm.smooth_scales({"kernel": layers["kernel"][1]}, one),
    )
    got = nm.smooth_sparsify(layers, plan, scales)["kernel"][1]
    np.testing.assert_allclose(got, expected["kernel"], rtol=1e-6)


def test_forward_is_exactly_sparse_and_gradient_passes_straight_through(params):
    plan = nm.plan(params, nm.NM(2, 4))
    scales = nm.smooth_scales(params, plan)
    target = jnp.asarray(np.random.default_rng(3).normal(size=W.shape), jnp.float32)

    def loss(params):
        sparse = nm.smooth_sparsify(params, plan, scales)
        return (sparse["kernel"] * target).sum() + sparse["bias"].sum()

    sparse = nm.smooth_sparsify(params, plan, scales)
    assert (np.asarray(sparse["kernel"] == 0).reshape(4, 4, 8).sum(1) >= 2).all()
    assert (sparse["bias"] == params["bias"]).all()
    grads = jax.jit(jax.grad(loss))(params)
    assert (grads["kernel"] == target).all()
    assert (grads["bias"] == 1).all()


def test_params_keep_their_dtype(params):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    plan = nm.plan(half, nm.NM(2, 4))
    scales = nm.smooth_scales(half, plan)
    assert scales["kernel"].dtype == jnp.float32
    sparse = nm.smooth_sparsify(half, plan, scales)
    assert sparse["kernel"].dtype == jnp.bfloat16


def test_scaled_projection_is_the_best_multiple(params):
    plan = nm.plan(params, nm.NM(2, 4))
    scales = nm.smooth_scales(params, plan)

    def error(factor):
        changed = jax.tree.map(lambda s: s * factor, scales)
        sparse = nm.smooth_sparsify(params, plan, changed)
        return float(((sparse["kernel"] - params["kernel"]) ** 2).sum())

    assert error(1.0) < min(error(0.95), error(1.05))


def test_other_patterns_and_other_params_are_errors(params):
    plan = nm.plan(params, nm.TransposableNM(2, 4))
    with pytest.raises(TypeError, match=r"leaf 'kernel': S-STE projects onto nm.NM"):
        nm.smooth_scales(params, plan)
    plan = nm.plan(params, nm.NM(2, 4))
    with pytest.raises(ValueError, match="'other' is not in the plan"):
        nm.smooth_scales({"other": params["kernel"]}, plan)
