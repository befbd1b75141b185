"""Window arrays: constant fan-in weights for AVX-512, and back."""

import dataclasses
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import nmjax as nm
from nmjax import formats
from nmjax.formats import prepared, windows


def condensed(shape, k, axes=(-1,), ablated=(), seed=0, dtype=jnp.float32):
    """A constant fan-in array of small integers without zeros."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(1, 5, shape) * rng.choice([-1, 1], shape)
    mask = nm.fan_in_mask(jnp.asarray(rng.random(shape)), k, axes)
    if ablated:
        mask = mask.at[..., jnp.array(ablated)].set(False)
    kept = jnp.where(mask, jnp.asarray(weights, dtype), 0)
    return formats.FanInArray.from_dense(kept, axes, mask)


def stack_of(layers):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def assert_same(found, expected):
    """Every array bit for bit, every static field."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def to_windows(small):
    return nm.prepare({"kernel": small}, "cpu")["kernel"]


# Round trips ------------------------------------------------------------------------


@jax.jit
def everything(ready):
    return ready.canonical, ready.todense()


@given(
    inputs=st.sampled_from([64, 65, 100, 300]),
    neurons=st.sampled_from([1, 15, 16, 33]),
    share=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    layout=st.sampled_from(["matrix", "table", "convolution", "ablated"]),
    kind=st.sampled_from(["float32", "bfloat16", "int8"]),
    stack=st.sampled_from([(), (2,)]),
)
@settings(max_examples=15, deadline=None)
def test_preparing_is_undone(inputs, neurons, share, layout, kind, stack):
    k = max(1, round(share * inputs))
    shape, axes = (inputs, neurons), (-1,)
    if layout == "table":
        shape, axes = (neurons, inputs), (0,)
    if layout == "convolution":
        shape = (2, 1, inputs, neurons)
    ablated = (0,) if layout == "ablated" and neurons > 1 else ()
    dtype = jnp.bfloat16 if kind == "bfloat16" else jnp.float32
    layers = [
        condensed(shape, k, axes, ablated, seed, dtype) for seed in range(sum(stack, 1))
    ]
    if kind == "int8":
        layers = [formats.quantize(layer) for layer in layers]
    small = stack_of(layers[:2]) if stack else layers[0]
    ready = to_windows(small)
    assert isinstance(ready, formats.WindowArray)
    assert formats.validate(ready) is ready
    assert ready.shape == small.shape and ready.dtype == small.dtype
    assert ready.fan_in == k and ready.stack_shape == stack
    assert_same(everything(ready), (small, small.todense()))


