"""Matmuls with compressed weights: values, derivatives, transformations, errors."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nmjax as nm
from nmjax import formats
from nmjax.kernels import choosing, reference, settings

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]
K, F = 16, 12


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """Compile with few optimisations: that is where these tests spend their time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@functools.cache
def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


@functools.cache
def make(kind, seed=0, dtype=jnp.float32, shape=(K, F)):
    weights = normal(seed, shape, dtype)
    if kind.startswith("nm"):
        axis = -1 if kind == "nm over outputs" else -2
        kept = jnp.where(nm.nm_mask(weights, 2, 4, axis), weights, 0)
        return formats.NMArray.from_dense(kept, 2, 4, axis)
    if kind.startswith("fan_in"):
        axes = (0,) if kind == "fan_in over outputs" else (-1,)
        mask = nm.fan_in_mask(weights, 3, axes)
        if kind == "fan_in ablated":
            mask = mask.at[:, jnp.array([1, 5])].set(False)
        kept = jnp.where(mask, weights, 0)
        return formats.FanInArray.from_dense(kept, axes, mask)
    mask = nm.block_mask(jnp.abs(weights), 5, (4, 2))
    return formats.BlockArray.from_dense(jnp.where(mask, weights, 0), 2, 4)


KINDS = ["nm", "fan_in", "fan_in ablated", "block"]
OVER = ["nm over outputs", "fan_in over outputs"]


@functools.cache
def stack_of(kind, count=3):
    layers = [make(kind, seed) for seed in range(count)]
    return jax.tree.map(lambda *parts: jnp.stack(parts), *layers)


def with_values(w, values):
    return dataclasses.replace(w, values=values)


def dense_matmul(x, w):
    return x @ w.todense()


@jax.jit
def densify(w):
    return w.todense()


def as_float64(array):
    return np.asarray(array).astype(np.float64)


def assert_close(found, expected, tolerance=1e-5):
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(
            as_float64(one), as_float64(other), rtol=tolerance, atol=tolerance
        )


# Values and gradients ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*itertools.product(KINDS, DTYPES), *((kind, jnp.float32) for kind in OVER)],
)
def test_products_and_gradients_equal_dense_ones(kind, dtype):
    w = make(kind, dtype=dtype)
    shapes = [(K,), (2, 3, K), (40, K), (0, K)]
    xs = [normal(i, shape, dtype) for i, shape in enumerate(shapes)]
    dys = [normal(9, (*shape[:-1], F), dtype) for shape in shapes]

    @jax.jit
    def run(xs, values):
        out = []
        for x, dy in zip(xs, dys, strict=True):
            y, pull = jax.vjp(lambda x, v: nm.matmul(x, with_values(w, v)), x, values)
            out.append((y, *pull(dy)))
        return out

    dense = as_float64(densify(w))
    stored = as_float64(densify(with_values(w, jnp.ones_like(w.values))))
    tolerance = 2 * float(jnp.finfo(dtype).eps) + 1e-5
    found = run(xs, w.values)
    for x, dy, (y, dx, dvalues) in zip(xs, dys, found, strict=True):
        assert (y.dtype, dx.dtype, dvalues.dtype) == (dtype,) * 3
        assert y.shape == dy.shape and dx.shape == x.shape
        x, dy = as_float64(x), as_float64(dy)
        np.testing.assert_allclose(as_float64(y), x @ dense, tolerance, tolerance)
        np.testing.assert_allclose(as_float64(dx), dy @ dense.T, tolerance, tolerance)
        outer = x.reshape(-1, K).T @ dy.reshape(-1, F)
        dw = as_float64(densify(with_values(w, dvalues)))
        np.testing.assert_allclose(dw, outer * stored, tolerance, tolerance)


@pytest.mark.parametrize("batch", [1, 33])
@pytest.mark.parametrize(
    ("kind", "form"),
    [
        *[(kind, reference.by_decompression) for kind in (*KINDS, *OVER)],
        ("fan_in", reference.by_slots),
        ("fan_in ablated", reference.by_slots),
        ("block", reference.by_blocks),
    ],
)
def test_every_form_computes_the_product(kind, form, batch):
    x, w = normal(1, (batch, K)), make(kind)
    assert_close(jax.jit(form)(x, w), as_float64(x) @ as_float64(densify(w)))


