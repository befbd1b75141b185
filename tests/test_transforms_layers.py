"""Methods that hold masks, on kernels of all kinds, in replicas, and in half."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

import nmjax as nm

RANGE = {"total_steps": 20, "delta_t": 1, "stop": 20}


class Net(nn.Module):
    """A conv, a grouped one, a depthwise one, attention and a dense layer."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(16, (3, 3), name="conv")(x)
        x = nn.Conv(8, (3, 3), feature_group_count=2, name="grouped")(x)
        x = nn.Conv(16, (3, 3), feature_group_count=8, name="depthwise")(x)
        x = x.reshape(x.shape[0], -1, 16)
        x = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")(x)
        return nn.Dense(4, name="head")(x.mean(1))


INPUTS = {  # of a neuron, and the axes that count them
    "conv": (3 * 3 * 4, (0, 1, 2)),
    "grouped": (3 * 3 * 8, (0, 1, 2)),
    "depthwise": (3 * 3 * 1, (0, 1, 2)),
    "attention/query": (16, (0,)),
    "attention/out": (8, (0, 1)),
    "head": (16, (0,)),
}


def find(tree, path):
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


@pytest.fixture(scope="module")
def trained():
    """Train `Net` for three changes of topology with SRigL; give plan and masks."""
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 4))
    params = Net().init(jax.random.key(1), x)["params"]
    plan = nm.plan(params, {"kernel": nm.FanIn()}, density=0.5)
    params = nm.sparse_init(jax.random.key(2), params, plan)
    tx = nm.srigl(
        optax.sgd(0.1), plan, gamma_sal=0.9, exempt="head", drop_fraction=0.5, **RANGE
    )

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda p: (Net().apply({"params": p}, x) ** 2).mean())(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    before = nm.masks(state)
    for _ in range(3):
        params, state = step(params, state)
    return plan, before, params, nm.masks(state)


@pytest.mark.parametrize("layer", INPUTS)
def test_every_kind_of_kernel_has_constant_fan_in(trained, layer):
    plan, before, params, masks = trained
    inputs, axes = INPUTS[layer]
    mask = np.asarray(find(masks, layer)["kernel"])
    counts = mask.sum(axes)
    neurons, budget = counts.size, plan.by_path[f"{layer}/kernel"].budget
    alive = (counts > 0).sum()
    assert mask.size == inputs * neurons
    assert set(counts.ravel().tolist()) - {0} == {min(inputs, budget // alive)}
    if layer == "head":
        assert alive == neurons
    assert (np.asarray(find(params, layer)["kernel"])[~mask] == 0).all()
    assert (mask != np.asarray(find(before, layer)["kernel"])).any()


def test_some_neurons_were_ablated(trained):
    _, _, _, masks = trained
    counts = [
        np.asarray(find(masks, layer)["kernel"]).sum(INPUTS[layer][1])
        for layer in INPUTS
    ]
    assert min(count.min() for count in counts) == 0


def test_grads_averaged_over_replicas_give_one_topology():
    """Masks of replicas stay equal if, and here only if, gradients are averaged."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    plan = nm.plan(params, nm.Unstructured(), density=0.25)
    params = nm.project(params, plan)
    tx = nm.rigl(optax.sgd(0.1), plan, drop_fraction=0.5, **RANGE)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    grads = jax.random.normal(jax.random.key(1), (4, 8, 8))

    def masks_of_replicas(average):
        def replica(grads):
            own = {"kernel": grads[0]}
            own = jax.lax.pmean(own, "data") if average else own
            _, state = tx.update(own, tx.init(params), params, topology=True)
            return nm.masks(state)["kernel"][None]

        mapped = jax.shard_map(
            replica, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
        )
        return np.asarray(jax.jit(mapped)(grads))

    together, apart = masks_of_replicas(True), masks_of_replicas(False)
    mean = {"kernel": grads.mean(0)}
    _, state = tx.update(mean, tx.init(params), params, topology=True)
    for mask in together:
        np.testing.assert_array_equal(mask, nm.masks(state)["kernel"])
    assert (apart != apart[0]).any()


def test_moments_of_another_shape_are_left_alone():
    """Adafactor keeps rows and columns of its second moment, not an array."""
    params = {"kernel": jax.random.normal(jax.random.key(0), (8, 8))}
    plan = nm.plan(params, nm.Unstructured(), density=0.25)
    params = nm.project(params, plan)
    inner = optax.scale_by_factored_rms(min_dim_size_to_factor=4)
    grads = {"kernel": jax.random.normal(jax.random.key(1), (8, 8))}
    tx = nm.static(inner, plan)
    _, state = tx.update(grads, tx.init(params), params)
    masked = nm.apply_masks(grads, nm.masks(state))
    _, expected = inner.update(masked, inner.init(params), params)
    np.testing.assert_array_equal(state.inner.v_row["kernel"], expected.v_row["kernel"])
    assert (state.inner.v_row["kernel"] != 0).all()
