"""nnx models on compressed params: the outputs and gradients of dense ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compressing import KINDS, compressed, products
from flax import nnx
from jax import export, lax

import nmjax as nm
from nmjax import formats

X = jax.random.normal(jax.random.key(1), (2, 4, 8))
TOKENS = jnp.arange(8).reshape(2, 4)
normal = nnx.initializers.lecun_normal()


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compile with few optimisations: that is where these tests spend their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def assert_close(found, expected, tolerance=1e-5):
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


class Own(nnx.Module):
    """A module of a user, who multiplies with nm.matmul or otherwise."""

    def __init__(self, rngs, use=nm.matmul):
        self.kernel = nnx.Param(normal(rngs.params(), (8, 8)))
        self.use = use

    def __call__(self, x):
        return self.use(x, self.kernel[...])


class Layers(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(16, 8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.einsum = nnx.Einsum("btd,dhk->bthk", (8, 2, 4), (2, 4), rngs=rngs)
        self.general = nnx.LinearGeneral((2, 4), 8, axis=(-2, -1), rngs=rngs)
        self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), Own(rngs)])
        self.conv = nnx.Conv(8, 8, (2,), rngs=rngs)
        self.transposed = nnx.ConvTranspose(8, 8, (2,), rngs=rngs)
        self.cell = nnx.GRUCell(8, 8, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, tokens):
        x = self.attention(self.embed(tokens))
        x = self.general(self.einsum(x))
        for layer in self.layers:
            x = layer(x)
        x = self.transposed(self.conv(self.dropout(x)))
        _, x = self.cell(x[:, 0], x[:, 1])
        return self.embed.attend(x)


class Two(nnx.Module):
    """Two layers, the second one of a user."""

    def __init__(self, rngs, use=nm.matmul):
        self.first = nnx.Linear(8, 8, use_bias=False, rngs=rngs)
        self.second = Own(rngs, use)

    def __call__(self, x):
        return self.second(jnp.tanh(self.first(x)))


def two():
    """Give a model, what it gives on its sparse params, and these compressed."""
    model = Two(nnx.Rngs(0))
    params, small = compressed(nnx.state(model), "nm")
    nnx.update(model, params)
    return model, model(X), small


@nnx.jit
def run(model, x):
    return model(x)


@functools.cache
def layers():
    model = nnx.jit(lambda: Layers(nnx.Rngs(0)))()
    model.eval()
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_layers_give_what_they_give_on_decompressed_params(kind):
    model = nnx.clone(layers())
    rules = {"embedding": nm.FanIn(density=0.5, neuron_axes=(0,))}
    params, small = compressed(nnx.state(model), kind, **rules)
    nnx.update(model, params)
    expected = run(model, TOKENS)
    before = nnx.graphdef(model)
    assert nm.nnx.load(model, small) is model
    assert len(jax.tree.leaves(nnx.state(model, nnx.Param))) > 20
    kinds = [type(v) for _, v in nnx.to_flat_state(nnx.state(model))]
    assert kinds.count(nm.nnx.CompressedParam) == 13
    assert_close(run(model, TOKENS), expected)
    again = nnx.merge(*nnx.split(model))
    assert_close(run(again, TOKENS), expected)
    nm.nnx.decompress(model)
    assert nnx.graphdef(model) == before
    assert (run(model, TOKENS) == expected).all()


@pytest.mark.parametrize(
    ("make", "neuron_axes", "expected"),
    [
        (lambda r: nnx.Linear(8, 8, rngs=r), (-1,), 1),
        (lambda r: nnx.LinearGeneral(8, (2, 4), rngs=r), (-2, -1), 1),
        (lambda r: nnx.Einsum("btd,df->fbt", (8, 8), rngs=r), (-1,), 1),
        (lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r), None, 4),
        (lambda r: nnx.Conv(8, 8, (1,), rngs=r), (-1,), 1),
        (lambda r: nnx.LoRALinear(8, 8, lora_rank=2, rngs=r), (-1,), 1),
        # Decompressed: there is no matrix to multiply with.
        (lambda r: nnx.Conv(8, 8, (2,), rngs=r), (-1,), 0),
        (lambda r: nnx.ConvTranspose(8, 8, (1,), rngs=r), (-1,), 0),
        (lambda r: nnx.Conv(8, 8, (1,), mask=jnp.ones((1, 8, 8)), rngs=r), (-1,), 0),
    ],
)
def test_layers_multiply_with_the_compressed_kernel(make, neuron_axes, expected):
    layer = make(nnx.Rngs(0))
    rules = {"kernel$": nm.FanIn(density=0.5, neuron_axes=neuron_axes)}
    plan = nm.plan(nnx.state(layer), rules)
    nnx.update(layer, jax.jit(lambda p: nm.project(p, plan))(nnx.state(layer)))
    dense = layer(X)
    nm.nnx.compress(layer, plan)
    assert products(layer, X) == expected
    assert_close(layer(X), dense)


def test_attend_multiplies_with_the_compressed_embedding():
    embed = nnx.Embed(16, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    plan = nm.plan(
        nnx.state(embed), {"embedding": nm.FanIn(density=0.5, neuron_axes=(0,))}
    )
    nnx.update(embed, nm.project(nnx.state(embed), plan))
    attended, found = embed.attend(X), embed(TOKENS)
    nm.nnx.compress(embed, plan)
    assert products(embed.attend, X) == 1
    assert (embed(TOKENS) == found).all()
    assert embed.attend(X).dtype == jnp.bfloat16
    close = embed.attend(X).astype(jnp.float32)
    assert_close(close, attended.astype(jnp.float32), 2e-2)


def test_abstract_models_are_filled():
    _, expected, small = two()
    model = nnx.eval_shape(lambda: Two(nnx.Rngs(0)))
    nm.nnx.load(model, nnx.to_pure_dict(nnx.as_pure(small)))
    assert_close(model(X), expected)
    assert isinstance(model.first.kernel.get_raw_value(), formats.NMArray)


def test_gradients_are_those_of_dense_params():
    model = nnx.Sequential(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), Own(nnx.Rngs(1)))
    params, small = compressed(nnx.state(model), "nm")
    nnx.update(model, params)

    def loss(model):
        return jnp.sum(model(X) ** 2)

    expected = nnx.grad(loss)(model)["layers"][0]["bias"][...]
    nm.nnx.load(model, small)
    dense = nnx.DiffState(0, nm.nnx.dense_params)
    found = nnx.jit(nnx.grad(loss, argnums=dense))(model)
    assert_close(jax.tree.leaves(found), [expected], 1e-4)
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nm.nnx.dense_params)
    optimizer.update(model, found)
    assert_close(model.layers[0].bias[...], -0.1 * expected, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_scanned_layers_take_stacks(kind):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return Two(nnx.Rngs(key))

    @nnx.jit
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, layer):
        return layer(x)

    @nnx.vmap(in_axes=(None, 0))
    def each(x, layer):
        return layer(x)

    stack = make(jax.random.split(jax.random.key(0), 3))
    params, small = compressed(nnx.state(stack), kind, stacked="kernel")
    nnx.update(stack, params)
    expected = forward(X, stack), each(X, stack)
    nm.nnx.load(stack, small)
    assert_close((forward(X, stack), each(X, stack)), expected)


def test_dtype_and_export_and_quantized_values():
    model = nnx.Linear(8, 8, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    plan = nm.plan(nnx.state(model), nm.NM(2, 4))
    nnx.update(model, nm.project(nnx.state(model), plan))
    expected = model(X)
    graphdef, state = nnx.split(nm.nnx.compress(nnx.clone(model), plan))
    leaves, treedef = jax.tree.flatten(state)

    @jax.jit
    def forward(leaves, x):
        return nnx.merge(graphdef, treedef.unflatten(leaves))(x)

    found = forward(leaves, X)
    assert found.dtype == jnp.bfloat16
    assert_close(found.astype(jnp.float32), expected.astype(jnp.float32), 1e-2)
    blob = export.export(forward)(leaves, X).serialize()
    assert (export.deserialize(blob).call(leaves, X) == found).all()
    nm.nnx.compress(model, plan, dtype=jnp.int8)
    assert_close(model(X).astype(jnp.float32), expected.astype(jnp.float32), 5e-2)


def test_weights_shared_by_two_layers_stay_shared():
    class Tied(nnx.Module):
        def __init__(self, rngs):
            self.a, self.b = (nnx.Linear(8, 8, rngs=rngs) for _ in range(2))
            self.b.kernel = self.a.kernel

        def __call__(self, x):
            return self.b(self.a(x))

    model = Tied(nnx.Rngs(0))
    params, small = compressed(nnx.state(model), "nm")
    nnx.update(model, params)
    expected = model(X)
    nm.nnx.load(model, small)
    assert model.a.kernel is model.b.kernel
    assert products(model, X) == 2
    assert_close(model(X), expected)


def test_loading_a_part_leaves_the_rest():
    model, expected, small = two()
    nm.nnx.load(model, {"first": {"kernel": small["first"]["kernel"].get_raw_value()}})
    assert isinstance(model.first.kernel, nm.nnx.CompressedParam)
    assert type(model.second.kernel) is nnx.Param
    assert_close(model(X), expected)
    read = model.first.kernel[...]
    nm.nnx.load(model, {"first": {"kernel": read}})
    assert type(model.first.kernel.get_raw_value()) is formats.NMArray
    dense = read.todense()
    nm.nnx.load(model, {"first": {"kernel": dense}})
    assert type(model.first.kernel) is nnx.Param
    assert model.first.dot_general is lax.dot_general
    assert_close(model(X), expected)


def test_compress_takes_masks_of_all_variables_and_of_params():
    for filters in ((nnx.Param,), ()):
        model = nnx.Sequential(
            nnx.Linear(8, 8, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(0))
        )
        plan = nm.plan(nnx.state(model, *filters), nm.NM(2, 4))
        masks = nm.compute_masks(nnx.state(model, *filters), plan)
        nnx.update(model, nm.apply_masks(nnx.state(model, *filters), masks))
        nm.nnx.compress(model, masks)
        assert isinstance(model.layers[0].kernel, nm.nnx.CompressedParam)


USES = {
    "matmul": lambda x, w: x @ w,
    "dot": jnp.dot,
    "numpy": lambda x, w: np.asarray(x) @ w,
    "index": lambda x, w: x @ w[0],
    "jit": jax.jit(lambda x, w: x @ w),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_dense_use_of_a_compressed_leaf_names_the_module(use):
    model, _, small = two()
    nm.nnx.load(model, small)
    model.second.use = use
    with pytest.raises(TypeError, match=r"'second' \(Own\) uses .*'second/kernel'"):
        model(X)


def test_layers_with_their_own_functions_are_an_error():
    def own(*args, **kwargs):
        return lax.dot_general(*args, **kwargs)

    model, _, small = two()
    model.first = nnx.Linear(8, 8, use_bias=False, dot_general=own, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"'first' \(Linear\) has a dot_general of its"):
        nm.nnx.load(model, small)
    assert type(model.second.kernel) is nnx.Param  # nothing was changed
    model.first = nnx.LinearGeneral(
        8, 8, use_bias=False, dot_general_cls=lambda: own, rngs=nnx.Rngs(0)
    )
    with pytest.raises(TypeError, match=r"'first' \(LinearGeneral\) has a dot_general"):
        nm.nnx.load(model, small)


def test_normalized_weights_are_an_error():
    model = nnx.WeightNorm(nnx.Linear(8, 8, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    _, small = compressed(nnx.state(model), "nm")
    message = r"itself \(WeightNorm\) normalizes.*'layer_instance/kernel' is compressed"
    with pytest.raises(TypeError, match=message):
        nm.nnx.load(model, small)


def test_leaves_that_do_not_fit_are_errors():
    model, _, small = two()
    kernel = small["first"]["kernel"].get_raw_value()
    with pytest.raises(ValueError, match=r"leaf 'third' that this model does not have"):
        nm.nnx.load(model, {"third": kernel})
    wide = formats.NMArray.from_dense(jnp.zeros((8, 16)), 2, 4)
    with pytest.raises(ValueError, match=r"'first/kernel' has shape \(8, 16\), but"):
        nm.nnx.load(model, {"first": {"kernel": wide}})
    model.first.kernel = nnx.BatchStat(jnp.zeros((8, 8)))
    with pytest.raises(TypeError, match="'first/kernel' is compressed, but BatchStat"):
        nm.nnx.load(model, {"first": {"kernel": kernel}})
