"""Sparse layers of linen and nnx: positions, scale, gradients, conversion."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import nmjax as nm
from nmjax import formats, positions

X = jax.random.normal(jax.random.key(1), (3, 16))


def linen_of(kind):
    layer = {
        "fan_in": nm.linen.FanInDense(8, fan_in=3),
        "nm": nm.linen.NMDense(8, n=1, m=4),
    }[kind]
    return layer, layer.init(jax.random.key(0), X)


def nnx_of(kind, **options):
    if kind == "fan_in":
        return nm.nnx.FanInDense(16, 8, fan_in=3, **options, rngs=nnx.Rngs(0))
    return nm.nnx.NMDense(16, 8, n=1, m=4, **options, rngs=nnx.Rngs(0))


def dense_kernel(variables):
    """Decompress what a linen layer stores, in a loop."""
    values = np.asarray(variables["params"]["values"])
    kernel = np.zeros((16, 8), values.dtype)
    where = variables["positions"]
    if "codes" in where:
        small = formats.NMArray(values, None, where["codes"], 1, 4, -2, (16, 8))
        group = np.asarray(small.positions)
        for f, j in np.ndindex(values.shape):
            kernel[4 * j + group[f, j], f] = values[f, j]
        return kernel
    for row, f in enumerate(np.asarray(where["neurons"])):
        for j, i in enumerate(np.asarray(where["indices"])[row]):
            kernel[i, f] = values[row, j]
    return kernel


@pytest.mark.parametrize("kind", ["fan_in", "nm"])
def test_linen_layers_compute_a_dense_layer(kind):
    layer, variables = linen_of(kind)
    kernel = dense_kernel(variables)
    assert (np.count_nonzero(kernel, axis=0) == (3 if kind == "fan_in" else 4)).all()
    np.testing.assert_allclose(layer.apply(variables, X), X @ kernel, atol=1e-5)


@pytest.mark.parametrize("kind", ["fan_in", "nm"])
def test_nnx_layers_compute_a_dense_layer(kind):
    layer = nnx_of(kind)
    kernel = layer.kernel.todense()
    assert (jnp.sum(kernel != 0, 0) == (3 if kind == "fan_in" else 4)).all()
    np.testing.assert_allclose(layer(X), X @ kernel, atol=1e-5)
    merged = nnx.merge(*nnx.split(layer))
    np.testing.assert_array_equal(nnx.jit(lambda m: m(X))(merged), layer(X))


@pytest.mark.parametrize("kind", ["fan_in", "nm"])
def test_params_train_and_positions_stay(kind):
    layer, variables = linen_of(kind)
    params, where = variables["params"], variables["positions"]

    def loss(params):
        y = layer.apply({"params": params, "positions": where}, X)
        return jnp.sum((y - 1.0) ** 2)

    @jax.jit
    def step(params):
        grads = jax.grad(loss)(params)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, grads)

    trained = params
    for _ in range(20):
        trained = step(trained)
    assert loss(trained) < 0.5 * loss(params)
    before = dense_kernel(variables)
    after = dense_kernel({"params": trained, "positions": where})
    assert (after[before == 0] == 0).all() and (after[before != 0] != 0).any()

    # The first step, with the gradient of the dense kernel.
    y = X @ before + params["bias"]
    grad = np.where(before != 0, X.T @ (2 * (y - 1.0)), 0)
    values = jax.grad(loss)(params)["values"]
    found = dense_kernel({"params": {"values": values}, "positions": where})
    np.testing.assert_allclose(found, grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["fan_in", "nm"])
def test_nnx_gradients_and_optimizers_see_floating_params(kind):
    layer = nnx_of(kind)
    grads = nnx.grad(lambda layer: jnp.sum(layer(X) ** 2))(layer)
    assert {path[-1] for path, _ in nnx.to_flat_state(grads)} == {"values", "bias"}
    expected = X.T @ (2 * (X @ layer.kernel.todense()))
    found = layer._kernel(grads["values"][...]).todense()
    on = layer.kernel.todense() != 0
    np.testing.assert_allclose(found, jnp.where(on, expected, 0.0), atol=1e-4)


def test_scale_fits_the_inputs_that_are_there():
    # lecun_normal has variance 1 / fan-in; 16 * 512 draws estimate it to about 3 %.
    layer = nm.linen.FanInDense(512, fan_in=16)
    values = layer.init(jax.random.key(0), jnp.ones((1, 256)))["params"]["values"]
    assert float(jnp.var(values)) == pytest.approx(1 / 16, rel=0.1)
    layer = nm.nnx.NMDense(64, 256, n=2, m=4, rngs=nnx.Rngs(0))
    assert float(jnp.var(layer.values[...])) == pytest.approx(1 / 32, rel=0.1)


def test_random_positions_are_different_and_all_are_drawn():
    indices = np.asarray(positions.random_inputs(jax.random.key(0), 300, 200, 5))
    assert indices.dtype == np.uint16
    assert (np.diff(indices.astype(int), axis=1) > 0).all()
    assert len(set(indices.ravel().tolist())) > 280
    codes = positions.random_codes(jax.random.key(0), 64, 32, 2, 4)
    small = formats.NMArray(jnp.ones((32, 32)), None, codes, 2, 4, -2, (64, 32))
    groups = np.asarray(small.todense()).reshape(16, 4, 32)
    assert (groups.sum(1) == 2).all()
    assert (groups.sum((0, 2)) > 0.4 * 16 * 32).all()


def pruned(ablated=()):
    kernel = jax.random.normal(jax.random.key(2), (16, 8))
    mask = nm.fan_in_mask(jnp.abs(kernel), 3)
    for neuron in ablated:
        mask = mask.at[:, neuron].set(False)
    return jnp.where(mask, kernel, 0.0), mask


@pytest.mark.parametrize("with_bias", [False, True])
def test_fan_in_layers_are_made_of_pruned_kernels(with_bias):
    kernel, mask = pruned(ablated=(0, 5))
    bias = jnp.arange(8.0) if with_bias else None
    expected = X @ kernel + (jnp.arange(8.0) if with_bias else 0.0)
    layer, variables = nm.linen.FanInDense.from_dense(kernel, bias, mask=mask)
    assert variables["params"]["values"].shape == (6, 3)
    np.testing.assert_allclose(layer.apply(variables, X), expected, atol=1e-5)
    layer = nm.nnx.FanInDense.from_dense(kernel, bias, mask=mask)
    np.testing.assert_allclose(layer(X), expected, atol=1e-5)
    small = layer.kernel
    again = nm.nnx.FanInDense.from_compressed(small, dtype=jnp.bfloat16)
    assert again(X).dtype == jnp.bfloat16
    np.testing.assert_array_equal(again.kernel.todense(), kernel)


@pytest.mark.parametrize("with_bias", [False, True])
def test_nm_layers_are_made_of_pruned_kernels(with_bias):
    kernel = jax.random.normal(jax.random.key(2), (16, 8))
    mask = nm.nm_mask(kernel, 2, 4)
    kernel = jnp.where(mask, kernel, 0.0)
    bias = jnp.arange(8.0) if with_bias else None
    expected = X @ kernel + (jnp.arange(8.0) if with_bias else 0.0)
    layer, variables = nm.linen.NMDense.from_dense(kernel, bias, mask=mask)
    np.testing.assert_allclose(layer.apply(variables, X), expected, atol=1e-5)
    layer = nm.nnx.NMDense.from_dense(kernel, bias)
    np.testing.assert_allclose(layer(X), expected, atol=1e-5)
    np.testing.assert_array_equal(layer.kernel.todense(), kernel)


def test_layers_compute_in_their_dtype():
    layer = nm.linen.FanInDense(8, fan_in=3, dtype=jnp.bfloat16)
    variables = layer.init(jax.random.key(0), X)
    assert variables["params"]["values"].dtype == jnp.float32
    assert layer.apply(variables, X).dtype == jnp.bfloat16
    half = nnx_of("nm", param_dtype=jnp.bfloat16, dtype=jnp.float32)
    assert half.kernel.dtype == jnp.bfloat16 and half(X).dtype == jnp.float32


def test_linen_layers_scan():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nm.linen.FanInDense(16, fan_in=3)(x), None

    axes = {"params": 0, "positions": 0}
    model = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=2)()
    variables = model.init(jax.random.key(0), X, None)
    indices = variables["positions"]["FanInDense_0"]["indices"]
    assert indices.shape == (2, 16, 3) and (indices[0] != indices[1]).any()
    y, x = model.apply(variables, X, None)[0], X
    for i in range(2):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], variables)
        x, _ = Block().apply(one, x, None)
    np.testing.assert_allclose(y, x, atol=1e-5)


def test_layers_that_cannot_be_are_errors():
    with pytest.raises(ValueError, match="fan_in=17 is not between 1 and the 16"):
        nm.linen.FanInDense(8, fan_in=17).init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="16 inputs are not a multiple of m=5"):
        nm.nnx.NMDense(16, 8, n=2, m=5, rngs=nnx.Rngs(0))
    rows = formats.FanInArray.from_dense(jnp.eye(4), (0,))
    with pytest.raises(ValueError, match="is no matrix .* whose inputs, axis -2"):
        nm.nnx.FanInDense.from_compressed(rows)
    whole = formats.quantize(formats.NMArray.from_dense(jnp.eye(4), 1, 4), jnp.int8)
    with pytest.raises(ValueError, match="quantized values, which do not train"):
        nm.linen.NMDense.from_compressed(whole)
