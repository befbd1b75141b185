"""Group lasso, and the order of block pruning."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax as nm
from nmjax import masking, saliency


def random_params(seed, shape=(6, 8)):
    return {
        "kernel": jax.random.normal(jax.random.key(seed), shape),
        "bias": jnp.ones(8),
    }


def plan_of(params, pattern):
    return nm.plan(params, pattern, density=0.5)


def block_norms(weights, inputs, outputs):
    """Give every weight the norm of its block, block by block."""
    norms = np.zeros_like(weights)
    for i in range(0, weights.shape[0], inputs):
        for j in range(0, weights.shape[1], outputs):
            block = np.s_[i : i + inputs, j : j + outputs]
            norms[block] = np.sqrt((weights[block] ** 2).sum())
    return norms


PATTERNS = {
    "4x1": (nm.Block(4, 1), 1, 4),
    "2x3": (nm.Block(2, 3), 3, 2),
    "channel": (nm.Channel(), 6, 1),
}


@pytest.mark.parametrize("name", PATTERNS)
def test_the_pull_equals_a_loop_over_groups(name):
    pattern, inputs, outputs = PATTERNS[name]
    params, grads = random_params(0), random_params(1)
    params["kernel"] = params["kernel"].at[0, :4].set(0.0)
    tx = nm.group_lasso(plan_of(params, pattern), 0.3)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    weights = np.asarray(params["kernel"])
    norms = block_norms(weights, inputs, outputs)
    pull = np.divide(weights, norms, out=np.zeros_like(weights), where=norms > 0)
    np.testing.assert_allclose(
        updates["kernel"], grads["kernel"] + 0.3 * pull, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_array_equal(updates["bias"], grads["bias"])


def test_it_is_the_gradient_of_the_sum_of_norms():
    params = random_params(0)
    tx = nm.group_lasso(plan_of(params, nm.Block(2, 3)), 0.7)

    def penalty(weights):
        blocks = weights.reshape(2, 3, 4, 2)
        return 0.7 * jnp.sum(jnp.sqrt(jnp.sum(blocks**2, axis=(1, 3))))

    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params)
    expected = jax.grad(penalty)(params["kernel"])
    np.testing.assert_allclose(updates["kernel"], expected, rtol=1e-5)


def test_stacked_layers_have_their_own_groups():
    params = {"kernel": jax.random.normal(jax.random.key(0), (2, 6, 8))}
    grads = jax.tree.map(jnp.zeros_like, params)
    for pattern in (nm.Block(2, 3), nm.Channel()):
        plan = nm.plan(params, {"kernel": pattern}, density=0.5, stacked="kernel")
        both, _ = nm.group_lasso(plan, 1.0).update(grads, optax.EmptyState(), params)
        for i in range(2):
            one = {"kernel": params["kernel"][i]}
            tx = nm.group_lasso(plan_of(one, pattern), 1.0)
            alone, _ = tx.update({"kernel": jnp.zeros((6, 8))}, tx.init(one), one)
            np.testing.assert_allclose(both["kernel"][i], alone["kernel"], rtol=1e-6)


def test_half_precision_updates_keep_their_dtype():
    params = {"kernel": jnp.full((4, 8), 1e-3, jnp.float16)}
    grads = {"kernel": jnp.zeros((4, 8), jnp.float16)}
    tx = nm.group_lasso(plan_of(params, nm.Block(4, 1)), 1.0)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["kernel"].dtype == jnp.float16
    assert (updates["kernel"] == 0.5).all()  # in float16, squares of 1e-3 lose digits


def test_a_schedule_gives_the_strength():
    params, grads = random_params(0), random_params(1)
    plan = plan_of(params, nm.Block(4, 1))
    tx = nm.group_lasso(plan, lambda step: 0.5 * jnp.asarray(step, jnp.float32))
    state = tx.init(params)
    first, state = tx.update(grads, state, params)
    second, state = tx.update(grads, state, params)
    np.testing.assert_array_equal(first["kernel"], grads["kernel"])
    plain, _ = nm.group_lasso(plan, 0.5).update(grads, optax.EmptyState(), params)
    np.testing.assert_allclose(second["kernel"], plain["kernel"], rtol=1e-6)
    assert int(state.count) == 2


def test_sharded_blocks_keep_their_sharding():
    params = random_params(0, (16, 8))
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x", "y"))
    expected = masking.block_sums(params["kernel"], (4, 4))
    with jax.set_mesh(mesh):
        found = jax.jit(lambda w: masking.block_sums(w, (4, 4)))(
            jax.device_put(params["kernel"], spec)
        )
    assert found.sharding == spec
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_block_pruning_goes_in_the_published_order():
    """Prune gradients, add the penalty, step, prune weights by block."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (6, 8))}
    plan = plan_of(params, nm.Block(4, 1))
    inner = optax.chain(nm.group_lasso(plan, 0.1), optax.sgd(0.2, momentum=0.9))
    tx = nm.gradual(inner, plan, start=0, stop=4, every=2, shape="linear")
    state, step = tx.init(params), jax.jit(tx.update)

    weights = np.asarray(params["kernel"])
    mask, trace = np.ones((6, 8), bool), np.zeros((6, 8), np.float32)
    for i, blocks in enumerate([12, 9, 9, 6, 6], start=1):  # of 12; at 2 and 4
        grads = jax.random.normal(jax.random.key(i), (6, 8))
        updates, state = step({"kernel": grads}, state, params)
        params = optax.apply_updates(params, updates)

        norms = block_norms(weights, 1, 4)
        pull = np.divide(weights, norms, out=np.zeros_like(weights), where=norms > 0)
        trace = 0.9 * trace + np.where(mask, grads, 0) + 0.1 * pull
        weights = np.where(mask, weights - 0.2 * trace, 0)
        sums = np.abs(weights).reshape(6, 2, 4).sum(-1).ravel()
        best = np.argsort(-sums, kind="stable")[:blocks]
        alive = np.isin(np.arange(12), best).reshape(6, 2).repeat(4, axis=1)
        mask = mask & alive if i in (2, 4) else mask
        weights, trace = np.where(mask, weights, 0), np.where(mask, trace, 0)
        np.testing.assert_array_equal(nm.masks(state)["kernel"], mask)
        np.testing.assert_allclose(params["kernel"], weights, rtol=1e-4, atol=1e-5)


