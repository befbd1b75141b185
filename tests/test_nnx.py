"""The nnx route: models that read sparse weights and store dense ones."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax as nm
from nmjax import nnx as nm_nnx


class Model(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.head(self.norm(x))


@pytest.fixture
def model():
    return Model(nnx.Rngs(0))


@pytest.fixture
def plan(model):
    return nm.plan(nnx.state(model, nnx.Param), nm.NM(2, 4))


X = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
Y = np.array([0, 1, 2, 0])


def loss(model):
    logits = model(X)
    return optax.softmax_cross_entropy_with_integer_labels(logits, Y).mean()


def raw(model):
    """What the model stores, as NumPy arrays by path."""
    return {
        "/".join(map(str, path)): np.asarray(node.get_raw_value())
        for path, node in nnx.iter_graph(model)
        if isinstance(node, nnx.Variable)
    }


def test_reads_are_sparse_and_the_store_is_dense(model, plan):
    before = raw(model)
    nm_nnx.attach(model, plan)
    for layer in model.layers:
        groups = np.asarray(layer.kernel[...] == 0).reshape(2, 4, 8)
        assert (groups.sum(1) == 2).all()
    assert (model.head.kernel[...] != 0).all()
    after = raw(model)
    assert all(np.array_equal(after[path], before[path]) for path in before)
    for saved in (nnx.state(model), nnx.as_pure(nnx.state(model))):
        leaves = jax.tree.leaves(saved["layers"][0])
        np.testing.assert_array_equal(leaves[1], before["layers/0/kernel"])
    # As the module's text warns: this one reads.
    read = nnx.to_pure_dict(nnx.state(model))["layers"][0]["kernel"]
    np.testing.assert_array_equal(read, model.layers[0].kernel[...])


def test_gradient_equals_the_state_route_to_the_bit(model, plan):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def state_route(params):
        def of_params(params):
            return loss(nnx.merge(graphdef, nm.sparsify(params, plan), rest, copy=True))

        return jax.value_and_grad(of_params)(params)

    value, grads = state_route(params)
    nm_nnx.attach(model, plan)
    hooked_value, hooked = nnx.jit(nnx.value_and_grad(loss))(model)
    assert hooked_value == value
    pairs = zip(jax.tree.leaves(hooked), jax.tree.leaves(grads), strict=True)
    assert all((a == b).all() for a, b in pairs)
    pruned = model.layers[0].kernel[...] == 0
    assert (hooked["layers"][0]["kernel"][...][pruned] != 0).any()


def test_a_training_step_equals_the_state_route_to_the_bit(model, plan):
    tx = optax.chain(nm.srste(plan, 0.1), optax.sgd(0.1))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def state_route(params, rest):
        def of_params(params):
            merged = nnx.merge(graphdef, nm.sparsify(params, plan), rest, copy=True)
            return loss(merged), nnx.state(merged, nnx.BatchStat)

        grads, stats = jax.grad(of_params, has_aux=True)(params)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates), stats

    for _ in range(2):
        params, rest = state_route(params, rest)

    nm_nnx.attach(model, plan)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(loss)(model))

    for _ in range(2):
        step(model, optimizer)
    got = nnx.as_pure(nnx.state(model, nnx.Param))
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(params), strict=True)
    assert all((a == b).all() for a, b in pairs)


def test_detach_restores_the_model(model, plan):
    before = model(X)
    hooked = nm_nnx.attach(model, plan)
    assert hooked is model
    assert (model(X) != before).any()
    nm_nnx.detach(model)
    assert (model(X) == before).all()
    assert "on_get_value" not in model.layers[0].kernel.get_metadata()


def test_hooks_of_others_stay(model, plan):
    kernel = model.layers[0].kernel
    kernel.set_metadata(on_get_value=lambda variable, value: 2 * value)
    doubled = kernel[...]
    nm_nnx.attach(model, plan)
    sparse = kernel[...]
    assert ((sparse == doubled) | (sparse == 0)).all() and (sparse == 0).any()
    nm_nnx.detach(model)
    assert (kernel[...] == doubled).all()


def test_a_second_plan_replaces_the_first(model, plan):
    nm_nnx.attach(model, plan)
    other = nm.plan(nnx.state(model, nnx.Param), {"layers/0/kernel": nm.NM(1, 4)})
    nm_nnx.attach(model, other)
    assert int((model.layers[0].kernel[...] != 0).sum()) == 16
    assert (model.layers[1].kernel[...] != 0).all()


def test_split_merge_and_clone_keep_the_hook(model, plan):
    nm_nnx.attach(model, plan)
    expected = model(X)
    clone = nnx.clone(model)
    merged = nnx.merge(*nnx.split(model))
    for copy in (clone, merged):
        assert (copy.layers[0].kernel[...] == model.layers[0].kernel[...]).all()
    assert expected.shape == (4, 3)


def test_one_trace_serves_equal_plans(model, plan):
    traces = []

    @nnx.jit
    def forward(model):
        traces.append(1)
        return model(X)

    nm_nnx.attach(model, plan)
    forward(model)
    nm_nnx.attach(model, nm.plan(nnx.state(model, nnx.Param), nm.NM(2, 4)))
    forward(model)
    assert len(traces) == 1


def test_abstract_models_take_the_hook(plan):
    abstract = nnx.eval_shape(lambda: Model(nnx.Rngs(0)))
    nm_nnx.attach(abstract, plan)
    assert abstract.layers[0].kernel.get_value().shape == (8, 8)


def test_scanned_layers_read_one_layer_each():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return jax.nn.relu(layer(x))

    stack = make(jax.random.split(jax.random.key(0), 3))
    plan = nm.plan(nnx.state(stack), nm.NM(2, 4), stacked="kernel")
    sparse = nnx.merge(nnx.graphdef(stack), nm.sparsify(nnx.state(stack), plan))
    expected = forward(jnp.asarray(X), sparse)
    assert (forward(jnp.asarray(X), nm_nnx.attach(stack, plan)) == expected).all()


def test_reading_a_part_is_an_error(model, plan):
    nm_nnx.attach(model, plan)
    with pytest.raises(ValueError, match=r"'layers/0/kernel' .* read in part"):
        model.layers[0].kernel[0]


def test_plan_of_another_model_is_an_error(model):
    other = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
    plan = nm.plan(nnx.state(other), nm.NM(2, 4))
    with pytest.raises(ValueError, match="'kernel' that this model does not have"):
        nm_nnx.attach(model, plan)
    narrow = nnx.Linear(4, 8, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"'kernel' has shape \(4, 8\), the plan was"):
        nm_nnx.attach(narrow, plan)
    assert "on_get_value" not in narrow.kernel.get_metadata()


def test_global_budget_is_an_error(model):
    params = nnx.state(model, nnx.Param)
    plan = nm.plan(params, nm.Unstructured(), density=nm.global_(0.5))
    with pytest.raises(ValueError, match="shares a global budget"):
        nm_nnx.attach(model, plan)


def test_importing_the_package_does_not_import_flax():
    code = (
        "import sys, nmjax as nm; assert 'flax' not in sys.modules; "
        "nm.nnx.attach; assert 'flax' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