def test_windows_are_what_the_docstring_says():
    small = condensed((200, 40), 20)
    ready = to_windows(small)
    starts, offsets = np.asarray(ready.starts), np.asarray(ready.offsets)
    assert offsets[0] == 0 and offsets[-1] == len(starts) == len(ready.values)
    indices = np.asarray(small.indices).astype(int)
    weights = np.asarray(small.values)
    for group in range(3):
        rows = range(16 * group, min(40, 16 * group + 16))
        taken = {row: 0 for row in rows}
        for window in range(offsets[group], offsets[group + 1]):
            needed = min(indices[row][n] for row, n in taken.items() if n < 20)
            start = min(needed // 16 * 16, 200 - 64)
            assert starts[window] == start
            for lane in range(16):
                both = int(ready.positions[window, lane])
                for slot, position in enumerate((both & 0xFF, both >> 8)):
                    row, value = 16 * group + lane, ready.values[window, slot, lane]
                    at = taken.get(row, 20)
                    if at == 20 or indices[row][at] >= start + 64:
                        assert position == 128 and value == 0
                        continue
                    assert start + position == indices[row][at]
                    assert value == weights[row, at]
                    taken[row] += 1
        assert set(taken.values()) == {20}


def test_a_weight_that_is_zero_keeps_its_place():
    mask = jnp.zeros((64, 16), bool).at[:3].set(True)
    weights = jnp.zeros((64, 16)).at[0].set(-0.0).at[1].set(5.0)
    small = formats.FanInArray.from_dense(weights, mask=mask)
    assert_same(to_windows(small).canonical, small)


def test_matrices_and_transposes_are_views():
    small = condensed((2, 2, 64, 6), 9)
    ready = to_windows(small)
    assert_same(ready.matrix.todense(), small.todense().reshape(256, 6))
    assert_same(ready.matrix.transposed.todense(), small.todense().reshape(256, 6).T)
    assert ready.transposed is None and ready.matrix.values is ready.values
    assert to_windows(condensed((6, 64), 9, (0,))).matrix is None


# Refusals ---------------------------------------------------------------------------


def test_other_leaves_stay_what_they_are():
    params = {
        "bias": jnp.ones(4),
        "few": condensed((63, 4), 3),
        "kernel": condensed((64, 4), 3),
        "nm": formats.NMArray.from_dense(jnp.eye(64), 2, 4),
    }
    ready = nm.prepare(params, "cpu")
    for name in ("bias", "few", "nm"):
        assert ready[name] is params[name]
    assert isinstance(ready["kernel"], formats.WindowArray)
    assert nm.prepare(ready, "cpu")["kernel"] is ready["kernel"]
    assert nm.prepare(ready, "sm90")["kernel"] is ready["kernel"]
    assert prepared.refusal(params["nm"], "cpu") == (
        "NMArray has no layout for CPUs but its own"
    )
    with pytest.raises(ValueError, match="for cpu: a window is 64 inputs, .* has 63"):
        formats.WindowArray.from_canonical(params["few"])


def test_traced_arrays_are_refused():
    with pytest.raises(TypeError, match="from_canonical was called under a JAX"):
        jax.jit(formats.WindowArray.from_canonical)(condensed((64, 4), 3))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"starts": 1}, r"starts at \(0,\) is 37, but must be below 37"),
        ({"offsets": 1}, r"offsets at \(1,\) is \d+, but must be below"),
        ({"offsets": -1}, r"offsets at \(0,\) is -1, but must be below"),
        ({"neurons": 1}, r"neurons at \(5,\) is 6, but must be below 6"),
    ],
)
def test_arrays_that_cannot_be_multiplied_are_refused(changes, match):
    ready = to_windows(condensed((100, 6), 99))
    changed = {name: getattr(ready, name) + by for name, by in changes.items()}
    if "starts" in changes:
        changed["starts"] = jnp.full_like(ready.starts, 37)
    with pytest.raises(ValueError, match=match):
        formats.validate(dataclasses.replace(ready, **changed))


def test_arrays_whose_shapes_do_not_fit_are_refused():
    ready = to_windows(condensed((100, 6), 9))
    for name in ("values", "positions", "offsets"):
        cut = dataclasses.replace(ready, **{name: getattr(ready, name)[:-1]})
        with pytest.raises(ValueError, match="has shape .*, but must have"):
            formats.validate(cut)


# Products ---------------------------------------------------------------------------


def test_gradients_reach_weights_and_inputs():
    small = condensed((100, 20), 7, ablated=(3,))
    ready = to_windows(small)
    x = jax.random.normal(jax.random.key(0), (3, 100))

    @jax.jit
    def gradients(x, values, w):
        def loss(x, values):
            return jnp.sum(jnp.sin(nm.matmul(x, dataclasses.replace(w, values=values))))

        return jax.grad(loss, (0, 1))(x, values)

    dx, dvalues = gradients(x, ready.values, ready)
    expected_dx, expected = gradients(x, small.values, small)
    np.testing.assert_allclose(dx, expected_dx, rtol=1e-5, atol=1e-5)
    stored = dataclasses.replace(ready, values=dvalues)
    np.testing.assert_allclose(stored.canonical.values, expected, rtol=1e-5, atol=1e-5)
    # Zeros that fill places have no gradient.
    assert np.count_nonzero(dvalues) == small.values.size