def test_ablated_neurons_give_zeros():
    y = nm.matmul(normal(1, (4, K)), make("fan_in ablated"))
    assert (y[:, jnp.array([1, 5])] == 0).all() and (y != 0).sum() == 4 * (F - 2)


def test_arrays_without_blocks_give_zeros():
    w = formats.BlockArray.from_dense(jnp.zeros((K, F)), 2, 4)
    for form in (nm.matmul, reference.by_decompression):
        assert form(normal(1, (3, K)), w).tolist() == [[0.0] * F] * 3


def test_sums_are_float32():
    # From 256 on, bfloat16 cannot count: 256 + 1 is 256.
    ones = jnp.ones((1024, 2), jnp.bfloat16)
    kept = jnp.where(nm.nm_mask(ones, 2, 4), ones, 0)
    fan_in = jnp.where(jnp.arange(2048)[:, None] < 512, jnp.ones((2048, 2)), 0)
    fan_in = fan_in.astype(jnp.bfloat16)
    for w in (
        formats.NMArray.from_dense(kept, 2, 4),
        formats.FanInArray.from_dense(fan_in),
        formats.BlockArray.from_dense(fan_in, 1, 4),
        fan_in,
    ):
        y = nm.matmul(jnp.ones((1, w.shape[0]), jnp.bfloat16), w)
        assert y.dtype == jnp.bfloat16 and y.tolist() == [[512.0, 512.0]]


def test_dense_weights_are_multiplied_too():
    x, w = normal(0, (2, 3, K)), normal(1, (K, F))
    assert_close(nm.matmul(x, w), jnp.einsum("abk,kf->abf", x, w))
    half = x.astype(jnp.bfloat16)
    assert nm.matmul(half, w.astype(jnp.bfloat16)).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_derivatives_of_second_order_and_forward_mode(kind):
    x, w = normal(1, (2, K)), make(kind)

    def derivatives(matmul):
        def loss(x, values):
            return jnp.sum(jnp.sin(matmul(x, with_values(w, values))))

        hessian = jax.hessian(loss, (0, 1))(x, w.values)
        return hessian, jax.jvp(loss, (x, w.values), (x, w.values))

    assert_close(
        jax.jit(lambda: derivatives(nm.matmul))(),
        jax.jit(lambda: derivatives(dense_matmul))(),
    )


def test_integer_leaves_have_no_gradient():
    w, x = make("nm"), normal(1, (2, K))
    grads = jax.grad(lambda w: jnp.sum(nm.matmul(x, w)), allow_int=True)(w)
    assert grads.codes.dtype == jax.dtypes.float0
    assert grads.values.shape == w.values.shape


# Transformations --------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_vmap_over_inputs_weights_and_both(kind):
    stack, one = stack_of(kind), make(kind)
    few, many = normal(1, (2, K)), normal(2, (3, 2, K))
    cases = [(many, one, (0, None)), (few, stack, (None, 0)), (many, stack, (0, 0))]
    cases.append((many.transpose(1, 2, 0), one, (2, None)))  # not the leading axis

    def run(matmul):
        def loss(values, x, w, axes):
            mapped = jax.vmap(matmul, axes)(x, with_values(w, values))
            return jnp.sum(jnp.sin(mapped)), mapped

        return [
            jax.grad(loss, (0, 1), has_aux=True)(w.values, x, w, axes)
            for x, w, axes in cases
        ]

    found = jax.jit(lambda: run(nm.matmul))()
    assert_close(found, jax.jit(lambda: run(dense_matmul))())
    seeds = jax.tree.map(lambda part: jnp.stack([part, part]), stack)  # a stack of two
    twice = jax.vmap(jax.vmap(nm.matmul, (None, 0)), (None, 0))(few, seeds)
    assert_close(twice[1], found[1][1])
    over = jax.vmap(jax.vmap(nm.matmul), (0, None))(jnp.stack([many, many]), stack)
    assert_close(over[1], found[2][1])


