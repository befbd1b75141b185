"""Every mask against its NumPy loop, eager and under transformations."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import oracles
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import nmjax as nm
from nmjax.masking.ordering import order_keys

DTYPES = ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"]
SPECIAL = [np.nan, -np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0, -1.0, 2.0, 1e-40, -1e-40]


def draw_scores(draw, shape, dtype=None) -> np.ndarray:
    """Scores with many ties, signs, zeros, infinities and NaNs, or random ones."""
    seed = draw(st.integers(0, 2**16))
    dtype = np.dtype(dtype or draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(seed)
    if draw(st.booleans()):
        scores = rng.choice(np.array(SPECIAL), shape)
    else:
        scores = rng.normal(size=shape)
    with np.errstate(over="ignore", invalid="ignore"):
        return scores.astype(dtype)


def random(*shape, seed=0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def check(mask, expected):
    assert mask.dtype == bool
    np.testing.assert_array_equal(np.asarray(mask), expected)


# Order


@pytest.mark.parametrize("dtype", DTYPES)
def test_keys_have_the_order_of_scores(dtype):
    finite = [-np.inf, -2.0, -1.0, -0.0, 0.0, 1.0, 2.0, np.inf, np.nan]
    scores = np.array(finite, np.float32).astype(dtype)
    keys = np.asarray(order_keys(scores), np.int64)
    ranked = [oracles.order(s) for s in scores]
    for i, j in np.ndindex(len(keys), len(keys)):
        assert (keys[i] < keys[j]) == (ranked[i] > ranked[j])


@pytest.mark.parametrize(
    "dtype", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"]
)
def test_every_8_bit_float_is_ordered_exactly(dtype):
    scores = np.arange(256, dtype=np.uint8).view(np.dtype(dtype))
    keys = np.asarray(order_keys(scores), np.int64)
    expected = np.unique([oracles.order(s) for s in scores], axis=0)[::-1]
    places = {tuple(e): i for i, e in enumerate(expected)}
    wanted = np.array([places[oracles.order(s)] for s in scores])
    _, found = np.unique(keys, return_inverse=True)
    np.testing.assert_array_equal(found, wanted)


def test_every_bfloat16_is_ordered_exactly():
    scores = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16)
    keys = np.asarray(order_keys(scores), np.int64)
    with np.errstate(invalid="ignore"):  # signalling NaNs are among them
        wide = scores.astype(np.float64)
    finite = ~np.isnan(wide)
    _, expected = np.unique(wide[finite], return_inverse=True)
    _, found = np.unique(keys[finite], return_inverse=True)
    np.testing.assert_array_equal(found, expected)
    assert len(set(keys[~finite])) == 1
    assert keys[~finite].min() > keys[finite].max()


def test_nan_of_either_sign_ranks_above_infinity():
    nan = np.array([0x7F800001, 0x7FC00000, 0xFF800001, 0xFFFFFFFF], np.uint32)
    scores = np.append(np.full(4, np.inf, np.float32), nan.view(np.float32))
    check(nm.nm_mask(scores, 4, 8, axis=0), np.arange(8) >= 4)
    check(nm.topk_mask(scores, 2), np.isin(np.arange(8), [4, 5]))


def test_negative_scores_keep_the_highest():
    scores = jnp.array([-3.0, -1.0, -2.0, -4.0])
    check(nm.nm_mask(scores, 2, 4, axis=0), [False, True, True, False])
    check(nm.topk_mask(scores, 1), [False, True, False, False])


def test_float64_scores_are_told_apart_below_float32():
    with jax.enable_x64(True):
        scores = 1 + jnp.arange(8, dtype=jnp.float64) * 2.0**-50
        check(nm.nm_mask(scores, 1, 4, axis=0), np.arange(8) % 4 == 3)
        check(nm.topk_mask(scores, 3), np.arange(8) > 4)
        check(nm.topk_mask(-scores, 3), np.arange(8) < 3)


# N:M


GROUPS = [
    (1, 2, (2, 4, 3), 1),
    (2, 4, (8, 3), -2),
    (3, 4, (2, 8), -1),
    (1, 4, (8,), 0),
    (5, 8, (2, 8, 2), 1),
    (4, 16, (32, 2), 0),
]


@given(st.data())
def test_nm_mask_is_the_oracle(data):
    n, m, shape, axis = data.draw(st.sampled_from(GROUPS))
    scores = draw_scores(data.draw, shape, data.draw(st.sampled_from(DTYPES[:2])))
    check(nm.nm_mask(scores, n, m, axis), oracles.nm_mask(scores, n, m, axis))


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 9, 12, 16, 17, 64])
def test_every_group_size_is_exact_with_ties(m):
    scores = jnp.round(random(2 * m, 3, seed=m) * 2)
    for n in sorted({1, (m + 1) // 2, m}):
        check(nm.nm_mask(scores, n, m), oracles.nm_mask(scores, n, m))


def test_ties_keep_lowest_index():
    for m in (4, 16, 32):
        mask = nm.nm_mask(jnp.zeros((2 * m, 1)), m // 2, m)
        check(mask[:, 0], np.arange(2 * m) % m < m // 2)


def test_default_axis_is_the_fan_in():
    scores = random(8, 4)
    check(nm.nm_mask(scores, 2, 4), oracles.nm_mask(scores, 2, 4, 0))
    kernel = random(3, 3, 8, 4)
    check(nm.nm_mask(kernel, 2, 4), oracles.nm_mask(kernel, 2, 4, 2))


@given(st.data())
@settings(max_examples=10)
def test_vnm_mask_is_the_oracle(data):
    v, n, m = data.draw(st.sampled_from([(2, 2, 8), (4, 1, 5), (1, 3, 4), (8, 2, 16)]))
    axis, vector_axis = (0, 1) if m > 5 else (1, 0)
    shape = [0, 0]
    shape[axis], shape[vector_axis] = 2 * m, 2 * v
    # Sums of small integers are exact in any order.
    seed = data.draw(st.integers(0, 99))
    scores = np.random.default_rng(seed).integers(-4, 5, shape).astype(np.float32)
    mask = nm.vnm_mask(scores, v, n, m, axis, vector_axis)
    check(mask, oracles.vnm_mask(scores, v, n, m, axis, vector_axis))


def test_vnm_mask_keeps_n_of_m_in_batched_kernels():
    scores = random(2, 16, 4)
    check(nm.vnm_mask(scores, 4, 2, 8), oracles.vnm_mask(scores, 4, 2, 8))


# Top-k


SLICES = [
    ((7,), None),
    ((4, 6), None),
    ((4, 6), 0),
    ((4, 6), -1),
    ((2, 3, 5), (0, 1)),
    ((2, 3, 5), (-1, 0)),
    ((2, 3, 5), -2),
]


@given(st.data())
def test_topk_mask_is_the_oracle(data):
    shape, axis = data.draw(st.sampled_from(SLICES))
    along = range(len(shape)) if axis is None else np.atleast_1d(axis)
    size = int(np.prod([shape[a] for a in along]))
    k = data.draw(st.integers(0, size))
    scores = draw_scores(data.draw, shape, data.draw(st.sampled_from(DTYPES[:2])))
    check(nm.topk_mask(scores, k, axis), oracles.topk_mask(scores, k, axis))


@pytest.mark.parametrize(
    "dtype, axis", [(dtype, None) for dtype in DTYPES] + [("float16", 0)]
)
def test_topk_mask_is_exact_for_a_traced_k(dtype, axis):
    with np.errstate(over="ignore", invalid="ignore"):
        scores = np.random.default_rng(0).choice(SPECIAL, (6, 8)).astype(dtype)
    masked = jax.jit(lambda scores, k: nm.topk_mask(scores, k, axis))
    size = scores.size if axis is None else scores.shape[axis]
    for k in (0, 1, size // 2, size - 1, size):
        check(masked(scores, jnp.int32(k)), oracles.topk_mask(scores, k, axis))


@pytest.mark.parametrize("shape", [(2048, 34), (34, 2048), (33, 31, 5), (70_001,)])
def test_topk_mask_counts_exactly_in_larger_arrays(shape):
    """Sizes that do and do not divide into the parts that are counted together."""
    scores = random(*shape)
    for dtype, k in (("float32", 1000), ("bfloat16", scores.size - 77)):
        values = np.asarray(scores.astype(dtype), np.float32)
        expected = np.zeros(values.size, bool)
        expected[np.argsort(-values.ravel(), kind="stable")[:k]] = True
        check(nm.topk_mask(scores.astype(dtype), k), expected.reshape(shape))
    if len(shape) == 2:
        for axis in (0, 1):
            rank = np.argsort(-np.asarray(scores), axis, kind="stable")
            expected = np.zeros(shape, bool)
            first = np.take(rank, range(5), axis)
            np.put_along_axis(expected, first, True, axis)
            check(nm.topk_mask(scores, 5, axis), expected)


def test_traced_k_out_of_range_acts_like_the_nearest_bound():
    masked = jax.jit(nm.topk_mask)
    scores = jnp.array([1.0, jnp.nan, -jnp.inf, 1.0])
    assert not masked(scores, jnp.int32(-3)).any()
    assert masked(scores, jnp.int32(9)).all()


def test_topk_ties_keep_lowest_row_major_index():
    check(nm.topk_mask(jnp.ones((3, 4)), 5).ravel(), np.arange(12) < 5)
    check(nm.topk_mask(jnp.ones((3, 4)), 2, axis=0), np.indices((3, 4))[0] < 2)


def test_topk_mask_of_a_scalar():
    assert nm.topk_mask(jnp.float32(2.0), 1)
    assert not nm.topk_mask(jnp.float32(2.0), 0)


@given(st.data())
@settings(max_examples=15)
def test_global_topk_mask_is_the_oracle(data):
    # Mixed dtypes are compared exactly, in float32.
    kinds = [((3, 4), "float32"), ((5,), "bfloat16"), ((), "float16")]
    leaves = [draw_scores(data.draw, *kind) for kind in kinds]
    k = data.draw(st.integers(0, sum(leaf.size for leaf in leaves)))
    masks = nm.global_topk_mask(leaves, k)
    for mask, expected in zip(masks, oracles.global_topk_mask(leaves, k), strict=True):
        check(mask, expected)


def test_global_topk_mask_passes_masked_leaves_through():
    tree = {"a": optax.MaskedNode(), "b": {"c": jnp.array([1.0, 3.0, 2.0])}}
    masks = jax.jit(nm.global_topk_mask)(tree, jnp.int32(2))
    assert masks["a"] == optax.MaskedNode()
    check(masks["b"]["c"], [False, True, True])
    assert nm.global_topk_mask({"a": optax.MaskedNode()}, 0)["a"] == optax.MaskedNode()


def test_global_ties_keep_the_first_leaf():
    masks = nm.global_topk_mask([jnp.ones(3), jnp.ones(3)], 4)
    check(jnp.concatenate(masks), np.arange(6) < 4)


def test_fan_in_mask_keeps_k_per_neuron():
    kernel = random(3, 3, 4, 5)
    check(nm.fan_in_mask(kernel, 7), oracles.topk_mask(kernel, 7, (0, 1, 2)))
    heads = random(6, 2, 4)
    mask = nm.fan_in_mask(heads, 2, neuron_axes=(1, 2))
    check(mask, oracles.topk_mask(heads, 2, 0))


# Blocks and channels


@given(st.data())
@settings(max_examples=15)
def test_block_mask_is_the_oracle(data):
    kinds = [((4, 1), ()), ((1, 4), ()), ((2, 1), (0,)), ((4, 8), ()), ((1, 1), (0,))]
    block, batch = data.draw(st.sampled_from(kinds))
    seed = data.draw(st.integers(0, 99))
    scores = np.random.default_rng(seed).integers(-4, 5, (2, 8, 8)).astype(np.float32)
    blocks = 64 * (1 if batch else 2) // (block[0] * block[1])
    k = data.draw(st.integers(0, blocks))
    mask = nm.block_mask(scores, k, block, batch_axes=batch)
    check(mask, oracles.block_mask(scores, k, block, batch_axes=batch))


def test_block_mask_takes_any_axes():
    scores = jnp.round(random(4, 3, 6) * 4)
    mask = nm.block_mask(scores, 5, (2, 3), axes=(2, 1))
    check(mask, oracles.block_mask(scores, 5, (2, 3), axes=(2, 1)))


def test_block_sums_are_float32_for_bfloat16_scores():
    # In bfloat16, 256 + 1 + 1 + 1 is 256, and the tie would keep the first block.
    scores = jnp.array([256.0, 1, 0, 0, 256, 1, 1, 1], jnp.bfloat16)
    mask = nm.block_mask(scores, 1, (4,), axes=(0,))
    check(mask, np.arange(8) >= 4)


@pytest.mark.parametrize("axis, batch", [(-1, ()), (0, ()), (1, (0,)), (-1, (0, 1))])
def test_channel_mask_is_the_oracle(axis, batch):
    scores = jnp.round(random(2, 3, 4) * 4)
    for k in range(scores.shape[axis] + 1):
        mask = nm.channel_mask(scores, k, axis, batch)
        check(mask, oracles.channel_mask(scores, k, axis, batch))


# Transposable


@given(st.data())
def test_transposable_masks_of_4_are_the_best_pattern(data):
    n = data.draw(st.sampled_from([1, 2, 2, 3]))
    dtype = data.draw(st.sampled_from(DTYPES[:2]))
    # Sums of integers are exact, so the best sum must be met, not approached.
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    scores = rng.integers(-100, 100, (8, 12)).astype(dtype)
    mask = np.asarray(nm.transposable_nm_mask(scores, n, 4))
    blocks = mask.reshape(2, 4, 3, 4).swapaxes(1, 2)
    values = scores.astype(np.float64).reshape(2, 4, 3, 4).swapaxes(1, 2)
    for i, j in np.ndindex(2, 3):
        assert (blocks[i, j].sum(0) == n).all() and (blocks[i, j].sum(1) == n).all()
        kept = values[i, j][blocks[i, j]].sum()
        assert kept == oracles.best_transposable_sum(values[i, j], n)


# The share of the best sum that is lost, a little above what the docstring says.
@pytest.mark.parametrize("n, m, loss", [(1, 2, 0), (4, 8, 0.005), (2, 8, 0.012)])
def test_general_transposable_masks_lose_little(n, m, loss):
    blocks = np.abs(np.random.default_rng(0).normal(size=(40, m, m)))
    blocks = blocks.astype(np.float32)
    kept = blocks[np.asarray(nm.transposable_nm_mask(blocks, n, m))].sum()
    best = sum(oracles.best_transposable_sum_by_flow(block, n) for block in blocks)
    assert (1 - loss) * best - 1e-3 <= kept <= best + 1e-3


@pytest.mark.parametrize(
    "n, m", [(1, 1), (1, 2), (1, 4), (3, 4), (2, 5), (4, 8), (1, 8), (8, 16), (3, 32)]
)
def test_transposable_counts_are_exact_in_rows_and_columns(n, m):
    scores = np.random.default_rng(m).choice(np.array(SPECIAL), (2, 2 * m, m))
    for values in (scores.astype(np.float32), random(2, 2 * m, m)):
        mask = np.asarray(nm.transposable_nm_mask(values, n, m)).reshape(4, m, m)
        assert (mask.sum(1) == n).all() and (mask.sum(2) == n).all()


def test_transposable_mask_keeps_infinity_and_nan():
    scores = jnp.ones((8, 8)).at[1, 2].set(jnp.nan).at[5, 5].set(jnp.inf)
    scores = scores.at[6, 1].set(3e38).at[7, 1].set(3e38)
    for n, m in ((2, 4), (1, 4), (4, 8)):
        mask = nm.transposable_nm_mask(scores, n, m)
        assert mask[1, 2] and mask[5, 5] and (n == 1 or (mask[6, 1] and mask[7, 1]))


@pytest.mark.parametrize("axes", [(0, 1), (1, 0), (-1, 0), (2, 1)])
def test_transposable_blocks_extend_along_any_axes(axes):
    scores = random(8, 4, 8)
    mask = nm.transposable_nm_mask(scores, 2, 4, axes)
    moved = nm.transposable_nm_mask(jnp.moveaxis(scores, axes, (0, 1)), 2, 4, (0, 1))
    check(jnp.moveaxis(mask, axes, (0, 1)), np.asarray(moved))


# Transformations

FUNCTIONS = {
    "nm": lambda s: nm.nm_mask(s, 2, 4),
    "nm of 16": lambda s: nm.nm_mask(s, 4, 16, axis=-1),
    "nm of 32": lambda s: nm.nm_mask(s, 4, 32, axis=-1),
    "vnm": lambda s: nm.vnm_mask(s, 4, 2, 8),
    "transposable": lambda s: nm.transposable_nm_mask(s, 2, 4),
    "transposable of 8": lambda s: nm.transposable_nm_mask(s, 4, 8),
    "top-k": lambda s: nm.topk_mask(s, 100),
    "fan-in": lambda s: nm.fan_in_mask(s, 5),
    "global": lambda s: nm.global_topk_mask({"a": s, "b": s}, 77)["b"],
    "block": lambda s: nm.block_mask(s, 9, (4, 1)),
    "channel": lambda s: nm.channel_mask(s, 9),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_jit_vmap_and_export_agree_with_eager(name):
    function = FUNCTIONS[name]
    scores = jnp.round(random(2, 16, 32) * 4)
    expected = np.stack([np.asarray(function(s)) for s in scores])
    check(jax.jit(jax.vmap(function))(scores), expected)
    shape = jax.ShapeDtypeStruct(scores.shape[1:], scores.dtype)
    exported = jax.export.export(jax.jit(function))(shape)
    check(exported.call(scores[0]), expected[0])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_gradients_flow_around_the_mask(name):
    def kept(weights):
        return jnp.where(FUNCTIONS[name](jnp.abs(weights)), weights, 0.0).sum()

    weights = random(16, 32)
    mask = FUNCTIONS[name](jnp.abs(weights))
    gradient = jax.grad(kept)(weights)
    np.testing.assert_array_equal(gradient, np.asarray(mask, np.float32))


def test_empty_arrays_have_empty_masks():
    for shape in ((0, 4), (4, 0), (0, 0)):
        scores = jnp.zeros(shape)
        assert nm.nm_mask(scores, 2, 4).shape == shape
        assert nm.vnm_mask(scores, 2, 2, 4).shape == shape
        assert nm.transposable_nm_mask(scores, 2, 4).shape == shape
        assert nm.transposable_nm_mask(scores, 1, 4).shape == shape
        assert nm.topk_mask(scores, 0).shape == shape
        assert nm.topk_mask(scores, 0, axis=1).shape == shape
        assert nm.topk_mask(scores, 0, axis=0).shape == shape
        assert nm.block_mask(scores, 0, (2, 1)).shape == shape
        assert nm.channel_mask(scores, 0).shape == shape
        assert nm.global_topk_mask([scores], 0)[0].shape == shape


def test_slices_with_and_without_ties_are_chosen_together():
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(600, 6)).astype(np.float32)
    scores[:, 1], scores[:, 3] = 1.0, np.round(scores[:, 3])  # ties over many indices
    scores[300:, 4] = 2.0
    for k in (0, 1, 299, 420, 600):
        mask = np.asarray(nm.topk_mask(jnp.asarray(scores), k, axis=0))
        order = np.argsort(-scores, axis=0, kind="stable")
        expected = np.zeros(scores.shape, bool)
        np.put_along_axis(expected, order[:k], True, axis=0)
        np.testing.assert_array_equal(mask, expected)
