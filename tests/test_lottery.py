"""Lottery tickets: prune by magnitude, rewind the rest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax as nm


def random_params(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "a": {
            "kernel": jax.random.normal(keys[0], (4, 5)),
            "bias": jax.random.normal(keys[1], (5,)),
        },
        "b": {"kernel": 5 * jax.random.normal(keys[2], (5, 8))},
    }


def everything(params):
    return nm.plan(params, nm.Unstructured(density=1.0))


def alive_after(weights, alive, prune):
    """Sort the alive weights and let the smallest die."""
    order = sorted(np.flatnonzero(alive), key=lambda i: (-abs(weights[i]), i))
    kept = len(order) - int(len(order) * prune + 1e-3)
    mask = np.zeros(len(weights), bool)
    mask[order[:kept]] = True
    return mask


def flat(tree):
    return np.concatenate([np.ravel(tree[k]["kernel"]) for k in ("a", "b")])


def test_rounds_of_each_leaf_equal_a_loop():
    early = random_params(0)
    alive = everything(early)
    masks = {k: np.ones(early[k]["kernel"].size, bool) for k in ("a", "b")}
    rewind = jax.jit(nm.rewind, static_argnames="prune")
    for seed in (1, 2, 3):
        trained = random_params(seed)
        params, alive = rewind(trained, early, alive, prune=0.2)
        for k in ("a", "b"):
            weights = np.ravel(trained[k]["kernel"])
            masks[k] = alive_after(weights, masks[k], 0.2)
            np.testing.assert_array_equal(np.ravel(alive[k]["kernel"]), masks[k])
            expected = np.where(masks[k], np.ravel(early[k]["kernel"]), 0)
            np.testing.assert_array_equal(np.ravel(params[k]["kernel"]), expected)
    assert [int(m.sum()) for m in masks.values()] == [11, 21]
    np.testing.assert_array_equal(params["a"]["bias"], early["a"]["bias"])
    assert isinstance(alive["a"]["bias"], optax.MaskedNode)


def test_rounds_of_all_leaves_together_equal_a_loop():
    early, trained = random_params(0), random_params(1)
    _, first = nm.rewind(trained, early, everything(early), prune=0.3, scope="global")
    expected = alive_after(flat(trained), np.ones(60, bool), 0.3)
    np.testing.assert_array_equal(flat(first), expected)
    _, second = nm.rewind(random_params(2), early, first, prune=0.3, scope="global")
    expected = alive_after(flat(random_params(2)), expected, 0.3)
    np.testing.assert_array_equal(flat(second), expected)


def test_a_weight_that_is_alive_and_zero_is_no_dead_one():
    weights = {"kernel": jnp.zeros((2, 4)).at[0].set(1.0)}
    plan = nm.plan(weights, nm.Unstructured(density=1.0))
    _, masks = nm.rewind(weights, weights, plan, prune=0.25)
    assert masks["kernel"].astype(int).tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]


def test_training_goes_on_with_the_masks_of_a_round():
    early = random_params(0)
    plan = everything(early)
    params, masks = nm.rewind(random_params(1), early, plan, prune=0.5)
    tx = nm.static(optax.sgd(0.1, momentum=0.9), plan, masks=masks)
    state = tx.init(params)
    for seed in (2, 3):
        updates, state = tx.update(random_params(seed), state, params)
        params = optax.apply_updates(params, updates)
    held = nm.masks(state)
    for k in ("a", "b"):
        mask = np.asarray(masks[k]["kernel"])
        np.testing.assert_array_equal(held[k]["kernel"], mask)
        np.testing.assert_array_equal(np.asarray(params[k]["kernel"]) != 0, mask)


def test_bad_arguments_are_refused():
    params = random_params(0)
    plan = everything(params)
    with pytest.raises(ValueError, match=r"prune=1.5 .* must be in \[0, 1\]"):
        nm.rewind(params, params, plan, prune=1.5)
    with pytest.raises(ValueError, match="leaf 'a/bias' of the params is missing"):
        nm.rewind(params, params, {"b": {"kernel": jnp.ones((5, 8), bool)}}, prune=0.2)


def test_a_bad_scope_is_refused(unchecked):
    params = random_params(0)
    with pytest.raises(ValueError, match="scope='layer' must be 'leaf' or 'global'"):
        nm.rewind(params, params, everything(params), prune=0.2, scope="layer")


def test_static_masks_must_fit_the_params():
    params = random_params(0)
    plan = everything(params)
    none = jax.tree.map(lambda _: optax.MaskedNode(), params)
    with pytest.raises(ValueError, match="leaf 'a/kernel' .* given no mask for it"):
        nm.static(optax.sgd(0.1), plan, masks=none).init(params)


def test_static_masks_must_be_bool(unchecked):
    params = random_params(0)
    plan, none = everything(params), jax.tree.map(lambda _: optax.MaskedNode(), params)
    floats = {**none, "b": {"kernel": jnp.ones((5, 8))}}
    with pytest.raises(TypeError, match="mask of leaf 'b/kernel' has dtype float32"):
        nm.static(optax.sgd(0.1), plan, masks=floats).init(params)