@pytest.mark.parametrize("kind", KINDS)
def test_layers_scan_with_rematerialisation(kind):
    layers = [make(kind, seed, shape=(8, 8)) for seed in range(3)]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)

    def gradients(matmul):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(matmul(x, w)), None

        def loss(x, values):
            return jnp.sum(lax.scan(layer, x, with_values(stack, values))[0])

        return jax.jit(jax.value_and_grad(loss, (0, 1)))(
            normal(1, (2, 8)), stack.values
        )

    assert_close(gradients(nm.matmul), gradients(dense_matmul))


@pytest.mark.parametrize("kind", KINDS)
def test_shard_map_sums_gradients_over_replicas(kind):
    w, x = make(kind), normal(1, (8, K))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def loss(x, values):
        return jnp.sum(jnp.sin(nm.matmul(x, with_values(w, values))))

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P("data"), P()), out_specs=P()
    )
    def sharded(x, values):
        return lax.psum(loss(x, values), "data")

    found = jax.jit(jax.value_and_grad(sharded, (0, 1)))(x, w.values)
    assert_close(found, jax.value_and_grad(loss, (0, 1))(x, w.values))


def test_programs_are_exported_to_every_platform():
    tree = {kind: make(kind, shape=(8, 8)) for kind in KINDS}
    x = normal(5, (3, 8))

    @jax.jit
    def apply(tree, x):
        for kind in KINDS:
            x = nm.matmul(x, tree[kind])
        return x

    exported = export.export(apply, platforms=["cpu", "cuda", "tpu"])(tree, x)
    again = export.deserialize(exported.serialize())
    assert_close(again.call(tree, x), apply(tree, x))


def test_exported_batches_may_be_symbolic():
    tree = {kind: make(kind, shape=(8, 8)) for kind in KINDS}

    @jax.jit
    def apply(tree, x):
        return [nm.matmul(x, tree[kind]) for kind in KINDS]

    shape = export.symbolic_shape("batch, 3, 8")
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    exported = export.export(apply, platforms=["cpu", "cuda"])(tree, x)
    x = normal(5, (2, 3, 8))
    assert_close(exported.call(tree, x), [dense_matmul(x, tree[k]) for k in KINDS])


@pytest.mark.parametrize(
    ("kind", "form", "trace"),
    [("fan_in", "slots", "stablehlo.while"), ("block", "blocks", "stablehlo.gather")],
)
def test_cpus_take_the_form_that_was_fastest_and_others_decompress(
    kind, form, trace, monkeypatch
):
    w, x = make(kind), normal(1, (4, K))
    layout = choosing.layout_of(w)

    def traces(platform, ratio):
        ratios = {form: ratio, "decompress": 1.0}
        rows = {(*layout, "float32", 0.2, 4): ratios}
        monkeypatch.setattr(choosing, "table", lambda: rows)
        # A product of its own each time: JAX keeps the lowering of one that it knows.
        product = jax.jit(lambda x, w: nm.matmul(x, w))
        text = export.export(product, platforms=[platform])(x, w).mlir_module()
        return text.count(trace) > count_of_decompression

    decompression = export.export(jax.jit(reference.by_decompression))(x, w)
    count_of_decompression = decompression.mlir_module().count(trace)
    assert traces("cpu", 0.5) and not traces("cpu", 2.0)
    assert not traces("cuda", 0.5) and not traces("tpu", 0.5)


# Arguments --------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_shapes_are_refused(kind, unchecked):
    w = make(kind)
    with pytest.raises(ValueError, match=r"\(3, 12\) does not end in the K=16 of w"):
        nm.matmul(normal(0, (3, F)), w)
    with pytest.raises(ValueError, match=r"\(\) does not end in the K=16"):
        nm.matmul(jnp.float32(1.0), w)
    with pytest.raises(ValueError, match=r"\(3, 16, 12\), but must be a matrix \(K, F"):
        nm.matmul(normal(0, (3, K)), stack_of(kind))


def test_wrong_shapes_of_dense_weights_are_refused():
    with pytest.raises(ValueError, match=r"\(3, 12\) does not end in the K=16 of w"):
        nm.matmul(normal(0, (3, F)), normal(1, (K, F)))
    with pytest.raises(ValueError, match="map over a stack of layers with jax.vmap"):
        nm.matmul(normal(0, (3, K)), normal(1, (2, K, F)))


