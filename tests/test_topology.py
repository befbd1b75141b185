"""Drop and grow rules against loops, and their invariants."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import topology_oracles as oracles

import nmjax as nm
from nmjax import topology

SHAPE = (3, 4, 5)
rigl_update = jax.jit(nm.rigl_update)
srigl_update = jax.jit(nm.srigl_update, static_argnames=("budget", "gamma_sal"))


def layer(seed, density=0.4, levels=None, shape=SHAPE):
    """Weights, mask and gradients; few `levels` make many ties."""
    rng = np.random.default_rng(seed)
    weights, grads = rng.normal(size=(2, *shape)).astype(np.float32)
    if levels:
        weights, grads = (np.round(a * levels) / levels for a in (weights, grads))
    mask = rng.random(shape) < density
    return np.where(mask, weights, 0).astype(np.float32), mask, grads


def fan_in_layer(seed, fan_in, levels=None):
    weights, _, grads = layer(seed, 1.0, levels)
    scores = np.random.default_rng(seed + 1).random(SHAPE).astype(np.float32)
    mask = np.asarray(nm.fan_in_mask(jnp.asarray(scores), fan_in))
    return np.where(mask, weights, 0).astype(np.float32), mask, grads


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_rigl_update_equals_the_loop(levels, fraction):
    for seed in range(4):
        weights, mask, grads = layer(seed, levels=levels)
        found = rigl_update(weights, mask, grads, drop_fraction=fraction)
        np.testing.assert_array_equal(
            found, oracles.rigl(weights, mask, grads, fraction)
        )


@pytest.mark.parametrize("levels", [None, 1])
@pytest.mark.parametrize("gamma", [None, 0.3, 0.95, 2])
def test_srigl_update_equals_the_loop(levels, gamma):
    for seed, fraction in enumerate([0.0, 0.3, 0.7, 1.0]):
        weights, mask, grads = fan_in_layer(seed, 3, levels)
        found = srigl_update(
            weights, mask, grads, budget=17, drop_fraction=fraction, gamma_sal=gamma
        )
        expected = oracles.srigl(weights, mask, grads, 17, fraction, gamma)
        np.testing.assert_array_equal(found, expected)


@hypothesis.given(
    st.integers(0, 2**31 - 1), st.floats(0, 1), st.sampled_from([1, None])
)
def test_rigl_conserves_the_number_of_active_weights(seed, fraction, levels):
    weights, mask, grads = layer(seed, levels=levels)
    found = rigl_update(weights, mask, grads, drop_fraction=jnp.float32(fraction))
    assert int(found.sum()) == mask.sum()


def test_srigl_conserves_its_budget_over_a_thousand_updates():
    budget, gamma = 23, 0.5
    shape = (6, 7)

    def update(carry, key):
        mask, _ = carry
        weights, grads = jax.random.normal(key, (2, *shape))
        new = nm.srigl_update(
            weights, mask, grads, budget=budget, drop_fraction=0.4, gamma_sal=gamma
        )
        counts = new.sum(0)
        alive = (counts > 0).sum()
        exact = jnp.all((counts == 0) | (counts == jnp.minimum(6, budget // alive)))
        return (new, exact), (exact, alive)

    start = nm.fan_in_mask(jax.random.uniform(jax.random.key(0), shape), 3)
    keys = jax.random.split(jax.random.key(1), 1000)
    carry = (start, jnp.array(True))
    _, (exact, alive) = jax.jit(functools.partial(jax.lax.scan, update))(carry, keys)
    assert bool(exact.all())
    assert int(alive.min()) < 7  # ablation happened
    assert (jnp.diff(alive) > 0).any()  # and so did revival


def test_the_guard_keeps_enough_neurons_to_hold_the_budget():
    # All salient weights in one neuron: the others would be ablated.
    weights = np.zeros((4, 4), np.float32)
    weights[:, 0] = 1.0
    mask = np.ones((4, 4), bool)
    found = srigl_update(
        weights,
        mask,
        np.zeros((4, 4), np.float32),
        budget=12,
        drop_fraction=0.75,
        gamma_sal=0.95,
    )
    assert int((found.sum(0) > 0).sum()) >= 3
    np.testing.assert_array_equal(
        found, oracles.srigl(weights, mask, weights * 0, 12, 0.75, 0.95)
    )


def test_survivors_fan_in_grows_after_ablation():
    weights = np.zeros((8, 4), np.float32)
    weights[:4, :2], weights[0, 2:] = 1.0, 0.1
    mask = np.zeros((8, 4), bool)
    mask[:4] = True
    grads = np.zeros((8, 4), np.float32)
    grads[:, :2] = 1.0
    found = srigl_update(
        weights, mask, grads, budget=16, drop_fraction=0.5, gamma_sal=0.95
    )
    assert found.sum(0).tolist() == [8, 8, 0, 0]


def test_an_ablated_neuron_can_come_back():
    weights = np.ones((4, 3), np.float32)
    weights[:, 2] = 0.0
    mask = np.ones((4, 3), bool)
    mask[:, 2] = False
    grads = np.zeros((4, 3), np.float32)
    grads[:, 2] = 9.0
    found = srigl_update(
        weights, mask, grads, budget=6, drop_fraction=0.5, gamma_sal=0.95
    )
    assert found[:, 2].sum() > 0


def test_a_fresh_weight_of_zero_stays_active():
    weights = jnp.array([0.0, 1.0, 2.0, 0.0])
    mask = jnp.array([True, True, False, False])
    kept, dropped = topology.keep_largest(weights, mask, 0.0)
    assert kept.tolist() == mask.tolist()
    assert int(dropped) == 0


def test_dropped_weights_may_come_straight_back():
    weights, mask = jnp.array([3.0, 1.0, 0.0]), jnp.array([True, True, False])
    grads = jnp.array([0.0, 5.0, 1.0])
    assert (
        rigl_update(weights, mask, grads, drop_fraction=0.5).tolist() == mask.tolist()
    )


def test_nan_gradients_grow_but_never_oust_a_kept_weight():
    weights, mask = jnp.array([3.0, 1.0, 0.0]), jnp.array([True, True, False])
    grads = jnp.array([0.0, 5.0, jnp.nan])
    found = rigl_update(weights, mask, grads, drop_fraction=0.5)
    assert found.tolist() == [True, False, True]
    found = rigl_update(weights, mask, grads, drop_fraction=0.0)
    assert found.tolist() == mask.tolist()


def test_an_empty_mask_stays_empty():
    weights = jnp.zeros((2, 3))
    found = rigl_update(weights, weights > 0, weights + 1, drop_fraction=0.3)
    assert int(found.sum()) == 0


def test_set_grows_only_free_positions_and_differs_by_key():
    weights, mask, _ = layer(0)
    update = jax.jit(nm.set_update)
    first, second = (
        np.asarray(update(jax.random.key(i), weights, mask, drop_fraction=0.5))
        for i in (0, 1)
    )
    kept, _ = topology.keep_largest(jnp.asarray(weights), jnp.asarray(mask), 0.5)
    assert first.sum() == second.sum() == mask.sum()
    assert (first & kept).sum() == kept.sum()
    assert (first != second).any()


def test_set_grows_uniformly():
    weights = jnp.array([1.0, 2.0, 3.0, 4.0, 0.0, 0.0, 0.0, 0.0])
    mask = weights > 0
    keys = jax.random.split(jax.random.key(0), 4000)
    grown = jax.vmap(lambda k: nm.set_update(k, weights, mask, drop_fraction=0.5))(keys)
    # Two of the six positions that are not kept: each with chance 1/3.
    share = grown.mean(0)
    np.testing.assert_allclose(share[jnp.array([0, 1, 4, 5, 6, 7])], 1 / 3, atol=0.04)
    np.testing.assert_array_equal(share[2:4], 1.0)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_layers(dtype):
    weights, mask, grads = layer(3, levels=4)
    found = rigl_update(
        weights.astype(dtype), mask, grads.astype(dtype), drop_fraction=0.3
    )
    np.testing.assert_array_equal(found, oracles.rigl(weights, mask, grads, 0.3))


def test_decimal_fractions_drop_what_one_expects():
    for active, fraction, expected in [(10, 0.7, 7), (10, 0.3, 3), (1000, 0.29, 290)]:
        assert int(topology.drop_count(jnp.array(active), fraction)) == expected


def test_bad_arguments_are_refused():
    ones, mask = jnp.ones((2, 3)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match=r"drop_fraction=1.5 must be in \[0, 1\]"):
        nm.rigl_update(ones, mask, ones, drop_fraction=1.5)
    with pytest.raises(ValueError, match=r"must have one shape.*\(3, 2\)"):
        nm.rigl_update(ones, mask, ones.T, drop_fraction=0.5)
    with pytest.raises(ValueError, match=r"budget=2.*one weight per neuron \(3\)"):
        nm.srigl_update(ones, mask, ones, budget=2, drop_fraction=0.5)
    with pytest.raises(ValueError, match="gamma_sal=-1 must be >= 0"):
        nm.srigl_update(ones, mask, ones, budget=3, drop_fraction=0.5, gamma_sal=-1)
