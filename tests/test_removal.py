"""Removal: the smaller model says what the larger one said."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax as nm

ABSENT = optax.MaskedNode()


class MLP(nn.Module):
    """Two hidden layers, with an activation that is not 0 at 0."""

    widths: tuple[int, int] = (8, 6)

    @nn.compact
    def __call__(self, x):
        x = nn.softplus(nn.Dense(self.widths[0], name="first")(x))
        x = nn.relu(nn.Dense(self.widths[1], name="second")(x))
        return nn.Dense(3, name="head")(x)


MLP_CONNECTIONS = {
    "first/kernel": {"first/bias": 0, "second/kernel": 0},
    "second/kernel": {"second/bias": 0, "head/kernel": -2},
}


def noise(shapes, seed):
    """Give every leaf values that are not 0."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), shapes
    )


def random_variables(model, x, seed):
    return noise(jax.eval_shape(model.init, jax.random.key(0), x), seed)


@functools.cache
def srigl_layer():
    """Update a layer that has two neurons nothing speaks for."""
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(12, 8)).astype(np.float32)
    grads = rng.normal(size=(12, 8)).astype(np.float32)
    mask = nm.fan_in_mask(abs(weights), 4)
    weights[:, [1, 6]] *= 1e-3
    grads[:, [1, 6]] = 0.0
    weights = jnp.where(mask, weights, 0.0)
    options = {"budget": 32, "drop_fraction": 0.3, "gamma_sal": 0.9}
    new = jax.jit(functools.partial(nm.srigl_update, **options))(weights, mask, grads)
    return jnp.where(new, weights, 0.0), new


