"""Neurons against NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax as nm
from nmjax import metrics, neurons

# Path -> shape of one layer, and its fan-in axes.
KERNELS = {
    "dense/kernel": ((5, 7), (0,)),
    "conv/kernel": ((3, 3, 2, 6), (0, 1, 2)),
    "attention/query/kernel": ((4, 2, 3), (0,)),
    "attention/out/kernel": ((2, 3, 4), (0, 1)),
}


def nested(flat):
    """Make a nested dict of path names."""
    tree = {}
    for path, leaf in flat.items():
        *above, name = path.split("/")
        node = tree
        for key in above:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def random_masks(seed, layers=()):
    rng = np.random.default_rng(seed)
    flat = {path: rng.random(layers + s) < 0.3 for path, (s, _) in KERNELS.items()}
    flat["conv/kernel"][..., 1] = False
    return flat


def counted(mask, axes):
    """Count the inputs of every neuron, entry by entry."""
    others = [axis for axis in range(mask.ndim) if axis not in axes]
    counts = np.zeros([mask.shape[axis] for axis in others], int)
    for index in np.argwhere(mask):
        counts[tuple(index[others])] += 1
    return counts


def leaves_of(tree):
    return {
        "/".join(key.key for key in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_neurons_of_every_layout_match_numpy(wrap):
    flat = random_masks(0)
    masks = nested(flat | {"conv/bias": optax.MaskedNode()})
    counts = leaves_of(wrap(neurons.fan_in)(masks))
    active = leaves_of(wrap(nm.active_neurons)(masks))
    share = wrap(neurons.active_share)(masks)
    wanted = {path: counted(flat[path], KERNELS[path][1]) for path in flat}
    assert set(counts) == set(active) == set(flat)
    for path, count in wanted.items():
        np.testing.assert_array_equal(counts[path], count)
        np.testing.assert_array_equal(active[path], count > 0)
        assert (counts[path].dtype, active[path].dtype) == (jnp.int32, jnp.bool_)
    everyone = np.concatenate([count.ravel() for count in wanted.values()])
    assert 0 in everyone
    # One unit in the last place: XLA multiplies by the reciprocal.
    np.testing.assert_allclose(share, (everyone > 0).mean(), rtol=2e-7)


def test_a_plan_keeps_the_layers_of_stacked_leaves_apart():
    flat = random_masks(1, layers=(2,))
    params = nested({path: jnp.ones(mask.shape) for path, mask in flat.items()})
    params["dense"]["bias"] = jnp.ones((2, 7))
    plan = nm.plan(params, nm.Unstructured(), density=0.3, stacked=".*")
    masks = nested(flat | {"dense/bias": optax.MaskedNode()})
    counts = leaves_of(jax.jit(neurons.fan_in)(masks, plan))
    active = leaves_of(nm.active_neurons(masks, plan))
    for path, (_, axes) in KERNELS.items():
        wanted = np.stack([counted(mask, axes) for mask in flat[path]])
        np.testing.assert_array_equal(counts[path], wanted)
        np.testing.assert_array_equal(active[path], wanted > 0)
    # Without it a Dense layer of two is a conv of width two.
    together = leaves_of(neurons.fan_in(masks))["dense/kernel"]
    np.testing.assert_array_equal(together, counts["dense/kernel"].sum(0))


@pytest.mark.parametrize("axes, inputs", [((0,), (1, 2)), ((-2, -1), (0,))])
def test_a_pattern_s_own_neuron_axes_count(axes, inputs):
    mask = np.random.default_rng(2).random((4, 2, 3)) < 0.4
    params = {"kernel": jnp.ones(mask.shape)}
    plan = nm.plan(params, {"kernel": nm.FanIn(0.5, neuron_axes=axes)})
    counts = neurons.fan_in({"kernel": jnp.asarray(mask)}, plan)["kernel"]
    np.testing.assert_array_equal(counts, counted(mask, inputs))


def test_a_fresh_weight_of_zero_makes_its_neuron_active():
    weights, mask = jnp.zeros((3, 2)), jnp.array([[True, False], [False] * 2] * 2)[:3]
    assert not weights.any()
    assert nm.active_neurons(mask).tolist() == [True, False]


def test_a_mask_of_rank_one_has_a_neuron_per_entry():
    mask = jnp.array([True, False])
    assert nm.active_neurons({"scale": mask})["scale"].tolist() == [True, False]


def test_neurons_map_over_seeds():
    mask = jnp.asarray(np.random.default_rng(3).random((3, 4, 6)) < 0.2)
    plan = nm.plan({"kernel": jnp.ones((4, 6))}, {"kernel": nm.FanIn(0.5)})
    active = jax.vmap(lambda m: nm.active_neurons({"kernel": m}, plan)["kernel"])(mask)
    np.testing.assert_array_equal(active, np.asarray(mask).any(1))


@pytest.mark.parametrize("spec", [("x", "y"), (None, ("x", "y"))])
def test_neurons_of_a_sharded_layer_match_numpy(spec):
    mesh = jax.make_mesh(
        (4, 2), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    mask = np.random.default_rng(4).random((16, 32)) < 0.1
    count = mask.sum(0)

    @jax.jit
    def measure(masks):
        counts = neurons.fan_in(masks)
        active = nm.active_neurons(masks)
        return counts, active, metrics.density(active), neurons.fan_in_summary(counts)

    with jax.set_mesh(mesh):
        sharded = jax.device_put(mask, jax.NamedSharding(mesh, jax.P(*spec)))
        counts, active, share, summary = measure({"kernel": sharded})
    np.testing.assert_array_equal(counts["kernel"], count)
    np.testing.assert_array_equal(active["kernel"], count > 0)
    np.testing.assert_allclose(share, (count > 0).mean(), rtol=2e-7)
    low, mean, high = summary
    assert (int(low), int(high)) == (count[count > 0].min(), count.max())
    np.testing.assert_allclose(mean, count[count > 0].mean(), rtol=2e-7)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_summary_is_of_active_neurons(wrap):
    counts = {"a": jnp.array([[0, 3], [9, 0]]), "b": jnp.array([2, 2, 0])}
    low, mean, high = wrap(neurons.fan_in_summary)(counts)
    assert (int(low), float(mean), int(high)) == (2, 4.0, 9)
    assert (low.dtype, mean.dtype, high.dtype) == (jnp.int32, jnp.float32, jnp.int32)
    by_leaf = metrics.per_leaf(lambda c: neurons.fan_in_summary(c).min, counts)
    assert {path: int(value) for path, value in by_leaf.items()} == {"a": 3, "b": 2}


def test_summary_without_active_neurons_is_zero():
    low, mean, high = neurons.fan_in_summary({"a": jnp.zeros(3, int)})
    assert (int(low), float(mean), int(high)) == (0, 0.0, 0)


def test_mean_fan_in_is_exact_where_float32_sums_are_not():
    # In float32, 2**24 + 1 + 1 is 2**24.
    counts = jnp.array([2**24, 1, 1, 2])
    assert float(neurons.fan_in_summary(counts).mean) == (2**24 + 4) / 4


def test_histogram_counts_neurons_by_fan_in():
    masks = {"kernel": jnp.array([[1, 0, 1, 1], [1, 0, 0, 1]]) == 1}
    masks["bias"] = optax.MaskedNode()
    found = neurons.fan_in_histogram(neurons.fan_in(masks))
    assert list(found.items()) == [(0, 1), (1, 1), (2, 2)]
    assert all(type(key) is int for key in found)


def test_what_neurons_cannot_be_told_of_is_refused():
    params = {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}
    plan = nm.plan(params, nm.NM(2, 4))
    masks = nm.compute_masks(params, plan)
    with pytest.raises(TypeError, match=r"mask of leaf 'w' has dtype float32"):
        nm.active_neurons({"w": jnp.ones((2, 2))})
    with pytest.raises(TypeError, match=r"mask of leaf 'kernel' has dtype float32"):
        neurons.fan_in({"kernel": jnp.ones((4, 8)), "bias": masks["bias"]}, plan)
    with pytest.raises(ValueError, match=r"mask of shape \(8,\) for a leaf.*is dense"):
        nm.active_neurons(masks | {"bias": jnp.ones(8, bool)}, plan)
    with pytest.raises(ValueError, match=r"'kernel' has shape \(4, 4\), the plan was"):
        nm.active_neurons(masks | {"kernel": jnp.ones((4, 4), bool)}, plan)
    with pytest.raises(TypeError, match=r"fan_in_histogram needs concrete counts"):
        jax.jit(neurons.fan_in_histogram)(jnp.ones(3, int))
    with pytest.raises(ValueError, match=r"no entries: there is no neuron"):
        neurons.fan_in_summary(jnp.ones(0, int))
    with pytest.raises(ValueError, match=r"counts has no array"):
        neurons.fan_in_summary({"bias": optax.MaskedNode()})
