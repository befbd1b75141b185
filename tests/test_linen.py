"""Linen models on compressed params: the outputs and gradients of dense ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressing import KINDS, compressed, count, products, split
from flax import linen as nn
from flax.errors import ScopeParamShapeError
from jax import export
from jax.sharding import AxisType

import nmjax as nm
from nmjax import formats
from nmjax.operands import guarded

X = jax.random.normal(jax.random.key(1), (2, 4, 8))
normal = nn.initializers.lecun_normal()


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


def params_of(model, x=X):
    return jax.jit(model.init)(jax.random.key(0), x)["params"]


@functools.cache
def small_kernel():
    """Give compressed params of a module with one kernel."""
    return compressed(params_of(Own()), "nm")[1]


class Own(nn.Module):
    """A module of a user, who multiplies with nm.matmul."""

    features: int = 8

    @nn.compact
    def __call__(self, x):
        kernel = self.param("kernel", normal, (x.shape[-1], self.features))
        return nm.matmul(x, kernel)


class Plain(nn.Module):
    """A module of a user, who knows nothing of compressed arrays."""

    use: object

    @nn.compact
    def __call__(self, x):
        return self.use(x, self.param("kernel", normal, (x.shape[-1], 8)))


class Layers(nn.Module):
    """Layers of Flax, one after the other."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8)(x)
        x = nn.MultiHeadDotProductAttention(num_heads=2)(x)
        x = nn.Einsum((8, 2, 4), "...td,dhk->...htk")(x)
        x = nn.DenseGeneral(8, axis=(1, -1))(x)
        x = Own()(x)
        x = nn.Conv(8, (1,), strides=2)(x)
        x = nn.Conv(8, (2,))(x)
        x = nn.ConvTranspose(8, (2,))(x)
        return nn.ConvLocal(8, (1,))(x)