def make_mlp():
    """Make an MLP with ablated neurons: by SRigL, and one by hand."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 12)), jnp.float32)
    params = random_variables(MLP(), x, 2)["params"]
    masks = jax.tree.map(lambda _: ABSENT, params)
    params["first"]["kernel"], masks["first"]["kernel"] = srigl_layer()
    mask = np.random.default_rng(3).random((8, 6)) < 0.5
    mask[:, 0] = False
    params["second"]["kernel"] = jnp.where(mask, params["second"]["kernel"], 0.0)
    masks["second"]["kernel"] = jnp.asarray(mask)
    return params, masks, x


def assert_masks_fit(params, masks):
    for path, mask in jax.tree_util.tree_flatten_with_path(masks)[0]:
        leaf = functools.reduce(lambda tree, key: tree[key.key], path, params)
        assert leaf.shape == mask.shape
        assert not np.asarray(leaf)[~np.asarray(mask)].any()


def test_an_mlp_without_ablated_neurons_says_the_same():
    params, masks, x = make_mlp()
    assert np.flatnonzero(~masks["first"]["kernel"].any(0)).tolist() == [1, 6]
    constants = {
        "first/kernel": nn.softplus(params["first"]["bias"]),
        "second/kernel": nn.relu(params["second"]["bias"]),
    }
    small, small_masks = nm.remove_neurons(
        params, masks, MLP_CONNECTIONS, constants=constants
    )
    assert small["first"]["kernel"].shape == (12, 6)
    assert small["second"]["kernel"].shape == (6, 5)
    assert small["head"]["kernel"].shape == (5, 3)
    assert_masks_fit(small, small_masks)
    assert small_masks["head"] == masks["head"]
    before = jax.jit(MLP().apply)({"params": params}, x)
    smaller = jax.jit(MLP((6, 5)).apply)
    after = smaller({"params": small}, x)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    # The constants matter: without them the outputs differ.
    rough, _ = nm.remove_neurons(params, masks, MLP_CONNECTIONS)
    assert np.abs(smaller({"params": rough}, x) - before).max() > 1e-2


def test_numpy_rows_and_columns_are_what_is_left():
    params, masks, _ = make_mlp()
    small, small_masks = nm.remove_neurons(params, masks, MLP_CONNECTIONS)
    first = np.flatnonzero(np.asarray(masks["first"]["kernel"]).any(0))
    second = np.flatnonzero(np.asarray(masks["second"]["kernel"]).any(0))
    wanted = np.asarray(params["second"]["kernel"])[first][:, second]
    np.testing.assert_array_equal(small["second"]["kernel"], wanted)
    wanted = np.asarray(masks["second"]["kernel"])[first][:, second]
    np.testing.assert_array_equal(small_masks["second"]["kernel"], wanted)
    np.testing.assert_array_equal(
        small["first"]["bias"], np.asarray(params["first"]["bias"])[first]
    )
    np.testing.assert_array_equal(small["head"]["bias"], params["head"]["bias"])


def test_constants_of_kept_neurons_are_not_read():
    params, masks, _ = make_mlp()
    gone = ~masks["first"]["kernel"].any(0)
    constants = jnp.where(gone, nn.softplus(params["first"]["bias"]), jnp.nan)
    one = {"first/kernel": MLP_CONNECTIONS["first/kernel"]}
    found, _ = nm.remove_neurons(
        params, masks, one, constants={"first/kernel": constants}
    )
    rows = np.asarray(params["second"]["kernel"])[np.asarray(gone)]
    wanted = params["second"]["bias"] + np.asarray(constants)[np.asarray(gone)] @ rows
    np.testing.assert_allclose(found["second"]["bias"], wanted, rtol=1e-6)
    # A weight that the reader's mask drops says nothing, whatever its value.
    loud = {**params, "second": {**params["second"]}}
    mask = masks["second"]["kernel"]
    loud["second"]["kernel"] = jnp.where(mask, params["second"]["kernel"], 1e9)
    again, _ = nm.remove_neurons(
        loud, masks, one, constants={"first/kernel": constants}
    )
    np.testing.assert_array_equal(again["second"]["bias"], found["second"]["bias"])


def test_sharded_layers_lose_the_same_neurons():
    params, masks, _ = make_mlp()
    constants = {"first/kernel": np.arange(8.0)}
    wanted = nm.remove_neurons(params, masks, MLP_CONNECTIONS, constants=constants)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Explicit,))
    columns = jax.NamedSharding(mesh, jax.P(None, "x"))
    rows = jax.NamedSharding(mesh, jax.P("x", None))
    with jax.set_mesh(mesh):
        for layer, sharding in {"first": columns, "second": rows}.items():
            for tree in (params, masks):
                tree[layer]["kernel"] = jax.device_put(tree[layer]["kernel"], sharding)
        found = nm.remove_neurons(params, masks, MLP_CONNECTIONS, constants=constants)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), found, wanted
    )


class CNN(nn.Module):
    """Conv, BatchNorm, conv, and then a mean or all pixels."""

    widths: tuple[int, int] = (6, 5)
    flatten: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.widths[0], (3, 3), name="stem", use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True, name="norm")(x))
        x = nn.softplus(nn.Conv(self.widths[1], (3, 3), name="conv")(x))
        x = x.reshape(len(x), -1) if self.flatten else x.mean((1, 2))
        return nn.Dense(4, name="head")(x)


@pytest.mark.parametrize("flatten", [False, True], ids=["mean", "flatten"])
def test_a_cnn_with_batch_statistics_says_the_same(flatten):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
    variables = random_variables(CNN(flatten=flatten), x, 1)
    params, stats = variables["params"], variables["batch_stats"]
    stats["norm"]["var"] = jnp.square(stats["norm"]["var"]) + 0.1
    masks = jax.tree.map(lambda _: ABSENT, params)
    for layer, dead in {"stem": [0, 4], "conv": [1, 2]}.items():
        kernel = np.asarray(params[layer]["kernel"])
        mask = np.random.default_rng(2).random(kernel.shape) < 0.5
        mask[..., dead] = False
        masks[layer]["kernel"] = jnp.asarray(mask)
        params[layer]["kernel"] = jnp.asarray(np.where(mask, kernel, 0))
    # What a removed channel says after norm and relu: 0 for one, less for the other.
    centre = params["norm"]["scale"] * stats["norm"]["mean"]
    centre = centre * jax.lax.rsqrt(stats["norm"]["var"] + 1e-5)
    params["norm"]["bias"] = params["norm"]["bias"].at[0].set(centre[0] - 1.0)
    params["norm"]["bias"] = params["norm"]["bias"].at[4].set(centre[4])
    connections = {
        "params/stem/kernel": {
            "params/norm/scale": 0,
            "params/norm/bias": 0,
            "batch_stats/norm/mean": 0,
            "batch_stats/norm/var": 0,
            "params/conv/kernel": 2,
        },
        "params/conv/kernel": {"params/conv/bias": 0, "params/head/kernel": 0},
    }
    constants = {
        "params/stem/kernel": nn.relu(params["norm"]["bias"] - centre),
        "params/conv/kernel": nn.softplus(params["conv"]["bias"]),
    }
    small, small_masks = nm.remove_neurons(
        variables,
        {"params": masks, "batch_stats": ABSENT},
        connections,
        constants=constants,
    )
    assert small["params"]["conv"]["kernel"].shape == (3, 3, 4, 3)
    assert small["params"]["head"]["kernel"].shape == (48 if flatten else 3, 4)
    assert small["batch_stats"]["norm"]["var"].shape == (4,)
    assert_masks_fit(small["params"], small_masks["params"])
    assert small_masks["batch_stats"] == ABSENT
    before = jax.jit(CNN(flatten=flatten).apply)(variables, x)
    after = jax.jit(CNN((4, 3), flatten).apply)(small, x)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)


def test_a_neuron_that_loses_its_last_input_goes_at_the_next_call():
    params = {f"{i}": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)} for i in "abc"}
    masks = jax.tree.map(lambda _: ABSENT, params)
    masks["a"]["kernel"] = jnp.array([[True, False], [True, False]])
    masks["b"]["kernel"] = jnp.array([[True, False], [False, True]])
    connections = {
        "a/kernel": {"a/bias": 0, "b/kernel": 0},
        "b/kernel": {"b/bias": 0, "c/kernel": 0},
    }
    constants = {path: jnp.ones(2) for path in connections}
    once = nm.remove_neurons(params, masks, connections, constants=constants)
    assert once[0]["b"]["kernel"].shape == (1, 2)
    assert once[0]["b"]["bias"].tolist() == [1.0, 2.0]
    assert nm.active_neurons(once[1])["b"]["kernel"].tolist() == [True, False]
    constants = {"b/kernel": once[0]["b"]["bias"]}
    twice, masks = nm.remove_neurons(*once, connections, constants=constants)
    assert twice["b"]["kernel"].shape == masks["b"]["kernel"].shape == (1, 1)
    assert twice["c"]["bias"].tolist() == [3.0, 3.0]


def test_params_keep_their_dtype_and_may_be_traced():
    params, masks, _ = make_mlp()
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    constants = {"first/kernel": np.ones(8)}

    @jax.jit
    def smaller(params):
        return nm.remove_neurons(params, masks, MLP_CONNECTIONS, constants=constants)

    for tree in (low, params):
        found, _ = smaller(tree)
        wanted, _ = nm.remove_neurons(tree, masks, MLP_CONNECTIONS, constants=constants)
        dtype = tree["head"]["bias"].dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {dtype}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(
                a.astype(jnp.float32), b.astype(jnp.float32), rtol=1e-2
            ),
            found,
            wanted,
        )


def test_attention_and_nnx_layers_are_read_by_their_axes():
    # (in, heads, head_dim) kernels read along axis 0.
    params = {
        "up": {"kernel": jnp.ones((2, 3))},
        "query": {"kernel": jnp.full((3, 2, 2), 2.0), "bias": jnp.zeros((2, 2))},
    }
    masks = jax.tree.map(lambda _: ABSENT, params)
    masks["up"]["kernel"] = jnp.array([[True, False, True]] * 2)
    small, _ = nm.remove_neurons(
        params,
        masks,
        {"up/kernel": {"query/kernel": 0}},
        constants={"up/kernel": jnp.array([9.0, 3.0, 9.0])},
    )
    assert small["query"]["kernel"].shape == (2, 2, 2)
    assert small["query"]["bias"].tolist() == [[6.0, 6.0]] * 2
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    plan = nm.plan(state, {"kernel": nm.Channel(0.34)})
    masks = nm.compute_masks(state, plan)
    small, _ = nm.remove_neurons(state, masks, {"kernel": {"bias": 0}})
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(small)) == {
        "kernel": (2, 1),
        "bias": (1,),
    }


def removal(params=None, masks=None, connections=None, constants=None):
    """Remove from an MLP with one thing different."""
    old, old_masks, _ = make_mlp()
    return nm.remove_neurons(
        {**old, **(params or {})},
        {**old_masks, **(masks or {})},
        connections or MLP_CONNECTIONS,
        constants=constants,
    )


FIRST = {"first/bias": 0, "second/kernel": 0}


@pytest.mark.parametrize(
    "connections, message",
    [
        ({"frist/kernel": {}}, r"'frist/kernel', which is not a leaf of params; there"),
        ({"first/kernel": FIRST | {"x": 0}}, r"name 'x', which is not a leaf of par"),
        ({"head/kernel": {"head/bias": 0}}, r"'head/kernel' has no mask, so none of"),
        ({"first/kernel": {"second/kernel": 0}}, r"do not name it: add 'first/bias'"),
        ({"first/kernel": FIRST | {"head/kernel": 0}}, r"axis 0 of leaf 'head/kernel' "
         r"of shape \(6, 3\) has length 6, which is not a multiple of the 8 neurons"),
        ({"first/kernel": FIRST | {"second/kernel": 2}}, r"\['second/kernel'\] = 2 is "
         r"no axis of its shape \(8, 6\)"),
        (MLP_CONNECTIONS | {"second/kernel": {"second/bias": 0, "second/kernel": 1}},
         r"axis 1 of leaf 'second/kernel' counts the neurons of 'second/kernel' and"),
    ],
)  # fmt: skip
def test_connections_that_do_not_fit_are_refused(connections, message):
    with pytest.raises(ValueError, match=message):
        removal(connections=connections)


def test_masks_that_do_not_fit_are_refused():
    none = {"first": {"kernel": jnp.zeros((12, 8), bool), "bias": ABSENT}}
    with pytest.raises(ValueError, match=r"all 8 neurons of leaf 'first/kernel' are a"):
        removal(masks=none)
    short = {"first": {"kernel": jnp.ones((12, 7), bool), "bias": ABSENT}}
    with pytest.raises(
        ValueError, match=r"mask of leaf 'first/kernel' has shape \(12, 7"
    ):
        removal(masks=short)
    floats = {"first": {"kernel": jnp.ones((12, 8)), "bias": ABSENT}}
    with pytest.raises(
        TypeError, match=r"mask of leaf 'first/kernel' has dtype float32"
    ):
        removal(masks=floats)
    reader = {"head": {"kernel": jnp.ones((6, 2), bool), "bias": ABSENT}}
    with pytest.raises(
        ValueError, match=r"mask of leaf 'head/kernel' has shape \(6, 2"
    ):
        removal(masks=reader)
    params, masks, _ = make_mlp()
    with pytest.raises(TypeError, match=r"mask of leaf 'first/kernel' is traced.*jit"):
        jax.jit(lambda m: nm.remove_neurons(params, m, MLP_CONNECTIONS))(masks)
    del masks["head"]
    with pytest.raises(ValueError, match=r"'head/bias' of the params is missing"):
        nm.remove_neurons(params, masks, MLP_CONNECTIONS)


def test_layers_that_would_become_ragged_are_refused():
    params = {
        "scan": {"kernel": jnp.ones((2, 4, 3)), "bias": jnp.ones((2, 3))},
        "query": {"kernel": jnp.ones((4, 2, 3))},
        "norm": {"scale": jnp.ones(3)},
    }
    masks = jax.tree.map(lambda p: jnp.ones(p.shape, bool), params)
    for path, message in {
        "scan/kernel": r"bias of shape \(2, 3\), not \(3,\): it stacks layers, whic",
        "query/kernel": r"'query/kernel' of shape \(4, 2, 3\) has its neurons on 2 a",
        "norm/scale": r"'norm/scale' of shape \(3,\) has its neurons on 1 axes",
    }.items():
        with pytest.raises(ValueError, match=message):
            nm.remove_neurons(params, masks, {path: {}})


def test_constants_that_cannot_be_folded_are_refused():
    ones = {"first/kernel": jnp.ones(8)}
    with pytest.raises(
        ValueError, match=r"constants name 'head/kernel', which is no k"
    ):
        removal(constants={"head/kernel": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"has shape \(7,\), must be \(8,\)"):
        removal(constants={"first/kernel": jnp.ones(7)})
    with pytest.raises(ValueError, match=r"are not finite at removed neurons"):
        removal(constants={"first/kernel": jnp.full(8, jnp.inf)})
    with pytest.raises(ValueError, match=r"connections name no kernel that reads them"):
        removal(connections={"first/kernel": {"first/bias": 0}}, constants=ones)
    params, masks, _ = make_mlp()
    del params["second"]["bias"], masks["second"]["bias"]
    connections = {"first/kernel": FIRST}
    with pytest.raises(ValueError, match=r"reads them has no 'second/bias' to fold"):
        nm.remove_neurons(params, masks, connections, constants=ones)
    # Constants of 0 need no bias.
    nm.remove_neurons(
        params, masks, connections, constants={"first/kernel": np.zeros(8)}
    )
    params["second"]["bias"], masks["second"]["bias"] = jnp.ones(5), ABSENT
    with pytest.raises(
        ValueError, match=r"'second/bias' has shape \(5,\), but the neu"
    ):
        nm.remove_neurons(params, masks, connections, constants=ones)


def test_a_constant_that_a_padded_conv_reads_is_refused():
    params = {
        "stem": {"kernel": jnp.ones((1, 1, 3, 4))},
        "conv": {"kernel": jnp.ones((1, 3, 4, 2)), "bias": jnp.zeros(2)},
        "point": {"kernel": jnp.ones((1, 1, 4, 2)), "bias": jnp.zeros(2)},
    }
    masks = jax.tree.map(lambda _: ABSENT, params)
    masks["stem"]["kernel"] = jnp.ones((1, 1, 3, 4), bool).at[..., 1].set(False)
    constants = {"stem/kernel": jnp.full(4, 0.5)}
    readers = {"conv/kernel": 2, "point/kernel": 2}
    with pytest.raises(
        ValueError, match=r"'conv/kernel' of shape \(1, 3, 4, 2\).*bord"
    ):
        nm.remove_neurons(params, masks, {"stem/kernel": readers}, constants=constants)
    small, _ = nm.remove_neurons(
        params, masks, {"stem/kernel": {"point/kernel": 2}}, constants=constants
    )
    assert small["point"]["bias"].tolist() == [0.5, 0.5]
