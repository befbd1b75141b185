"""scale_by_step against the published algorithm, its switch and its errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_oracles as oracles

import nmjax as nm
from nmjax.transforms import step as step_module

# optax types states and updates as opaque trees.
scale_by_step: Any = nm.scale_by_step

X = np.random.default_rng(0).normal(size=(16, 8))
Y = np.random.default_rng(1).normal(size=(16, 4))
W = np.random.default_rng(2).normal(size=(8, 4))


def gradient(used):
    return X.T @ (X @ used - Y) / len(X)


@pytest.fixture
def params():
    return {"kernel": jnp.asarray(W, jnp.float32)}


@pytest.fixture
def plan(params):
    return nm.plan(params, {"kernel": nm.NM(2, 4)})


def train(params, plan, stage, steps, rate) -> Any:
    tx = optax.chain(stage, optax.scale_by_learning_rate(rate))
    state = tx.init(params)
    x, y = jnp.asarray(X, jnp.float32), jnp.asarray(Y, jnp.float32)

    def loss(params, active):
        sparse = nm.sparsify(params, plan, active=active)
        return 0.5 * ((x @ sparse["kernel"] - y) ** 2).sum() / len(X)

    @jax.jit
    def step(params, state):
        grads = jax.grad(loss)(params, nm.sparse_phase(state))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    flags = []
    for _ in range(steps):
        params, state = step(params, state)
        flags.append(bool(nm.sparse_phase(state)))
    return params, state, flags


# The threshold lies between the mean changes of two windows of this run.
@pytest.mark.parametrize("threshold", [1e9, 0.1])
def test_automatic_switch_is_the_published_algorithm(params, plan, threshold):
    stage = scale_by_step(
        plan, b1=0.8, b2=0.75, eps=1e-3, threshold=threshold, window=3
    )
    trained, state, flags = train(params, plan, stage, 12, 0.05)
    expected, switch = oracles.step(
        W, gradient, 12, 0.05, 2, 4, 0.8, 0.75, 1e-3, threshold, 3
    )
    assert switch is not None and switch < 11
    assert flags == [t >= switch for t in range(1, 13)]
    assert int(state[0].nu_count) == switch
    np.testing.assert_allclose(trained["kernel"], expected, rtol=1e-4, atol=1e-6)


def test_switch_waits_for_a_full_window(params, plan):
    stage = scale_by_step(plan, b2=0.75, threshold=1e9)
    _, state, flags = train(params, plan, stage, 6, 0.01)
    assert state[0].changes.shape == (4,)
    assert flags == [False, False, False, True, True, True]


def test_default_window_is_the_memory_of_the_second_moment(params, plan):
    assert scale_by_step(plan).init(params).changes.shape == (1000,)
    assert scale_by_step(plan, b2=0.9).init(params).changes.shape == (10,)


@pytest.mark.parametrize(
    ("arguments", "first"),
    [
        ({"start": 2}, 2),
        ({"threshold": 1e9, "window": 1, "min_steps": 3}, 3),
        ({"threshold": 1e-30, "window": 1, "max_steps": 4}, 4),
    ],
)
def test_switch_may_be_given_or_bounded(params, plan, arguments, first):
    stage = scale_by_step(plan, **arguments)
    _, _, flags = train(params, plan, stage, 5, 0.01)
    assert flags == [t >= first for t in range(1, 6)]


@pytest.fixture
def standard():
    """Adam of optax multiplies Python floats by integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("standard")
def test_first_phase_is_adam(params, plan):
    stages: Any = scale_by_step(plan), optax.scale_by_adam()
    states = [stage.init(params) for stage in stages]
    for seed in range(3):
        grads = {"kernel": jax.random.normal(jax.random.key(seed), (8, 4))}
        first, states[0] = stages[0].update(grads, states[0], params)
        second, states[1] = stages[1].update(grads, states[1], params)
        np.testing.assert_allclose(first["kernel"], second["kernel"], rtol=1e-5)


def test_decay_acts_in_the_second_phase_and_not_in_the_second_moment(params, plan):
    zeros = jax.tree.map(jnp.zeros_like, params)
    tx = scale_by_step(plan, 0.5, b1=0.0, eps=1.0, start=1)
    state = tx.init(params)
    first, state = tx.update(zeros, state, params)
    second, state = tx.update(zeros, state, params)
    pruned = jnp.where(nm.compute_masks(params, plan)["kernel"], 0, params["kernel"])
    assert (first["kernel"] == 0).all()
    np.testing.assert_allclose(second["kernel"], 0.5 * pruned, rtol=1e-6)
    assert (state.nu["kernel"] == 0).all()


def test_second_moment_is_frozen_for_all_leaves(params):
    params = {**params, "bias": jnp.ones(4)}
    plan = nm.plan(params, {"kernel": nm.NM(2, 4)})
    tx = scale_by_step(plan, start=1)
    _, state = tx.update(params, tx.init(params), params)
    doubled = jax.tree.map(lambda p: 2 * p, params)
    _, later = tx.update(doubled, state, params)
    for name in params:
        assert (later.nu[name] == state.nu[name]).all()
        assert (later.mu[name] != state.mu[name]).all()


def test_mean_change_is_over_all_weights_of_all_leaves():
    new = {"a": jnp.ones((3, 2)), "b": jnp.full((2,), 5.0)}
    old = {"a": jnp.zeros((3, 2)), "b": jnp.ones((2,))}
    assert float(step_module.mean_change(new, old)) == (6 * 1 + 2 * 4) / 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": -1.0}, r"decay=-1.0 must be >= 0"),
        ({"b2": 1.0}, r"b2=1.0 must be in \[0, 1\)"),
        ({"start": 0}, r"start=0 must be an integer >= 1"),
        ({"start": 5, "window": 3}, r"window=3 belongs to the automatic switch"),
        ({"start": 5, "threshold": 1e-8}, r"threshold=1e-08 belongs to the automatic"),
        ({"window": 0}, r"window=0 must be an integer >= 1"),
        ({"min_steps": 5, "max_steps": 3}, r"min_steps=5 is above max_steps=3"),
        ({"eps": -1e-8}, r"eps=-1e-08 must be >= 0"),
        ({"threshold": 0.0}, r"threshold=0.0 must be > 0"),
    ],
)
def test_bad_arguments_are_errors(plan, arguments, message):
    with pytest.raises(ValueError, match=message):
        scale_by_step(plan, **arguments)


def test_decay_may_be_a_schedule_of_the_step(params, plan):
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = []
    for decay in (lambda step: 0.1 * step.astype(jnp.float32), 0.1):
        tx = scale_by_step(plan, decay, b1=0.0, eps=1.0, start=1)
        _, state = tx.update(zeros, tx.init(params), params)
        updates.append(tx.update(zeros, state, params)[0]["kernel"])
    assert (updates[0] == updates[1]).all() and (updates[0] != 0).any()


@pytest.mark.usefixtures("unchecked")
def test_something_else_than_a_plan_is_an_error(params):
    with pytest.raises(TypeError, match="plan must be made by nm.plan, got dict"):
        scale_by_step(params)


def test_traced_window_is_an_error(params, plan):
    def init(b2):
        return scale_by_step(plan, b2=b2).init(params)

    with pytest.raises(ValueError, match="window of nm.scale_by_step is a shape"):
        jax.jit(init)(0.9)