class Embedding(nn.Module):
    def setup(self):
        self.embed = nn.Embed(16, 8)

    def __call__(self, tokens):
        return self.embed.attend(self.embed(tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_layers_give_what_they_give_on_decompressed_params(kind):
    model = Layers()
    params, small = compressed(params_of(model), kind)
    assert count(small) == 12
    run = jax.jit(functools.partial(nm.linen.apply, model))
    assert_close(run({"params": small}, X), jax.jit(model.apply)({"params": params}, X))


@pytest.mark.parametrize(
    ("layer", "neuron_axes", "expected"),
    [
        (nn.Dense(8), (-1,), 1),
        (nn.DenseGeneral((2, 4)), (-2, -1), 1),
        (nn.DenseGeneral(8, axis=(-2, -1)), (-1,), 1),
        (nn.MultiHeadDotProductAttention(num_heads=2), None, 4),
        (nn.Einsum((8, 8), "btd,df->fbt"), (-1,), 1),
        (nn.Conv(8, (1,)), (-1,), 1),
        (nn.GRUCell(8), (-1,), 6),
        # Decompressed: there is no matrix to multiply with.
        (nn.DenseGeneral((2, 4)), (-1,), 0),
        (nn.Conv(8, (2,)), (-1,), 0),
        (nn.Conv(8, (1,), mask=jnp.ones((1, 8, 8))), (-1,), 0),
        (nn.Einsum((8, 8), "btd,...d->btd"), (-1,), 0),
        (nn.OptimizedLSTMCell(8), (-1,), 0),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_multiply_with_the_compressed_kernel(layer, neuron_axes, expected):
    args = (X,)
    if isinstance(layer, nn.RNNCellBase):
        carry = layer.initialize_carry(jax.random.key(0), X[0].shape)
        args = (carry, X[0])
    params = jax.jit(layer.init)(jax.random.key(0), *args)["params"]
    plan = nm.plan(params, {"kernel$": nm.FanIn(density=0.5, neuron_axes=neuron_axes)})
    params = jax.jit(lambda params: nm.project(params, plan))(params)
    small = {"params": nm.compress(params, plan)}
    run = functools.partial(nm.linen.apply, layer)
    assert products(run, small, *args) == expected
    assert_close(run(small, *args), layer.apply({"params": params}, *args))


@pytest.mark.parametrize(("axes", "expected"), [((0,), 1), ((-1,), 0)])
def test_embeddings_look_up_and_attend(axes, expected):
    model, tokens = Embedding(), jnp.arange(4)
    rules = {"embedding": nm.FanIn(density=0.5, neuron_axes=axes)}
    params = params_of(model, tokens)
    plan = nm.plan(params, rules)
    params = nm.project(params, plan)
    small = {"params": nm.compress(params, plan)}
    run = functools.partial(nm.linen.apply, model)
    assert_close(run(small, tokens), model.apply({"params": params}, tokens))
    assert products(run, small, tokens) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_dense_leaves_and_stored_values(kind):
    model = nn.Sequential([nn.Dense(8), jnp.tanh, Own(), nn.DenseGeneral((2, 4))])
    params, small = compressed(params_of(model), kind)
    floats, join = split(small)

    def loss(floats):
        return jnp.sum(nm.linen.apply(model, {"params": join(floats)}, X) ** 2)

    found = nm.decompress(join(jax.jit(jax.grad(loss))(floats)))
    expected = jax.jit(
        jax.grad(lambda params: jnp.sum(model.apply({"params": params}, X) ** 2))
    )(params)
    stored = nm.decompress(join([jnp.ones_like(leaf) for leaf in floats]))
    assert_close(found, jax.tree.map(lambda e, on: e * on, expected, stored), 1e-4)


@pytest.mark.parametrize(
    ("kind", "remat"), [("nm", False), ("fan_in", True), ("block", False)]
)
def test_scanned_modules_take_stacks(kind, remat):
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + Own()(nn.relu(nn.Dense(8)(x))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = nn.remat(Block) if remat else Block
            layers = nn.scan(
                block,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = layers(name="layers")(x, None)
            return nn.Dense(8)(x)

    model = Model()
    params, small = compressed(params_of(model), kind, stacked="layers")
    assert count(small) == 3
    floats, join = split(small)

    @jax.jit
    def run(floats):
        return nm.linen.apply(model, {"params": join(floats)}, X)

    assert_close(run(floats), jax.jit(model.apply)({"params": params}, X))
    if remat:
        assert_close(
            jax.grad(lambda floats: run(floats).sum())(floats)[0],
            jax.grad(lambda p: model.apply({"params": p}, X).sum())(params)["Dense_0"][
                "bias"
            ],
        )


def test_lifted_layers_take_compressed_kernels():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            many = nn.vmap(
                nn.Dense,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=None,
                axis_size=3,
            )
            x = many(8, name="many")(x).sum(0)
            return nn.jit(Own)()(nn.remat(nn.Dense)(8)(x))

    model = Model()
    params, small = compressed(params_of(model), "nm", stacked="many/kernel")
    assert count(small) == 3
    found = nm.linen.apply(model, {"params": small}, X)
    assert_close(found, model.apply({"params": params}, X))


def test_vmap_and_export():
    model = nn.Sequential([nn.Dense(8), Own()])
    params, small = compressed(params_of(model), "nm")
    run = functools.partial(nm.linen.apply, model)
    expected = model.apply({"params": params}, X)
    assert_close(jax.vmap(run, (None, 0))({"params": small}, X), expected)
    blob = export.export(jax.jit(run))({"params": small}, X).serialize()
    assert_close(export.deserialize(blob).call({"params": small}, X), expected)


@pytest.mark.parametrize("layer", [nn.Dense, nn.DenseGeneral, nn.Conv, nn.Einsum])
def test_layers_compute_in_their_dtype(layer):
    args = {nn.Conv: (8, (1,)), nn.Einsum: ((8, 8), "btd,df->btf")}.get(layer, (8,))
    model = layer(*args, dtype=jnp.bfloat16)
    params, small = compressed(params_of(model), "nm")
    found = nm.linen.apply(model, {"params": small}, X)
    assert found.dtype == jnp.bfloat16
    expected = model.apply({"params": params}, X)
    assert_close(found.astype(jnp.float32), expected.astype(jnp.float32), 1e-2)


def test_quantized_kernels_are_taken():
    model = nn.Sequential([nn.Dense(8, dtype=jnp.bfloat16)] * 2)
    params = params_of(model)
    plan = nm.plan(params, nm.NM(2, 4))
    params = nm.project(params, plan)
    small = nm.compress(params, plan, dtype=jnp.int8)
    found = nm.linen.apply(model, {"params": small}, X)
    expected = model.apply({"params": nm.decompress(small)}, X)
    assert_close(found.astype(jnp.float32), expected.astype(jnp.float32), 2e-2)


def test_dense_params_give_the_same_bits():
    model = nn.Sequential([nn.Dense(8), Own()])
    params = params_of(model)
    found = nm.linen.apply(model, {"params": params}, X)
    assert (found == model.apply({"params": params}, X)).all()


def test_boxed_kernels_are_taken():
    init = nn.with_partitioning(normal, (None, "model"))
    model = nn.Dense(8, kernel_init=init)
    params, small = compressed(params_of(model), "nm")
    assert isinstance(small["kernel"], nn.Partitioned) and count(small) == 1
    expected = model.apply({"params": params}, X)
    assert_close(nm.linen.apply(model, {"params": small}, X), expected)
    # The sharding of the box is for a dense array, and is left out.
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))):
        assert_close(nm.linen.apply(model, {"params": small}, X), expected)


def test_keyword_arguments_are_those_of_apply():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x, train):
            x = nn.BatchNorm(use_running_average=not train)(nn.Dense(8)(x))
            return nn.Dropout(0.5, deterministic=not train)(x)

        @nn.compact
        def double(self, x, factor=2.0):
            return factor * nn.Dense(8)(x)

    model = Model()
    variables = model.init(jax.random.key(0), X, train=False)
    params, small = compressed(variables["params"], "nm")
    sparse, tiny = variables | {"params": params}, variables | {"params": small}
    options = {"rngs": {"dropout": jax.random.key(2)}, "mutable": ["batch_stats"]}
    assert_close(
        nm.linen.apply(model, tiny, X, train=True, **options),
        model.apply(sparse, X, train=True, **options),
    )
    expected = model.apply(sparse, X, method="double", factor=3.0)
    assert_close(nm.linen.apply(model, tiny, X, method="double", factor=3.0), expected)
    _, state = nm.linen.apply(model, tiny, X, train=False, capture_intermediates=True)
    assert "Dense_0" in state["intermediates"]
    _, everything = nm.linen.apply(model, tiny, X, train=False, mutable=True)
    kernel = everything["params"]["Dense_0"]["kernel"]
    assert type(kernel) is formats.NMArray


def test_intercept_serves_bound_modules():
    model, tokens = Embedding(), jnp.arange(3)
    params = params_of(model, tokens)
    plan = nm.plan(params, {"embedding": nm.NM(2, 4, axis=-1)})
    params = nm.project(params, plan)
    with nm.linen.intercept():
        bound = model.bind({"params": nm.compress(params, plan)})
        found = bound(tokens), bound.embed.attend(X), bound.embed(tokens)
    bound = model.bind({"params": params})
    assert_close(found, (bound(tokens), bound.embed.attend(X), bound.embed(tokens)))


def test_methods_of_one_module_call_each_other():
    class Model(nn.Module):
        def setup(self):
            self.kernel = self.param("kernel", normal, (8, 8))

        def half(self, x):
            return 0.5 * nm.matmul(x, self.kernel)

        def __call__(self, x):
            return self.half(x) + nm.matmul(x, self.kernel)

    model = Model()
    params, small = compressed(params_of(model), "nm")
    found = nm.linen.apply(model, {"params": small}, X)
    assert_close(found, model.apply({"params": params}, X))


USES = {
    "matmul": lambda x, w: x @ w,
    "rmatmul": lambda x, w: w @ x,
    "numpy": lambda x, w: np.asarray(x) @ w,
    "dot": jnp.dot,
    "einsum": lambda x, w: jnp.einsum("btd,df->btf", x, w),
    "asarray": lambda x, w: x @ jnp.asarray(w),
    "np.asarray": lambda x, w: x @ np.asarray(w),
    "jit": jax.jit(lambda x, w: x @ w),
    "times": lambda x, w: x @ (2.0 * w),
    "negative": lambda x, w: x @ -w,
    "index": lambda x, w: x @ w[:, :4],
    "iterate": lambda x, w: x @ jnp.stack([*w]),
    "promote": nn.dtypes.promote_dtype,
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_dense_use_of_a_compressed_leaf_names_the_module(use):
    model = nn.Sequential([nn.Dense(8, use_bias=False), Plain(use)])
    small = {"layers_0": small_kernel(), "layers_1": small_kernel()}
    with pytest.raises(TypeError, match=r"module 'layers_1' \(Plain\) uses its compr"):
        nm.linen.apply(model, {"params": small}, X)


def test_missing_attributes_and_primitives_name_the_module_too():
    small = small_kernel()
    reshape = Plain(lambda x, w: x @ w.reshape(8, 8))
    with pytest.raises(AttributeError, match=r"model itself \(Plain\).*\.reshape"):
        nm.linen.apply(reshape, {"params": small}, X)
    numbers = (((2,), (0,)), ((), ()))
    primitive = Plain(lambda x, w: jax.lax.dot_general(x, w, numbers))
    with pytest.raises(TypeError, match=r"model itself \(Plain\), or what it calls,"):
        nm.linen.apply(primitive, {"params": small}, X)


def test_own_dot_general_is_an_error():
    def own(*args, **kwargs):
        return jax.lax.dot_general(*args, **kwargs)

    small = small_kernel()
    for options in ({"dot_general": own}, {"dot_general_cls": lambda: own}):
        with pytest.raises(
            TypeError, match=r"model itself \(Dense\) has a dot_general"
        ):
            nm.linen.apply(nn.Dense(8, use_bias=False, **options), {"params": small}, X)
    _, small = compressed(params_of(nn.Conv(8, (1,))), "nm")
    conv = nn.Conv(8, (1,), conv_general_dilated=jax.lax.conv_general_dilated)
    with pytest.raises(TypeError, match="has a conv_general_dilated of its own"):
        nm.linen.apply(conv, {"params": small}, X)


@pytest.mark.parametrize("norm", [nn.WeightNorm, nn.SpectralNorm])
def test_normalized_weights_are_an_error(norm):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            options = {"update_stats": False} if norm is nn.SpectralNorm else {}
            return norm(nn.Dense(8), name="norm")(x, **options)

    model = Model()
    variables = jax.jit(model.init)(jax.random.key(0), X)
    _, small = compressed(variables["params"], "nm")
    message = r"module 'norm' \(\w+\) normalizes.*'Dense_0/kernel' is compressed"
    with pytest.raises(TypeError, match=message):
        nm.linen.apply(model, variables | {"params": small}, X)


def test_a_wrong_shape_is_an_error():
    with pytest.raises(ScopeParamShapeError, match=r"\(8, 16\).* shape \(8, 8\)"):
        nm.linen.apply(nn.Dense(16), {"params": small_kernel()}, X)


def test_one_compiled_function_serves_leaves_of_all_names():
    w = formats.FanInArray.from_dense(jnp.eye(4))
    traces = []

    @jax.jit
    def run(x, w):
        traces.append(1)
        return nm.matmul(x, w)

    for name in "ab":
        run(jnp.ones((1, 4)), guarded(w, name, f"module {name!r}"))
    assert len(traces) == 1
