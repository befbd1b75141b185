"""Compressed formats: exact round trips, and life as pytrees."""

import dataclasses
import functools
import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax as nm
from nmjax import formats
from nmjax.formats import packing
from nmjax.kernels import choosing

DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


def normal(seed, shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def assert_same_bits(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.asarray(found).tobytes() == np.asarray(expected).tobytes()


# Packing ----------------------------------------------------------------------------


@given(
    bits=st.sampled_from([1, 2, 4, 8]),
    count=st.integers(1, 19),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_codes_survive_packing(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (2, count))
    packed = packing.pack_codes(jnp.asarray(codes, jnp.uint8), bits)
    assert packed.shape == (2, -(-count * bits // 8))
    found = packing.unpack_codes(packed, bits, count)
    np.testing.assert_array_equal(found, codes)
    for row, of_row in zip(np.asarray(packed), codes, strict=True):
        for j, byte in enumerate(row):  # the first code in the lowest bits
            part = of_row[j * 8 // bits : (j + 1) * 8 // bits]
            assert byte == sum(int(c) << (i * bits) for i, c in enumerate(part))


def test_groups_beyond_a_byte_are_refused():
    with pytest.raises(ValueError, match="m=257 must be between 1 and 256"):
        packing.code_bits(257)


# N:M --------------------------------------------------------------------------------


def loop_over_groups(weights, mask, n, m):
    """Collect values and positions of a matrix's groups along axis 0, one by one."""
    values, positions = [], []
    for column in range(weights.shape[1]):
        for start in range(0, weights.shape[0], m):
            active = [i for i in range(m) if mask[start + i, column]]
            others = [i for i in range(m) if not mask[start + i, column]]
            chosen = sorted(active + others[: n - len(active)])
            positions += chosen
            values += [weights[start + i, column] for i in chosen]
    shape = (weights.shape[1], -1)
    return np.reshape(values, shape), np.reshape(positions, shape)


@given(
    pattern=st.sampled_from([(1, 2), (2, 4), (1, 4), (3, 4), (4, 8), (3, 6), (5, 16)]),
    seed=st.integers(0, 99),
    share=st.sampled_from([0.5, 0.9, 1.0]),
)
@settings(max_examples=40, deadline=None)
def test_values_and_positions_equal_a_loop(pattern, seed, share):
    n, m = pattern
    rng = np.random.default_rng(seed)
    mask = np.asarray(nm.nm_mask(normal(seed, (3 * m, 5)), n, m))
    weights = np.where(mask, rng.normal(size=mask.shape), 0).astype(np.float32)
    weights[rng.random(mask.shape) > share] = 0  # active and zero, or just sparser
    for given_mask in (None, mask):
        active = weights != 0 if given_mask is None else given_mask
        small = formats.NMArray.from_dense(
            jnp.asarray(weights),
            n,
            m,
            mask=None if given_mask is None else jnp.asarray(mask),
        )
        values, positions = loop_over_groups(weights, active, n, m)
        np.testing.assert_array_equal(small.values, values)
        np.testing.assert_array_equal(small.positions, positions)
        assert_same_bits(small.todense(), weights)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((8, 6), -2), ((8, 6), 0), ((6, 8), 1), ((3, 3, 8, 4), -2), ((8, 2, 3), -3)],
)
def test_every_axis_and_dtype_makes_the_round_trip(shape, axis, dtype):
    weights = normal(0, shape, dtype)
    weights = jnp.where(nm.nm_mask(weights, 2, 4, axis), weights, 0)
    small = formats.NMArray.from_dense(weights, 2, 4, axis)
    assert small.shape == shape and small.dtype == dtype
    # What counts outputs comes first, all that counts inputs last.
    last = axis in (-1, len(shape) - 1)
    behind = shape[:-1] if last else shape[axis % len(shape) + 1 :]
    outputs = math.prod(behind)
    inputs = weights.size // outputs
    assert small.values.shape == (outputs, inputs // 2)
    assert small.codes.shape == (outputs, inputs // 8)
    assert_same_bits(small.todense(), weights)


def test_two_of_four_takes_half_the_values_and_two_bits_each():
    weights = jnp.where(nm.nm_mask(normal(0, (64, 32)), 2, 4), 1.0, 0.0)
    small = formats.NMArray.from_dense(weights, 2, 4)
    assert small.nbytes == 64 * 32 * 4 * 17 // 32
    assert small.ratio == 17 / 32
    half = formats.NMArray.from_dense(weights.astype(jnp.bfloat16), 2, 4)
    assert half.ratio == 9 / 16


def test_weights_that_are_not_n_of_m_are_refused():
    weights = jnp.zeros((8, 3)).at[4:7, 2].set(1.0)
    with pytest.raises(ValueError, match=r"group 1 along axis -2, at \(2,\) .* has 3"):
        formats.NMArray.from_dense(weights, 2, 4)
    mask = jnp.zeros((8, 3), bool)
    with pytest.raises(ValueError, match=r"weight at \(4, 2\) is 1.0 but not active"):
        formats.NMArray.from_dense(weights, 2, 4, mask=mask)
    with pytest.raises(ValueError, match=r"mask of shape \(4, 3\) for weights"):
        formats.NMArray.from_dense(weights, 2, 4, mask=mask[:4])
    with pytest.raises(ValueError, match="not a multiple of m=3"):
        formats.NMArray.from_dense(weights, 2, 3)


# Constant fan-in --------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "neuron_axes"),
    [((12, 5), (-1,)), ((5, 12), (0,)), ((3, 3, 4, 6), (-1,)), ((8, 2, 3), (1, 2))],
)
def test_fan_in_arrays_make_the_round_trip(shape, neuron_axes, dtype):
    weights = normal(0, shape, dtype)
    mask = nm.fan_in_mask(weights, 3, neuron_axes)
    ablated = jnp.zeros(shape, bool).at[..., -1].set(neuron_axes != (0,))
    mask &= ~ablated
    weights = jnp.where(mask, weights, 0)
    small = formats.FanInArray.from_dense(weights, neuron_axes, mask)
    inputs = tuple(
        i
        for i in range(len(shape))
        if i - len(shape) not in neuron_axes and i not in neuron_axes
    )
    alive = np.asarray(mask.any(inputs))
    assert small.values.shape == small.indices.shape == (alive.sum(), 3)
    assert small.neurons.tolist() == np.flatnonzero(alive).tolist()
    assert (np.diff(small.indices.astype(jnp.int32), axis=1) > 0).all()
    assert small.shape == shape and small.fan_in == 3
    assert_same_bits(small.todense(), weights)


@pytest.mark.parametrize(
    ("inputs", "dtype"), [(256, "uint8"), (257, "uint16"), (65537, "uint32")]
)
def test_indices_take_the_smallest_dtype(inputs, dtype):
    weights = jnp.zeros((inputs, 2)).at[inputs - 1].set(1.0)
    small = formats.FanInArray.from_dense(weights)
    assert small.indices.dtype == dtype
    assert small.indices.tolist() == [[inputs - 1]] * 2
    assert_same_bits(small.todense(), weights)


def test_active_weights_that_are_zero_keep_their_places():
    weights = jnp.zeros((4, 2)).at[3].set(5.0)
    mask = jnp.zeros((4, 2), bool).at[2:].set(True)
    small = formats.FanInArray.from_dense(weights, mask=mask)
    assert small.indices.tolist() == [[2, 3], [2, 3]]
    filled = formats.FanInArray.from_dense(weights.at[0, 1].set(7.0))
    assert filled.indices.tolist() == [[0, 3], [0, 3]]  # neuron 0 is filled up
    assert_same_bits(filled.todense(), weights.at[0, 1].set(7.0))


def test_other_fan_ins_are_refused():
    mask = jnp.ones((3, 2), bool).at[0, 1].set(False)
    weights = mask.astype(jnp.float32)
    with pytest.raises(ValueError, match="neuron 1 has 2 active .* neuron 0 has 3"):
        formats.FanInArray.from_dense(weights, mask=mask)
    with pytest.raises(ValueError, match="no neuron has an active weight"):
        formats.FanInArray.from_dense(jnp.zeros((3, 2)))


# Blocks -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "block", "axis"),
    [
        ((6, 8), (4, 1), -2),
        ((6, 8), (2, 3), -2),
        ((3, 3, 4, 8), (4, 2), -2),
        ((8, 3, 4), (2, 4), 0),
    ],
)
def test_block_arrays_make_the_round_trip(shape, block, axis, dtype):
    weights = normal(1, shape, dtype)
    pattern = nm.Block(*block, axis=axis - len(shape) if axis >= 0 else axis)
    mask = pattern.mask(jnp.abs(weights), weights.size // 4)
    weights = jnp.where(mask, weights, 0)
    small = formats.BlockArray.from_dense(weights, *block, axis=axis, mask=mask)
    size = block[0] * block[1]
    assert small.values.shape == (int(mask.sum()) // size, block[1], block[0])
    order = list(zip(small.columns.tolist(), small.rows.tolist(), strict=True))
    assert order == sorted(order)
    assert small.shape == shape
    assert_same_bits(small.todense(), weights)


def test_cut_blocks_are_refused():
    mask = jnp.zeros((4, 4), bool).at[2, 2].set(True)
    with pytest.raises(ValueError, match="cuts the block 2 along the inputs, 1 along"):
        formats.BlockArray.from_dense(mask.astype(jnp.float32), 2, 1, mask=mask)
    with pytest.raises(ValueError, match="not a multiple of outputs=3"):
        formats.BlockArray.from_dense(jnp.ones((4, 4)), 3, 1)


# As pytrees -------------------------------------------------------------------------


def make(kind, seed=0, shape=(8, 8)):
    weights = normal(seed, shape)
    if kind == "nm":
        return formats.NMArray.from_dense(
            jnp.where(nm.nm_mask(weights, 2, 4), weights, 0), 2, 4
        )
    if kind == "fan_in":
        mask = nm.fan_in_mask(weights, 3).at[:, 1].set(False)
        return formats.FanInArray.from_dense(jnp.where(mask, weights, 0))
    mask = nm.block_mask(jnp.abs(weights), 3, (4, 2))
    return formats.BlockArray.from_dense(jnp.where(mask, weights, 0), 2, 4)


KINDS = ["nm", "fan_in", "block"]


@pytest.mark.parametrize("kind", KINDS)
def test_they_pass_through_jit_and_keep_their_type(kind):
    small = make(kind)
    doubled = jax.jit(lambda a: jax.tree.map(lambda x: x + x, a))
    values = jax.jit(lambda a: a.todense())(small)
    assert_same_bits(values, small.todense())
    assert type(doubled(small)) is type(small)


@pytest.mark.parametrize("kind", KINDS)
def test_stacks_of_layers_scan_and_vmap(kind):
    layers = [make(kind, seed) for seed in range(3)]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    assert stack.shape == (3, 8, 8)
    dense = [layer.todense() for layer in layers]
    assert_same_bits(stack.todense(), jnp.stack(dense))
    _, scanned = jax.lax.scan(lambda _, layer: (None, layer.todense()), None, stack)
    mapped = jax.vmap(lambda layer: layer.todense())(stack)
    for i in range(3):
        assert_same_bits(scanned[i], dense[i])
        assert_same_bits(mapped[i], dense[i])


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_stored_values(kind):
    small, target = make(kind), normal(9, (8, 8))

    def with_values(values):
        return dataclasses.replace(small, values=values)

    grads = jax.grad(lambda v: jnp.sum(with_values(v).todense() * target))(small.values)
    stored = with_values(jnp.ones_like(small.values)).todense() != 0
    np.testing.assert_allclose(
        with_values(grads).todense(), jnp.where(stored, target, 0), rtol=1e-6
    )


@pytest.mark.parametrize("kind", KINDS)
def test_they_survive_pickling(kind):
    small = make(kind)
    again = pickle.loads(pickle.dumps(small))
    assert jax.tree.structure(again) == jax.tree.structure(small)
    assert_same_bits(again.todense(), small.todense())


def test_they_survive_orbax(tmp_path):
    tree = {kind: {"kernel": make(kind)} for kind in KINDS}
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "small", tree)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "small", target)
    assert jax.tree.structure(again) == jax.tree.structure(tree)
    for kind in KINDS:
        assert_same_bits(
            again[kind]["kernel"].todense(), tree[kind]["kernel"].todense()
        )


def test_they_are_arguments_of_exported_functions():
    tree = {kind: make(kind) for kind in KINDS}
    x = normal(5, (3, 8))

    @jax.jit
    def apply(tree, x):
        for kind in KINDS:
            x = x @ tree[kind].todense()
        return x

    exported = export.export(apply, platforms=["cpu", "cuda", "tpu"])(tree, x)
    again = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(again.call(tree, x), apply(tree, x))


@pytest.mark.parametrize("kind", KINDS)
def test_they_can_be_sharded(kind):
    small = make(kind)
    mesh = jax.make_mesh((2,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated = jax.device_put(small, NamedSharding(mesh, P()))
    assert_same_bits(jax.jit(lambda a: a.todense())(replicated), small.todense())
    if kind == "nm":  # over outputs
        split = jax.device_put(small, NamedSharding(mesh, P("x")))
        assert split.values.sharding.spec == P("x")
        assert_same_bits(jax.jit(lambda a: a.todense())(split), small.todense())


@pytest.mark.parametrize("kind", KINDS)
def test_compressing_under_jit_is_refused(kind):
    arguments = {"nm": (2, 4), "fan_in": (), "block": (2, 4)}[kind]
    pack = type(make(kind)).from_dense
    with pytest.raises(TypeError, match="Compress outside of jax.jit"):
        jax.jit(lambda w: pack(w, *arguments).values)(jnp.ones((8, 8)))


def test_they_print_their_size_and_shardings_print_too():
    small = make("fan_in")
    text = "FanInArray(fan-in 3 of 8, 7 of 8 neurons, float32[8, 8], 133 bytes, 0.52 of"
    assert repr(small).startswith(text)
    specs = jax.tree.map(lambda _: "spec", small)
    assert "values='spec'" in repr(specs)


# Trees ------------------------------------------------------------------------------


def random_params():
    return {
        "attention": {"query": {"kernel": normal(0, (16, 2, 4))}},
        "blocks": {"kernel": normal(1, (8, 16))},
        "conv": {"kernel": normal(2, (3, 3, 8, 16)), "bias": normal(3, (16,))},
        "fan_in": {"kernel": normal(4, (16, 8))},
        "layers": {"kernel": normal(5, (3, 16, 8))},
        "transposable": {"kernel": normal(6, (16, 8))},
    }


RULES = {
    "query|conv/kernel": nm.NM(2, 4),
    "blocks": nm.Block(4, 1, density=0.25),
    "fan_in|layers": nm.FanIn(density=0.25),
    "transposable": nm.TransposableNM(2, 4),
}


def test_whole_trees_make_the_round_trip():
    params = random_params()
    plan = nm.plan(params, RULES, stacked="layers")
    masks = nm.compute_masks(params, plan)
    params = nm.apply_masks(params, masks)
    for given_masks in (None, masks):
        small = nm.compress(params, plan, masks=given_masks)
        found = {
            leaf.path: type(at(small, leaf.path)).__name__
            for leaf in plan.sparse_leaves
        }
        assert found == {
            "attention/query/kernel": "NMArray",
            "blocks/kernel": "BlockArray",
            "conv/kernel": "NMArray",
            "fan_in/kernel": "FanInArray",
            "layers/kernel": "FanInArray",
            "transposable/kernel": "NMArray",
        }
        assert small["conv"]["bias"] is params["conv"]["bias"]
        jax.tree.map(assert_same_bits, nm.decompress(small), params)
    assert small["layers"]["kernel"].shape == (3, 16, 8)
    rows = formats.sizes(small)
    assert [row["path"] for row in rows][-1] == "all"
    assert rows[-1]["dense bytes"] == sum(x.nbytes for x in jax.tree.leaves(params))
    assert rows[-1]["bytes"] == sum(x.nbytes for x in jax.tree.leaves(small))


def at(tree, path):
    return functools.reduce(lambda node, key: node[key], path.split("/"), tree)


def test_formats_are_found_from_masks():
    params = {
        "query": {"kernel": normal(0, (16, 2, 4))},
        "dense": {"kernel": normal(1, (16, 8))},
        "head": {"kernel": normal(2, (10, 3)), "bias": normal(3, (3,))},
    }
    rules = {"query": nm.NM(4, 8), "dense": nm.NM(2, 4), "head": nm.FanIn(density=0.3)}
    plan = nm.plan(params, {f"{k}.*kernel": v for k, v in rules.items()})
    masks = nm.compute_masks(params, plan)
    masks["dense"]["kernel"] = nm.nm_mask(params["dense"]["kernel"], 2, 4)
    params = nm.apply_masks(params, masks)
    small = nm.compress(params, masks)
    assert small["dense"]["kernel"].layout == "2:4 along -2"
    assert small["query"]["kernel"].layout == "4:8 along -3"
    assert small["head"]["kernel"].layout == "fan-in 3 of 10, 3 of 3 neurons"
    jax.tree.map(assert_same_bits, nm.decompress(small), params)
    ragged = {"dense": {"kernel": jnp.eye(16, 8, dtype=bool).at[0].set(True)}}
    dense = {"dense": {"kernel": ragged["dense"]["kernel"].astype(jnp.float32)}}
    with pytest.raises(ValueError, match="'dense/kernel': its mask is neither n:m"):
        nm.compress(dense, ragged)


def test_ablated_neurons_of_a_trained_layer_are_not_stored():
    params = {"kernel": normal(0, (16, 8))}
    plan = nm.plan(params, nm.FanIn(), density=0.25)
    params = nm.project(params, plan)
    tx = nm.srigl(optax.sgd(0.1), plan, total_steps=9, delta_t=1, gamma_sal=0.9)
    state = tx.init(params)
    for seed in range(3):
        updates, state = tx.update({"kernel": normal(seed, (16, 8))}, state, params)
        params = optax.apply_updates(params, updates)
    masks = nm.masks(state)
    alive = int(masks["kernel"].any(0).sum())
    assert alive < 8
    for small in (
        nm.compress(params, plan, masks=masks),
        nm.compress(params, masks),
        nm.compress(params, plan),
    ):
        assert small["kernel"].neurons.size == alive
        assert_same_bits(small["kernel"].todense(), params["kernel"])


@pytest.mark.parametrize(
    ("rules", "match"),
    [
        (nm.NM(2, 4), "leaf 'kernel': group 0 along axis -2, at"),
        (
            nm.FanIn(density=0.25),
            "leaf 'kernel': a neuron has 16 active weights, but 32",
        ),
        (nm.Unstructured(density=0.5), "leaf 'kernel': there is no compressed format"),
    ],
)
def test_leaves_that_do_not_fit_are_named(rules, match):
    params = {"kernel": normal(0, (16, 8))}
    with pytest.raises(ValueError, match=match):
        nm.compress(params, nm.plan(params, rules))


def test_layers_of_a_stack_must_be_stored_alike():
    params = {"kernel": normal(0, (2, 8, 8))}
    plan = nm.plan(params, {"kernel": nm.FanIn(density=0.25)}, stacked="kernel")
    params = nm.project(params, plan)
    uneven = {"kernel": params["kernel"].at[1, :, 0].set(0.0)}
    with pytest.raises(ValueError, match="leaf 'kernel': layers of a stack must be"):
        nm.compress(uneven, plan)


# Where it pays -----------------------------------------------------------------------


def test_leaves_that_would_be_slower_stay_dense(monkeypatch):
    params = random_params()
    plan = nm.plan(params, RULES, stacked="layers")
    params = nm.project(params, plan)
    quarter = {"decompress": 2.0, "slots": 0.9}
    rows = {
        ("FanIn", "", "float32", 0.25, 1): quarter,
        ("FanIn", "", "float32", 0.25, 64): {"decompress": 2.0, "slots": 1.1},
        ("NM", "2:4", "float32", 0.5, 1): {"decompress": 0.7},
        ("Block", "4x1", "float32", 0.25, 1): {"decompress": 3.0, "blocks": 1.0},
    }
    monkeypatch.setattr(choosing, "table", lambda: rows)

    def compressed(**options):
        small = nm.compress(params, plan, when="faster", platform="cpu", **options)
        jax.tree.map(assert_same_bits, nm.decompress(small), params)
        paths = (leaf.path for leaf in plan.sparse_leaves)
        return {path for path in paths if formats.is_compressed(at(small, path))}

    some = {"attention/query/kernel", "conv/kernel", "transposable/kernel"}
    assert compressed(batch=64) == some
    assert compressed(batch=1) == some | {"fan_in/kernel", "layers/kernel"}
    small = nm.compress(params, plan, when="faster", batch=1, platform="gpu")
    assert not any(map(formats.is_compressed, jax.tree.leaves(small)))
    with pytest.raises(TypeError, match="when='faster' with batch=None"):
        nm.compress(params, plan, when="faster")
    with pytest.raises(ValueError, match="when='sometimes' is neither"):
        nm.compress(params, plan, when="sometimes")


# Quantized ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_values_stand_within_half_a_step(kind, dtype):
    small = make(kind)
    found = formats.quantize(small, dtype)
    assert found.values.dtype == dtype and found.dtype == small.dtype
    assert found.shape == small.shape and found.nbytes < small.nbytes
    axes = (1, 2) if kind == "block" else (1,)
    most = np.abs(small.values).max(axes, keepdims=True)
    # Half a step of the largest code: of 127, or of a mantissa of 3 or 2 bits.
    step = {"int8": 1 / 254, "float8_e4m3fn": 1 / 16, "float8_e5m2": 1 / 8}[dtype]
    error = np.abs(found.weights - small.values)
    assert (error <= 1.001 * step * most).all()
    assert np.abs(found.weights).max() == pytest.approx(most.max(), rel=1e-6)
    text = f"{dtype} with scales in float32[8, 8]"
    assert text in repr(found)


def test_quantizing_rounds_to_even_and_keeps_zeros():
    values = jnp.array([[127.0, 0.5, 1.5, -2.5], [0.0, 0.0, 0.0, 0.0]])
    small = make("nm", shape=(8, 2))
    found = formats.quantize(dataclasses.replace(small, values=values))
    assert found.values.tolist() == [[127, 0, 2, -2], [0, 0, 0, 0]]
    assert found.scales.tolist() == [[1.0], [1.0]]


def test_whole_trees_are_quantized_and_stay_differentiable():
    params = {"kernel": normal(0, (16, 8)), "bias": normal(1, (8,))}
    plan = nm.plan(params, nm.NM(2, 4))
    params = nm.project(params, plan)
    small = nm.compress(params, plan, dtype=jnp.int8)
    assert small["bias"] is params["bias"]
    x = normal(2, (3, 16))

    def loss(x, scales):
        kernel = dataclasses.replace(small["kernel"], scales=scales)
        return jnp.sum(jnp.sin(nm.matmul(x, kernel)))

    def dense(x, scales):
        weights = small["kernel"].values.astype(jnp.float32) * scales
        return jnp.sum(jnp.sin(x @ small["kernel"].place(weights)))

    scales = small["kernel"].scales
    found_pair, expected_pair = (
        jax.grad(function, (0, 1))(x, scales) for function in (loss, dense)
    )
    for found, expected in zip(found_pair, expected_pair, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_quantized_is_refused():
    small = make("fan_in")
    with pytest.raises(TypeError, match="dtype=int16 is none of int8, float8"):
        formats.quantize(small, jnp.int16)
    with pytest.raises(TypeError, match="are int8 with scales already"):
        formats.quantize(formats.quantize(small))
    with pytest.raises(ValueError, match="a weight is not finite"):
        formats.quantize(dataclasses.replace(small, values=small.values * jnp.inf))
    with pytest.raises(TypeError, match="floating dtypes, not int32"):
        small.astype(jnp.int32)
    assert formats.quantize(small).astype(jnp.bfloat16).dtype == jnp.bfloat16


@pytest.mark.parametrize("kind", KINDS)
def test_arrays_are_matrices_without_work(kind):
    small = make(kind)
    assert small.matrix == small or small.matrix.shape == (8, 8)
    turned = small.transposed
    if kind == "block":
        assert turned is None
    else:
        assert_same_bits(turned.todense(), small.todense().T)
        assert_same_bits(turned.transposed.todense(), small.todense())


# What was read from somewhere ---------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_what_from_dense_made_is_valid(kind):
    small = make(kind)
    assert formats.validate(small) is small
    stack = jax.tree.map(lambda *a: jnp.stack(a), small, make(kind, 1))
    assert formats.validate(stack) is stack
    with pytest.raises(TypeError, match="formats.validate was called under a JAX"):
        jax.jit(formats.validate)(small)


@pytest.mark.parametrize(
    ("kind", "changes", "match"),
    [
        ("fan_in", {"indices": lambda a: a + 5}, r"indices at \(\d, \d\) is \d+, but"),
        ("fan_in", {"indices": lambda a: a[:, ::-1]}, "indices must ascend, but"),
        ("fan_in", {"indices": lambda a: a[:, :2]}, r"indices has shape \(7, 2\), but"),
        (
            "fan_in",
            {"neurons": lambda a: a + 1},
            r"neurons at \(6,\) is 8, but must be",
        ),
        ("fan_in", {"neurons": lambda a: a - 1}, r"neurons at \(0,\) is -1, but must"),
        ("fan_in", {"neurons": lambda a: a[:3]}, r"neurons has shape \(3,\), but must"),
        ("nm", {"codes": lambda a: a * 0}, "positions must ascend, but 0 follows 0"),
        ("nm", {"values": lambda a: a[:, :2]}, "hold 16 weights, but 2:4 of shape"),
        (
            "block",
            {"rows": lambda a: a + 4},
            r"rows at \(0,\) is \d, but must be below 2",
        ),
        (
            "block",
            {"columns": lambda a: a + 4},
            r"columns at \(\d,\) is \d, but must be",
        ),
        ("block", {"columns": lambda a: a[::-1]}, "column . rows . row must ascend"),
        ("block", {"rows": lambda a: a[:1]}, r"rows has shape \(1,\), but must have"),
    ],
)
def test_arrays_that_cannot_be_multiplied_are_refused(kind, changes, match):
    small = make(kind)
    changed = {name: change(getattr(small, name)) for name, change in changes.items()}
    with pytest.raises(ValueError, match=match):
        formats.validate(dataclasses.replace(small, **changed))