def test_wrong_dtypes_are_refused(unchecked):
    w = make("nm")
    with pytest.raises(TypeError, match="x is bfloat16 and w float32, but .* same"):
        nm.matmul(normal(0, (3, K), jnp.bfloat16), w)
    with pytest.raises(TypeError, match=r"x of shape \(3, 16\) has dtype int32"):
        nm.matmul(jnp.ones((3, K), jnp.int32), w)
    with pytest.raises(TypeError, match=r"w of shape \(16, 12\) has dtype int8"):
        nm.matmul(normal(0, (3, K)), jnp.ones((K, F), jnp.int8))


@pytest.mark.parametrize("compressed", [True, False])
def test_a_bias_is_added(compressed, unchecked):
    x, w, bias = normal(0, (2, 3, K)), make("nm"), normal(1, (F,))
    w = w if compressed else w.todense()
    assert_close(nm.matmul(x, w, bias=bias), nm.matmul(x, w) + bias)
    with pytest.raises(ValueError, match=r"bias is float32 of shape \(16,\), but must"):
        nm.matmul(x, w, bias=normal(1, (K,)))
    with pytest.raises(TypeError, match="bias is bfloat16 of shape"):
        nm.matmul(x, w, bias=bias.astype(jnp.bfloat16))


@pytest.mark.parametrize("name", ["relu", "gelu", "silu"])
@pytest.mark.parametrize("kind", ["nm", "fan_in ablated", "dense"])
def test_activations_and_their_derivatives(name, kind):
    x, bias = normal(0, (3, K)), normal(1, (F,))
    w = make("nm" if kind == "dense" else kind)
    activate = getattr(jax.nn, name)

    def expected(x, values, bias):
        return activate(x @ with_values(w, values).todense() + bias)

    def found(x, values, bias):
        weights = with_values(w, values)
        weights = weights.todense() if kind == "dense" else weights
        return nm.matmul(x, weights, bias=bias, activation=name)

    arguments = x, w.values, bias
    assert_close(found(*arguments), expected(*arguments))
    assert_close(
        jax.jit(jax.jacobian(found, (0, 1, 2)))(*arguments),
        jax.jit(jax.jacobian(expected, (0, 1, 2)))(*arguments),
    )
    no_bias = nm.matmul(x, w, activation=name)
    assert_close(no_bias, activate(x @ w.todense()))


def test_biases_and_activations_are_mapped_over():
    stack, x, biases = stack_of("nm"), normal(1, (2, K)), normal(2, (3, F))

    def layer(x, w, bias):
        return nm.matmul(x, w, bias=bias, activation="relu")

    expected = jax.nn.relu(x @ stack.todense() + biases[:, None])
    assert_close(jax.vmap(layer, (None, 0, 0))(x, stack, biases), expected)
    assert_close(
        jax.vmap(layer, (None, None, 0))(x, make("nm"), biases)[1],
        layer(x, make("nm"), biases[1]),
    )
    x = normal(3, (4, 2, K))
    assert_close(
        jax.vmap(layer, (0, None, None))(x, make("nm"), biases[0])[2],
        layer(x[2], make("nm"), biases[0]),
    )


def test_unknown_activations_are_refused():
    with pytest.raises(ValueError, match="activation='tanh' is not None, 'relu', 'ge"):
        nm.matmul(normal(0, (3, K)), make("nm"), activation="tanh")


@pytest.mark.parametrize("kind", KINDS)
def test_the_result_may_have_another_dtype(kind, unchecked):
    x, w = normal(0, (3, K), jnp.bfloat16), make(kind, dtype=jnp.bfloat16)
    y = nm.matmul(x, w, preferred_element_type=jnp.float32)
    assert y.dtype == jnp.float32
    assert_close(y, as_float64(x) @ as_float64(densify(w)))
    gradient = jax.grad(
        lambda x: nm.matmul(x, w, preferred_element_type=jnp.float32).sum()
    )
    assert gradient(x).dtype == jnp.bfloat16
    with pytest.raises(TypeError, match="preferred_element_type=int32 for a product"):
        nm.matmul(x, w, preferred_element_type=jnp.int32)
    with pytest.raises(TypeError, match="bias is bfloat16 of shape .* must be float32"):
        bias = jnp.zeros(F, jnp.bfloat16)
        nm.matmul(x, w, bias=bias, preferred_element_type=jnp.float32)


