"""Prepared arrays: 2:4 weights in the order of a GPU's registers, and back."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import export
from jax.experimental.pallas import mosaic_gpu as plgpu

import nmjax as nm
from nmjax import formats
from nmjax.formats import images, packing, prepared

TARGETS = prepared.TARGETS
# Dtype of the weights, and that of quantized values.
KINDS = [
    ("bfloat16", None),
    ("float16", None),
    ("float8_e4m3fn", None),
    ("float8_e5m2", None),
    ("int8", None),
    ("bfloat16", "int8"),
    ("float16", "float8_e4m3fn"),
]


PAIRS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], np.uint8)


def compress(shape, kind=KINDS[0], axis=-2, stacked=0, seed=0):
    """A 2:4 array of small integers, put together in NumPy."""
    dtype, quantized = kind
    rng = np.random.default_rng(seed)
    dense_shape = shape[stacked:]
    rank = len(dense_shape)
    behind = dense_shape[:-1] if axis == -1 else dense_shape[rank + axis + 1 :]
    rows = math.prod(behind)
    groups = math.prod(dense_shape) // rows // 4
    stack = shape[:stacked]
    values = rng.integers(-4, 5, (*stack, rows, 2 * groups))
    codes = PAIRS[rng.integers(0, 6, (*stack, rows, groups))] << np.uint8([0, 2])
    codes = codes.sum(-1, dtype=np.uint8)
    codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, groups % 2)])
    packed = codes[..., ::2] | codes[..., 1::2] << 4
    scales = None
    if quantized:
        scales = jnp.asarray(rng.integers(1, 4, (*stack, rows, 1)).astype(dtype))
    return formats.NMArray(
        jnp.asarray(values.astype(quantized or dtype)),
        scales,
        jnp.asarray(packed),
        2,
        4,
        axis,
        dense_shape,
    )


def assert_same(found, expected):
    """Every array bit for bit, every static field."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for one, other in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), strict=True
    ):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


# Images -----------------------------------------------------------------------------