def test_snip_momentum_remembers_all_steps():
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    plan = nm.plan(params, nm.Unstructured(), density=0.25)
    tx = nm.one_shot(optax.sgd(0.0), plan, at=3, saliency=saliency.snip, momentum=0.5)
    state, scores = tx.init(params), np.zeros((8, 8), np.float32)
    for i in range(3):
        grads = jax.random.normal(jax.random.key(1 + i), (8, 8))
        _, state = jax.jit(tx.update)({"kernel": grads}, state, params)
        scores = 0.5 * scores + np.abs(np.asarray(params["kernel"]) * grads)
    expected = nm.topk_mask(jnp.asarray(scores), 16)
    np.testing.assert_array_equal(nm.masks(state)["kernel"], expected)
    np.testing.assert_allclose(state.growth["kernel"], scores, rtol=1e-5)
    alone = nm.one_shot(optax.sgd(0.0), plan, at=1, saliency=saliency.snip)
    _, other = alone.update({"kernel": grads}, alone.init(params), params)
    assert (nm.masks(other)["kernel"] != expected).any()


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda plan: nm.group_lasso(plan, -0.1), "alpha=-0.1 must be >= 0"),
        (
            lambda plan: nm.gradual(
                optax.sgd(0.1), plan, start=0, stop=4, momentum=1.0
            ),
            r"momentum=1.0 must be in \[0, 1\)",
        ),
    ],
)
def test_bad_numbers_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make(plan_of(random_params(0), nm.Block(4, 1)))


def test_patterns_without_groups_are_refused():
    plan = nm.plan(random_params(0, (8, 8)), nm.NM(2, 4))
    with pytest.raises(ValueError, match="leaf 'kernel': nm.group_lasso needs groups"):
        nm.group_lasso(plan, 0.1)