@pytest.mark.parametrize("kind", ["nm", "fan_in", "dense"])
def test_products_of_int8_are_exact_int32(kind):
    x = jax.random.randint(jax.random.key(0), (3, K), -127, 128).astype(jnp.int8)
    w = make("nm" if kind == "dense" else kind)
    w = with_values(w, jnp.round(30 * w.values).astype(jnp.int8))
    dense = np.asarray(w.todense()).astype(np.int64)
    y = nm.matmul(x, w.todense() if kind == "dense" else w)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, np.asarray(x).astype(np.int64) @ dense)


def test_implementations_that_cannot_serve_are_refused():
    x, w = normal(0, (3, K)), make("nm")
    assert_close(nm.matmul(x, w, implementation="xla"), nm.matmul(x, w))
    refused = [
        (make("nm"), "float16, float8_e4m3fn, float8_e5m2, int8, not float32: cast"),
        (make("nm", dtype=jnp.bfloat16), r"prepare it once, as in nm.prepare\(params"),
        (make("fan_in"), "'pallas' serves NVIDIA GPUs only"),
        (make("nm").todense(), "w is a dense array"),
    ]
    for w, reason in refused:
        with pytest.raises(NotImplementedError, match=reason):
            nm.matmul(x.astype(w.dtype), w, implementation="pallas")
    w = make("nm")
    with pytest.raises(ValueError, match="implementation='cuda' is not None, 'xla', '"):
        nm.matmul(x, w, implementation="cuda")


def test_backends_name_what_matmul_takes():
    x, w = normal(0, (3, K)), make("nm")
    found = nm.backends()
    assert list(found) == ["cpu", "gpu", "tpu"]
    assert found["gpu"].implementation == "pallas"
    for backend in found.values():
        assert backend.reason
    for platform in ("cpu", "tpu"):
        implementation = found[platform].implementation
        assert_close(nm.matmul(x, w, implementation=implementation), nm.matmul(x, w))


@pytest.mark.parametrize("fan_in", [1, 2, 5, 13, 26, 40])
def test_slots_are_summed_in_loops_and_finished_before_the_transposition(fan_in):
    rng = np.random.default_rng(fan_in)
    keep = np.argsort(rng.random((40, 32)), axis=0) < fan_in
    weights = np.where(keep, rng.normal(size=keep.shape), 0)
    weights[:, 7] = 0  # ablated
    x, bias = rng.normal(size=(30, 40)), rng.normal(size=(32,))
    x[0, 0] = np.nan  # reaches the neurons that read it, in one row
    w = formats.FanInArray.from_dense(jnp.asarray(weights, jnp.float32))

    def finish(sums):
        assert sums.shape == (32, 30)
        return sums + jnp.asarray(bias, jnp.float32)[:, None]

    found = jax.jit(lambda x, w: reference.by_slots(x, w, finish))(
        jnp.asarray(x, jnp.float32), w
    )
    reached = np.zeros((30, 32), bool)
    reached[0] = weights[0] != 0
    np.testing.assert_array_equal(np.isnan(found), reached)
    expected = np.where(reached, np.nan, np.nan_to_num(x) @ weights + bias)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("slots", [*range(1, 60), 307, 4096])
def test_loops_have_every_slot_and_two_steps_at_least(slots):
    loops = reference._loops(slots)
    assert sum(steps * each for steps, each in loops) == slots
    assert len(loops) <= 2 and all(each <= 12 for _, each in loops)
    assert slots == 1 or all(steps > 1 for steps, _ in loops)


def test_matmul_in_xla_operations_finishes_condensed_products():
    w, x, bias = make("fan_in"), normal(0, (3, K)), normal(1, (F,))
    for activation, function in settings.ACTIVATIONS.items():
        found = nm.matmul(x, w, bias=bias, activation=activation, implementation="xla")
        assert_close(found, function(x @ w.todense() + bias))