def test_scales_have_gradients():
    small = formats.quantize(condensed((100, 20), 7))
    ready = to_windows(small)
    x = jax.random.normal(jax.random.key(0), (3, 100))

    @jax.jit
    def gradient(scales, w):
        return jax.grad(
            lambda scales: jnp.sum(nm.matmul(x, dataclasses.replace(w, scales=scales)))
        )(scales)

    found = gradient(ready.scales, ready)
    np.testing.assert_allclose(found, gradient(small.scales, small), rtol=1e-4)


def test_layers_of_flax_take_them():
    x = jax.random.normal(jax.random.key(0), (2, 64))
    small = condensed((64, 20), 7)
    ready = to_windows(small)
    expected = x @ small.todense()
    out = nm.linen.apply(nn.Dense(20, use_bias=False), {"params": {"kernel": ready}}, x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    layer = nnx.Linear(64, 20, use_bias=False, rngs=nnx.Rngs(0))
    out = nm.nnx.load(layer, {"kernel": ready})(x)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


def test_under_the_partitioner_they_are_decompressed():
    w = to_windows(condensed((64, 20), 7))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    x = jax.random.normal(jax.random.key(0), (8, 64))
    sharded = jax.device_put(x, jax.NamedSharding(mesh, P("data")))
    spread = jax.device_put(w, jax.NamedSharding(mesh, P()))
    text = jax.jit(nm.matmul).lower(sharded, spread).compile().as_text()
    assert text is not None and "nmjax_" not in text
    found = jax.jit(nm.matmul)(sharded, spread)
    np.testing.assert_allclose(found, x @ w.todense(), rtol=1e-5, atol=1e-5)


def test_exported_programs_take_them_on_every_platform():
    w = to_windows(condensed((64, 20), 7))
    x = jax.random.normal(jax.random.key(0), (2, 64))
    exported = export.export(jax.jit(nm.matmul), platforms=["cpu", "cuda", "tpu"])
    again = export.deserialize(exported(x, w).serialize())
    np.testing.assert_allclose(again.call(x, w), x @ w.todense(), rtol=1e-5, atol=1e-5)


# As pytrees -------------------------------------------------------------------------


def test_they_print_and_survive_pickling():
    ready = to_windows(condensed((64, 20), 7))
    text = "WindowArray(fan-in 7 of 64, 20 of 20 neurons, "
    assert repr(ready).startswith(text)
    assert_same(pickle.loads(pickle.dumps(ready)), ready)


def test_stacks_of_layers_scan_and_vmap():
    layers = [condensed((300, 20), 40, seed=seed) for seed in range(3)]
    stack = to_windows(stack_of(layers))
    counts = np.asarray(stack.offsets[:, -1])
    assert len(set(counts.tolist())) > 1  # windows behind the end are tested
    dense = jnp.stack([layer.todense() for layer in layers])
    assert_same(stack.todense(), dense)
    _, scanned = jax.lax.scan(lambda _, layer: (None, layer.todense()), None, stack)
    assert_same(scanned, dense)
    assert_same(jax.vmap(lambda layer: layer.todense())(stack), dense)
    x = jax.random.normal(jax.random.key(0), (2, 300))
    found = jax.vmap(nm.matmul, (None, 0))(x, stack)
    np.testing.assert_allclose(found, x @ dense, rtol=1e-4, atol=1e-4)


def test_quantizing_keeps_a_scale_for_each_neuron():
    small = condensed((100, 20), 7)
    found = formats.quantize(to_windows(small))
    assert_same(found, to_windows(formats.quantize(small)))


def test_the_lanes_are_those_of_the_kernels():
    assert (windows.LANES, windows.SLOTS, windows.WINDOW) == (16, 2, 64)
