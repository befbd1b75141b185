"""srste against the published rules, its phases, refresh and errors."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import training_oracles as oracles

import nmjax as nm
from nmjax.transforms import SRSTEState

# optax types states and updates as opaque trees.
srste: Any = nm.srste

RATE, DECAY, STEPS = 0.05, 0.3, 6
X = np.random.default_rng(0).normal(size=(16, 8))
Y = np.random.default_rng(1).normal(size=(16, 4))
W = np.random.default_rng(2).normal(size=(8, 4))


def gradient(used):
    return X.T @ (X @ used - Y) / len(X)


def loss(params, forward):
    error = jnp.asarray(X, jnp.float32) @ forward(params)["kernel"]
    return 0.5 * ((error - jnp.asarray(Y, jnp.float32)) ** 2).sum() / len(X)


@pytest.fixture
def params():
    return {"kernel": jnp.asarray(W, jnp.float32)}


@pytest.fixture
def plan(params):
    return nm.plan(params, {"kernel": nm.NM(2, 4)})


@pytest.fixture
def standard():
    """Adam of optax multiplies Python floats by integer counts."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def train(params, tx, forward, steps=STEPS) -> Any:
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: loss(p, lambda q: forward(q, state)))(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for _ in range(steps):
        params, state = step(params, state)
    return params, state


def test_coupled_is_the_published_rule(params, plan):
    tx = optax.chain(srste(plan, DECAY), optax.sgd(RATE))
    trained, state = train(params, tx, lambda p, _: nm.sparsify(p, plan))
    expected = oracles.srste_sgd(W, gradient, STEPS, RATE, DECAY, 2, 4)
    np.testing.assert_allclose(trained["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert state[0] == optax.EmptyState()


def test_zero_decay_is_the_straight_through_estimator(params, plan):
    tx = optax.chain(srste(plan, 0.0), optax.sgd(RATE))
    trained, _ = train(params, tx, lambda p, _: nm.sparsify(p, plan))
    plain, _ = train(params, optax.sgd(RATE), lambda p, _: nm.sparsify(p, plan))
    assert (trained["kernel"] == plain["kernel"]).all()


@pytest.mark.usefixtures("standard")
def test_decoupled_leaves_the_moments_alone(params, plan):
    tx = optax.chain(
        optax.adam(RATE, 0.8, 0.95, eps=1e-3),
        srste(plan, DECAY, mode="decoupled", learning_rate=RATE),
    )
    trained, _ = train(params, tx, lambda p, _: nm.sparsify(p, plan))
    expected = oracles.srste_decoupled(
        W, gradient, STEPS, RATE, DECAY, 2, 4, 0.8, 0.95, 1e-3
    )
    np.testing.assert_allclose(trained["kernel"], expected, rtol=1e-5, atol=1e-6)


def test_hybrid_is_the_rule_of_ast(params, plan):
    tx = optax.chain(
        srste(plan, DECAY, mode="hybrid", b1=0.8, b2=0.95, eps=1e-3),
        optax.scale_by_learning_rate(RATE),
    )
    trained, _ = train(params, tx, lambda p, _: nm.sparsify(p, plan))
    expected = oracles.ast(W, gradient, STEPS, RATE, DECAY, 2, 4, 0.8, 0.95, 1e-3)
    np.testing.assert_allclose(trained["kernel"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.usefixtures("standard")
def test_hybrid_is_made_of_optax_parts_where_weights_are_sparse(params, plan):
    parts: Any = optax.chain(
        optax.ema(0.9),
        srste(plan, DECAY),
        optax.scale_by_rms(0.999, 1e-8, eps_in_sqrt=False, bias_correction=True),
    )
    hybrid = srste(plan, DECAY, mode="hybrid")
    states = parts.init(params), hybrid.init(params)
    for seed in range(3):
        grads = {"kernel": jax.random.normal(jax.random.key(seed), (8, 4))}
        first, state0 = parts.update(grads, states[0], params)
        second, state1 = hybrid.update(grads, states[1], params)
        states = state0, state1
        np.testing.assert_allclose(first["kernel"], second["kernel"], rtol=1e-5)


@pytest.mark.usefixtures("standard")
def test_hybrid_is_adam_where_weights_are_dense(params):
    params = {**params, "bias": jnp.zeros(4)}
    plan = nm.plan(params, {"kernel": nm.NM(2, 4)})
    hybrid: Any = srste(plan, DECAY, mode="hybrid")
    adam: Any = optax.scale_by_adam()
    states = hybrid.init(params), adam.init(params)
    for seed in range(3):
        grads = jax.tree.map(
            lambda p, s=seed: jax.random.normal(jax.random.key(s), p.shape), params
        )
        first, state0 = hybrid.update(grads, states[0], params)
        second, state1 = adam.update(grads, states[1], params)
        states = state0, state1
        np.testing.assert_allclose(first["bias"], second["bias"], rtol=1e-5)


def test_decay_may_be_a_schedule(params, plan):
    tx = srste(plan, lambda step: 0.5 * step.astype(jnp.float32))
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    pruned = jnp.where(nm.compute_masks(params, plan)["kernel"], 0, params["kernel"])
    for step in range(3):
        updates, state = tx.update(zeros, state, params)
        np.testing.assert_allclose(updates["kernel"], 0.5 * step * pruned, rtol=1e-6)


def test_learning_rate_may_be_a_schedule(params, plan):
    rate = optax.linear_schedule(1.0, 0.0, 2)
    tx = srste(plan, 0.5, mode="decoupled", learning_rate=rate)
    state, zeros = tx.init(params), jax.tree.map(jnp.zeros_like, params)
    pruned = jnp.where(nm.compute_masks(params, plan)["kernel"], 0, params["kernel"])
    for factor in (1.0, 0.5, 0.0):
        updates, state = tx.update(zeros, state, params)
        np.testing.assert_allclose(updates["kernel"], -0.5 * factor * pruned)


def test_masks_of_stage_and_forward_agree_at_ties():
    params = {"kernel": jnp.ones((8, 4))}
    plan = nm.plan(params, {"kernel": nm.NM(1, 4)})
    tx = srste(plan, 1.0)
    pull, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    assert ((pull["kernel"] == 0) == (nm.sparsify(params, plan)["kernel"] != 0)).all()


def test_infinite_kept_weight_gives_no_nan(params, plan):
    params = {"kernel": params["kernel"].at[0].set(jnp.inf)}
    for mode in ("coupled", "hybrid"):
        tx = srste(plan, mode=mode)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        assert jnp.isfinite(updates["kernel"]).all()


def test_term_is_computed_in_float32_and_emitted_in_the_dtype_of_the_update(plan):
    weights = {"kernel": jnp.full((8, 4), 1.0, jnp.bfloat16)}
    grads = {"kernel": jnp.full((8, 4), 256.0, jnp.bfloat16)}
    tx = srste(plan, 1.6)
    updates, _ = tx.update(grads, tx.init(weights), weights)
    assert updates["kernel"].dtype == jnp.bfloat16
    # 257.6 rounds to 258; 1.6 in bfloat16 is 1.6016, and their sum in bfloat16 too.
    assert sorted(set(updates["kernel"].ravel().tolist())) == [256.0, 258.0]


@pytest.mark.parametrize("mode", ["coupled", "decoupled", "hybrid"])
def test_phases_switch_decay_and_forward(params, plan, mode):
    rate = 1.0 if mode == "decoupled" else None
    tx = srste(plan, 0.5, mode=mode, learning_rate=rate, start=1, stop=3)
    never = srste(plan, 0.0, mode=mode, learning_rate=rate)
    state, plain = tx.init(params), never.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    seen, active = [], []
    for _ in range(5):
        active.append(bool(nm.sparse_phase(state)))
        updates, state = tx.update(grads, state, params)
        without, plain = never.update(grads, plain, params)
        seen.append(bool((updates["kernel"] != without["kernel"]).any()))
    assert active == [False, True, True, False, False]
    # The second moment of hybrid mode remembers the sparse phase.
    assert (seen[:3] if mode == "hybrid" else seen) == active[
        : 3 if mode == "hybrid" else 5
    ]


@pytest.mark.parametrize(
    ("start", "stop", "expected"),
    [(None, 2, [1, 1, 0, 0]), (2, None, [0, 0, 1, 1]), (0, 4, [1, 1, 1, 1])],
)
def test_phase_bounds_are_half_open(params, plan, start, stop, expected):
    tx = srste(plan, start=start, stop=stop)
    state, flags = tx.init(params), []
    for _ in range(4):
        flags.append(int(nm.sparse_phase(state)))
        _, state = tx.update(params, state, params)
    assert flags == expected


def test_dense_phases_train_as_the_dense_model(params, plan):
    tx = optax.chain(srste(plan, DECAY, start=4), optax.sgd(RATE))
    trained, _ = train(
        params,
        tx,
        lambda p, state: nm.sparsify(p, plan, active=nm.sparse_phase(state)),
        steps=4,
    )
    dense, _ = train(params, optax.sgd(RATE), lambda p, _: p, steps=4)
    assert (trained["kernel"] == dense["kernel"]).all()


def test_refresh_keeps_masks_between_updates(params, plan):
    tx = srste(plan, refresh=2)
    state = tx.init(params)
    first = nm.compute_masks(params, plan)
    others = jax.tree.map(lambda p: p[::-1], params)
    second = nm.compute_masks(others, plan)
    assert (first["kernel"] != second["kernel"]).any()
    for expected in (first, second, second):
        _, state = tx.update(params, state, others)
        assert (nm.masks(state)["kernel"] == expected["kernel"]).all()


def test_decay_between_refreshes_uses_the_kept_masks(params, plan):
    tx = srste(plan, 1.0, refresh=10)
    state = tx.init(params)
    kept = nm.masks(state)["kernel"]
    others = jax.tree.map(lambda p: p[::-1], params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, others)
    expected = jnp.where(kept, 0, others["kernel"])
    assert (updates["kernel"] == expected).all()


def test_refreshed_transposable_masks_train(params):
    plan = nm.plan(params, {"kernel": nm.TransposableNM(2, 4)})
    tx = optax.chain(srste(plan, DECAY, refresh=2), optax.sgd(RATE))
    trained, state = train(params, tx, lambda p, s: nm.sparsify(p, nm.masks(s)))
    mask = np.asarray(nm.masks(state)["kernel"]).reshape(2, 4, 4)
    assert (mask.sum(1) == 2).all() and (mask.sum(2) == 2).all()
    assert (trained["kernel"] != params["kernel"]).any()


def test_state_holds_only_what_is_asked_for(params, plan):
    count_only = srste(plan, lambda step: 0.1).init(params)
    assert isinstance(count_only, SRSTEState)
    assert len(jax.tree.leaves(count_only)) == 1
    assert len(jax.tree.leaves(srste(plan, start=1).init(params))) == 2
    assert len(jax.tree.leaves(srste(plan, refresh=1).init(params))) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decay": -1e-4}, r"decay=-0.0001 must be >= 0"),
        ({"decay": float("nan")}, r"decay=nan must be >= 0"),
        ({"mode": "adam"}, r"mode='adam' must be one of coupled, decoupled, hybrid"),
        ({"mode": "decoupled"}, r"mode='decoupled' needs learning_rate"),
        ({"learning_rate": 0.1}, r"learning_rate=0.1 belongs to mode='decoupled'"),
        ({"b2": 0.99}, r"b2=0.99 belongs to mode='hybrid'"),
        ({"mode": "hybrid", "b1": 1.0}, r"b1=1.0 must be in \[0, 1\)"),
        ({"mode": "hybrid", "eps": -1.0}, r"eps=-1.0 must be >= 0"),
        ({"start": 3, "stop": 3}, r"start=3 and stop=3 leave no sparse phase"),
        ({"stop": 0}, r"start=None and stop=0 leave no sparse phase"),
        ({"start": -1}, r"start=-1 must be an integer >= 0"),
        ({"refresh": 0}, r"refresh=0 must be an integer >= 1"),
        ({"refresh": 2.5}, r"refresh=2.5 must be an integer >= 1"),
        ({"decay": jnp.ones(2)}, r"expected a scalar, got an array of shape \(2,\)"),
    ],
)
def test_bad_arguments_are_errors(plan, arguments, message):
    with pytest.raises(ValueError, match=message):
        srste(plan, **arguments)


@pytest.mark.usefixtures("unchecked")
def test_something_else_than_a_plan_or_a_number_is_an_error(params, plan):
    with pytest.raises(TypeError, match="plan must be made by nm.plan, got dict"):
        srste(params)
    with pytest.raises(TypeError, match="expected a number, a schedule or a scalar"):
        srste(plan, "0.1")


def test_masks_and_phase_of_a_state_without_them_are_errors(params, plan):
    state = optax.chain(srste(plan), optax.adam(0.1)).init(params)
    with pytest.raises(ValueError, match="no transform keeps masks in this state"):
        nm.masks(state)
    with pytest.raises(ValueError, match="no transform in this state has phases"):
        nm.sparse_phase(state)


def test_two_phases_or_masks_in_one_state_are_errors(params, plan):
    stage = srste(plan, start=1, refresh=1)
    state = optax.chain(stage, stage).init(params)
    with pytest.raises(ValueError, match="2 transforms in this state have phases"):
        nm.sparse_phase(state)
    with pytest.raises(ValueError, match="two transforms .* mask for the same leaf"):
        nm.masks(state)


def test_forward_and_stage_share_one_mask_in_a_jitted_step(params, plan):
    def comparisons(tx, weights):
        def step(params, state):
            grads = jax.grad(lambda p: loss(p, lambda q: nm.sparsify(q, plan)))(params)
            updates, state = tx.update(grads, state, weights(params))
            return optax.apply_updates(params, updates), state

        compiled: Any = jax.jit(step).lower(params, tx.init(params)).compile()
        return compiled.as_text().count(" compare(")

    plain = comparisons(optax.sgd(RATE), lambda p: p)
    tx = optax.chain(srste(plan, DECAY), optax.sgd(RATE))
    shared = comparisons(tx, lambda p: p)
    apart = comparisons(tx, lambda p: jax.tree.map(lambda w: w + 1.0, p))
    # A few decode the shared mask again; twelve would compute another one.
    assert shared - plain <= 2 and apart - plain >= 10