def random_codes(features, inputs, seed=0):
    shape = features, inputs // 8
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def nibbles(codes):
    """The two positions of every group, as the four bits that hardware reads."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(len(codes), -1)


def test_images_of_16_bits_are_what_the_instructions_read():
    codes = random_codes(128, 128)
    groups = nibbles(codes)
    image = np.asarray(images.encode(jnp.asarray(codes), 2)).view(np.uint32)
    assert image.shape == (2, 2, 128)
    for row in range(128):
        for group in range(32):
            # An instruction takes 64 outputs, 16 of each warp, and 32 inputs.
            warp, of_warp = divmod(row % 64, 16)
            instruction, of_instruction = divmod(group, 8)
            selector = instruction % 2
            quad, high = of_warp % 8, of_warp // 8
            thread = 32 * warp + 4 * quad + 2 * selector + of_instruction // 4
            word = image[row // 64, instruction // 2, thread]
            bit = 16 * high + 4 * (of_instruction % 4)
            assert int(word) >> bit & 15 == groups[row, group]


def test_images_of_8_bits_are_what_the_instructions_read():
    codes = random_codes(64, 128)
    groups = nibbles(codes)
    image = np.asarray(images.encode(jnp.asarray(codes), 1)).view(np.uint32)
    assert image.shape == (1, 2, 128)
    for row in range(64):
        for group in range(32):
            # An instruction takes 64 inputs; each thread has 32 of one output.
            warp, of_warp = divmod(row, 16)
            instruction, of_instruction = divmod(group, 16)
            quad, high = of_warp % 8, of_warp // 8
            thread = 32 * warp + 4 * quad + 2 * (of_instruction // 8) + high
            word = image[0, instruction, thread]
            assert int(word) >> 4 * (of_instruction % 8) & 15 == groups[row, group]


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_images_for_blackwell_are_those_of_pallas(dtype):
    codes = random_codes(256, 384)
    size = jnp.dtype(dtype).itemsize
    image = images.encode_blackwell(jnp.asarray(codes), size)
    assert image.shape == (2, 3, 128, 4)
    positions = packing.unpack_codes(jnp.asarray(codes), 2, 192)
    expected = plgpu.format_tcgen05_sparse_metadata(
        positions.reshape(256, 96, 2).astype(jnp.uint2), dtype
    )
    found = np.asarray(image).view(np.uint8)  # four positions each, the first lowest
    found = (found[..., None] >> np.arange(0, 8, 2) & 3).reshape(2, 3, 128, 64)
    np.testing.assert_array_equal(found, np.asarray(expected.astype(jnp.uint8)))


@given(
    stack=st.sampled_from([(), (2,), (2, 3)]),
    tiles=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.sampled_from([1, 2]),
    seed=st.integers(0, 99),
)
@settings(max_examples=5, deadline=None)
def test_images_are_undone(stack, tiles, size, seed):
    rng = np.random.default_rng(seed)
    for unit, *pair in (
        (64, images.encode, images.decode),
        (128, images.encode_blackwell, images.decode_blackwell),
    ):
        encode, decode = (jax.jit(f, static_argnums=1) for f in pair)
        shape = *stack, tiles[0] * unit, tiles[1] * unit // 8
        codes = jnp.asarray(rng.integers(0, 256, shape, dtype=np.uint8))
        image = encode(codes, size)
        assert image.dtype == jnp.int32 and image.size * 4 == codes.size
        assert_same(decode(image, size), codes)
        # Each layer of a stack by itself.
        if stack:
            assert_same(encode(codes[-1], size), image[-1])


def test_images_of_other_sizes_are_refused():
    codes = jnp.zeros((64, 12), jnp.uint8)
    with pytest.raises(
        ValueError, match="64 outputs and 96 inputs, .* multiples of 64"
    ):
        images.encode(codes, 2)
    with pytest.raises(ValueError, match=r"for Blackwell needs multiples of 128"):
        images.encode_blackwell(jnp.zeros((64, 16), jnp.uint8), 2)


# Round trips ------------------------------------------------------------------------


@jax.jit
def everything(small, weights, ready):
    """What arrays stand for; in one function, which compiles faster."""
    rows, kept = small.values.shape[-2:]
    return (
        (ready.canonical, ready.todense(), ready.place(weights)),
        (small, small.todense(), small.place(weights[..., :rows, :kept])),
    )


@given(
    target=st.sampled_from(TARGETS),
    kind=st.sampled_from(KINDS),
    outputs=st.sampled_from([1, 3, 64, 128, 130]),
    groups=st.sampled_from([1, 2, 3, 16, 32, 33]),
    layout=st.sampled_from(["matrix", "table", "convolution", "heads"]),
    stack=st.sampled_from([(), (2,)]),
)
@settings(max_examples=12, deadline=None)
def test_preparing_is_undone(target, kind, outputs, groups, layout, stack):
    inputs = 4 * groups
    shape, axis = {
        "matrix": ((inputs, outputs), -2),
        "table": ((outputs, inputs), -1),
        "convolution": ((2, 1, inputs, outputs), -2),
        "heads": ((inputs, outputs, 2), -3),
    }[layout]
    small = compress((*stack, *shape), kind, axis, len(stack))
    ready = jax.jit(nm.prepare, static_argnums=1)({"kernel": small}, target)["kernel"]
    assert isinstance(ready, formats.PreparedArray)
    rows, kept = small.values.shape[-2:]
    full = math.ceil(rows / 128) * 128, math.ceil(kept / 64) * 64
    assert ready.values.shape == (*stack, *full)
    values = np.asarray(ready.values).astype(np.float32)
    assert not values[..., rows:, :].any() and not values[..., kept:].any()
    assert (ready.scales is None) == (small.scales is None)
    assert ready.shape == small.shape and ready.dtype == small.dtype
    assert ready.stack_shape == stack and ready.target == target
    weights = np.random.default_rng(0).random(values.shape, np.float32)
    assert_same(*everything(small, jnp.asarray(weights), ready))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", [KINDS[0], KINDS[4]])
def test_positions_ascend_also_where_zeros_were_filled_up(target, kind):
    small = compress((12, 130), kind)
    ready = formats.PreparedArray.from_canonical(small, target)
    blackwell = target == "sm100"
    decode = images.decode_blackwell if blackwell else images.decode
    codes = decode(ready.image, small.dtype.itemsize)
    positions = np.asarray(packing.unpack_codes(codes, 2, 64)).reshape(256, 32, 2)
    assert (positions[..., 0] < positions[..., 1]).all()
    np.testing.assert_array_equal(
        positions[130:], np.broadcast_to([0, 1], (126, 32, 2))
    )
    np.testing.assert_array_equal(
        positions[:130, 3:], np.broadcast_to([0, 1], (130, 29, 2))
    )


@pytest.mark.parametrize("target", TARGETS)
def test_matrices_and_transposes_are_views(target):
    small = compress((3, 3, 8, 6))
    ready = formats.PreparedArray.from_canonical(small, target)
    assert_same(ready.matrix.todense(), small.todense().reshape(72, 6))
    assert_same(ready.matrix.transposed.todense(), small.todense().reshape(72, 6).T)
    assert ready.transposed is None
    table = formats.PreparedArray.from_canonical(compress((6, 8), axis=-1), target)
    assert table.matrix is None
    assert table.transposed.matrix.values is table.values


# Refusals ---------------------------------------------------------------------------


def test_what_tensor_cores_do_not_take_is_refused():
    small = compress((8, 4))
    wide = small.astype(jnp.float32)
    with pytest.raises(ValueError, match="for sm90: .* not float32: cast with small.a"):
        formats.PreparedArray.from_canonical(wide, "sm90")
    weights = jnp.where(nm.nm_mask(jnp.ones((8, 4)), 4, 8), 1, 0).astype(jnp.bfloat16)
    other = formats.NMArray.from_dense(weights, 4, 8)
    with pytest.raises(ValueError, match="take 2:4, not 4:8"):
        formats.PreparedArray.from_canonical(other, "sm80")
    blocks = formats.BlockArray.from_dense(jnp.ones((8, 4)), 2, 2)
    assert prepared.refusal(blocks, "sm100") == (
        "BlockArray has no layout for sparse tensor cores"
    )
    assert prepared.refusal(small, "sm100") == ""


def test_unknown_gpus_are_refused():
    small = compress((8, 4))
    with pytest.raises(ValueError, match="target='sm70' is none of sm80, sm90, sm100"):
        nm.prepare({"kernel": small}, "sm70")
    with pytest.raises(ValueError, match="target='sm70' is none of"):
        prepared.refusal(small, "sm70")
    with pytest.raises(RuntimeError, match="JAX runs on cpu, .* 'sm90'"):
        nm.prepare({"kernel": small})


def test_other_leaves_stay_what_they_are():
    mask = nm.fan_in_mask(jnp.ones((8, 4)), 3)
    params = {
        "bias": jnp.ones(4),
        "count": 3,
        "fan_in": formats.FanInArray.from_dense(jnp.where(mask, 1.0, 0.0)),
        "fine": compress((8, 4)).astype(jnp.float32),
        "kernel": compress((8, 4)),
    }
    ready = nm.prepare(params, "sm90")
    assert ready.keys() == params.keys()
    for name in ("bias", "count", "fan_in", "fine"):
        assert ready[name] is params[name]
    assert isinstance(ready["kernel"], formats.PreparedArray)
    again = nm.prepare(ready, "sm90")
    assert again["kernel"] is ready["kernel"]


# As pytrees -------------------------------------------------------------------------


@pytest.fixture(params=TARGETS)
def tree(request):
    params = {
        "kernel": compress((12, 6)),
        "layers": compress((3, 8, 6), KINDS[5], stacked=1),
        "bias": jnp.ones(6, jnp.bfloat16),
    }
    return nm.prepare(params, request.param)


def test_they_print_their_target(tree):
    target = tree["kernel"].target
    start = f"PreparedArray(2:4 along -2 for {target}, bfloat16[12, 6], 18,432 bytes"
    assert repr(tree["kernel"]).startswith(start)


def test_they_survive_pickling(tree):
    assert_same(pickle.loads(pickle.dumps(tree)), tree)


def test_stacks_of_layers_scan_and_vmap(tree):
    stack = tree["layers"]
    dense = stack.todense()
    assert dense.shape == (3, 8, 6)
    _, scanned = jax.lax.scan(lambda _, layer: (None, layer.todense()), None, stack)
    assert_same(scanned, dense)
    assert_same(jax.vmap(lambda layer: layer.todense())(stack), dense)


def test_they_are_arguments_of_exported_functions(tree):
    @jax.jit
    def apply(tree):
        return tree["layers"].canonical, tree["kernel"].todense() + tree["bias"]

    exported = export.export(apply, platforms=["cpu", "cuda", "tpu"])(tree)
    again = export.deserialize(exported.serialize())
    assert_same(again.call(tree), apply(tree))
