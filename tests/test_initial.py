"""Sparse params to start from."""

import jax
import jax.numpy as jnp
import optax
import pytest

import nmjax as nm


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "a": {
            "kernel": jax.random.normal(keys[0], (256, 64)) / 16,
            "bias": jnp.ones(64),
        },
        "query": {"kernel": jax.random.normal(keys[1], (64, 4, 8)) / 8},
    }


def test_positions_are_random_and_counts_exact(params):
    plan = nm.plan(params, nm.Unstructured(), density=nm.erk(0.1))
    first, second = (
        nm.sparse_init(jax.random.key(i), params, plan)["a"]["kernel"] for i in (1, 2)
    )
    count = plan.by_path["a/kernel"].count
    assert int((first != 0).sum()) == int((second != 0).sum()) == count
    assert bool(((first != 0) != (second != 0)).any())
    # Not by magnitude: what is kept is no larger than what is dropped.
    kept = jnp.abs(params["a"]["kernel"])[first != 0].mean()
    assert float(kept) == pytest.approx(
        float(jnp.abs(params["a"]["kernel"]).mean()), rel=0.1
    )
    assert (nm.sparse_init(jax.random.key(1), params, plan)["a"]["bias"] == 1).all()


def test_transforms_find_the_positions_again(params):
    plan = nm.plan(params, nm.FanIn(), density=0.1)
    sparse = nm.sparse_init(jax.random.key(1), params, plan)
    masks = nm.masks(nm.static(optax.sgd(0.1), plan).init(sparse))
    for layer in ("a", "query"):
        assert (masks[layer]["kernel"] == (sparse[layer]["kernel"] != 0)).all()


def test_rescaling_keeps_the_variance_of_outputs(params):
    plan = nm.plan(params, nm.Unstructured(), density=0.1)
    x = jax.random.normal(jax.random.key(3), (512, 256))
    dense = (x @ params["a"]["kernel"]).std()
    plain = nm.sparse_init(jax.random.key(1), params, plan)["a"]["kernel"]
    scaled = nm.sparse_init(jax.random.key(1), params, plan, rescale=True)
    assert float((x @ plain).std() / dense) == pytest.approx(0.1**0.5, rel=0.1)
    assert float((x @ scaled["a"]["kernel"]).std() / dense) == pytest.approx(1, rel=0.1)


def test_rescaling_keeps_the_dtype(params):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    plan = nm.plan(half, nm.FanIn(), density=0.25)
    scaled = nm.sparse_init(jax.random.key(1), half, plan, rescale=True)
    plain = nm.sparse_init(jax.random.key(1), half, plan)
    assert scaled["a"]["kernel"].dtype == jnp.bfloat16
    assert (scaled["a"]["kernel"] == 2 * plain["a"]["kernel"]).all()
