"""Metrics against NumPy, at sizes that fit and sizes that an int32 cannot count."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import nmjax as nm
from nmjax import metrics

SHAPES = [(), (1,), (7,), (32,), (3, 16), (48, 5), (2, 3, 64), (3, 3, 4, 16), (255, 33)]


def masks_of_shape(shape, seed, density=0.4):
    return np.random.default_rng(seed).random(shape) < density


@pytest.mark.parametrize("shape", SHAPES)
def test_metrics_of_one_array_match_numpy(shape):
    old, new = masks_of_shape(shape, 0), masks_of_shape(shape, 1)
    weights = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    changed = int(np.abs(new.astype(int) - old.astype(int)).sum())
    stayed = (old & new).sum() / old.sum() if old.any() else 1.0
    for wrap in (lambda f: f, jax.jit):
        assert int(wrap(metrics.sad)(old, new)) == changed
        for found, wanted in (
            (wrap(metrics.flip_rate)(old, new), changed / old.size),
            (wrap(metrics.overlap)(old, new), stayed),
            (wrap(metrics.density)(new), new.mean()),
        ):
            # One unit in the last place: XLA multiplies by the reciprocal.
            np.testing.assert_allclose(found, wanted, rtol=2e-7)
        np.testing.assert_allclose(
            wrap(metrics.kept_magnitude)(weights, new),
            np.abs(weights)[new].sum() / np.abs(weights).sum(),
            rtol=1e-5,
        )


@given(
    shape=st.lists(st.integers(1, 20), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 9),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_counts_are_exact_for_any_shape(shape, seed, density):
    old, new = masks_of_shape(shape, seed, density), masks_of_shape(shape, seed + 1)
    assert int(metrics.sad(old, new)) == (old != new).sum()
    assert float(metrics.density(old)) == np.float32(old.sum() / old.size)
    stayed = np.float32((old & new).sum()) / np.float32(max(1, old.sum()))
    assert float(metrics.overlap(old, new)) == (stayed if old.any() else 1.0)


def test_trees_give_totals_and_dense_leaves_do_not_count():
    old = {"a": masks_of_shape((4, 16), 0), "b": optax.MaskedNode()}
    new = {"a": masks_of_shape((4, 16), 1), "b": optax.MaskedNode()}
    old["c"], new["c"] = [np.ones(6, bool)], [np.zeros(6, bool)]
    flips = (old["a"] != new["a"]).sum() + 6
    kept = new["a"].sum()
    assert int(metrics.sad(old, new)) == flips
    assert float(metrics.flip_rate(old, new)) == np.float32(flips / 70)
    assert float(metrics.density(new)) == np.float32(kept / 70)
    stayed, before = (old["a"] & new["a"]).sum(), old["a"].sum() + 6
    assert float(metrics.overlap(old, new)) == np.float32(stayed) / np.float32(before)
    params = {"a": jnp.ones((4, 16)), "b": jnp.ones(30), "c": [jnp.full(6, -2.0)]}
    np.testing.assert_allclose(metrics.kept_magnitude(params, new), kept / 76)
    np.testing.assert_allclose(
        metrics.density_all(params, new), (kept + 30) / 100, rtol=1e-6
    )


def test_per_leaf_names_leaves_as_the_plan_does():
    params = {
        "net": [{"kernel": jnp.ones((8, 8)), "bias": jnp.ones(8)}],
        "out": {"kernel": jnp.ones((8, 16))},
    }
    plan = nm.plan(params, {r"kernel": nm.NM(1, 4)})
    masks = nm.compute_masks(params, plan)
    found = metrics.per_leaf(metrics.density, masks)
    assert list(found) == [leaf.path for leaf in plan.sparse_leaves]
    assert {float(value) for value in found.values()} == {0.25}
    kept = metrics.per_leaf(metrics.kept_magnitude, params, masks)
    assert list(kept) == list(found)
    assert {float(value) for value in kept.values()} == {0.25}


@pytest.mark.parametrize("limit", [1, 5, 60, 10**4])
def test_counts_beyond_the_limit_of_an_integer_stay_exact(limit, monkeypatch):
    masks = {"a": masks_of_shape((3, 16, 20), 3), "b": masks_of_shape((7, 32), 4)}
    kept = masks["a"].sum() + masks["b"].sum()
    monkeypatch.setattr(metrics, "INT32_MAX", limit)
    parts = metrics._count(masks["a"])
    assert parts.size == {1: 60, 5: 60, 60: 3, 10**4: 1}[limit]
    assert int(parts.sum()) == masks["a"].sum()
    assert float(metrics.density(masks)) == np.float32(kept / 1184)


def test_limbs_add_up_to_more_than_an_int32():
    parts = [jnp.array([2**31 - 1, 2**31 - 7], jnp.int32), jnp.array(2**30, jnp.int32)]
    total = 2 * 2**31 - 8 + 2**30
    size = 3 * 2**31
    assert float(metrics._divide(parts, size)) == np.float32(total / size)
    assert float(metrics.add_counts(parts)) == np.float32(total)
    many = jax.ShapeDtypeStruct((2**23 + 1,), jnp.int32)
    with pytest.raises(ValueError, match=r"8388609 partial counts are too many"):
        jax.eval_shape(lambda part: metrics.add_counts([part]), many)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_explored_positions_are_the_union_of_all_masks(wrap):
    masks = [
        {"a": masks_of_shape((4, 8), seed, 0.2), "b": optax.MaskedNode()}
        for seed in range(4)
    ]
    explored = masks[0]
    for i, new in enumerate(masks):
        explored = wrap(metrics.explore)(explored, new)
        union = np.any([mask["a"] for mask in masks[: i + 1]], axis=0)
        np.testing.assert_array_equal(explored["a"], union)
        assert explored["b"] == optax.MaskedNode()
        assert float(metrics.density(explored)) == np.float32(union.mean())
    assert union.sum() > masks[3]["a"].sum()


def test_huge_masks_trace_without_overflow():
    # Only traced: 19 thousand million weights, the stacked layers of a 70 B model.
    shape = (80, 8192, 28672)
    mask = jax.ShapeDtypeStruct(shape, jnp.bool_)
    weights = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    for metric, arguments in (
        (metrics.density, (mask,)),
        (metrics.flip_rate, (mask, mask)),
        (metrics.overlap, (mask, mask)),
        (metrics.kept_magnitude, (weights, mask)),
        (metrics.density_all, (weights, mask)),
    ):
        out = jax.eval_shape(metric, *arguments)
        assert (out.shape, out.dtype) == ((), jnp.float32)
    with pytest.raises(ValueError, match=r"18790481920 entries.*2147483647.*flip_rate"):
        jax.eval_shape(metrics.sad, mask, mask)
    endless = jax.ShapeDtypeStruct((2**20, 2**20), jnp.bool_)
    with pytest.raises(ValueError, match=r"1099511627776 entries.*too large"):
        jax.eval_shape(metrics.density, endless)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_kept_magnitude_accumulates_in_float32(dtype):
    # In 16 bits the sums would stop growing at 256 (bfloat16) or 2048 (float16).
    weights = jnp.ones((64, 256), dtype)
    mask = jnp.arange(256) % 4 == 0
    out = metrics.kept_magnitude(weights, jnp.broadcast_to(mask, weights.shape))
    assert (float(out), out.dtype) == (0.25, jnp.float32)


def test_kept_magnitude_of_zeros_is_one_and_bad_values_show():
    mask = jnp.array([True, False])
    assert float(metrics.kept_magnitude(jnp.zeros(2), mask)) == 1.0
    assert np.isnan(metrics.kept_magnitude(jnp.array([1.0, jnp.nan]), mask))
    assert np.isnan(metrics.kept_magnitude(jnp.array([jnp.inf, 1.0]), mask))
    # A dropped infinity does not turn into inf * 0: all magnitude is in it.
    assert float(metrics.kept_magnitude(jnp.array([1.0, jnp.inf]), mask)) == 0.0


def test_metrics_map_over_seeds():
    old = jnp.asarray(masks_of_shape((3, 8, 16), 0))
    new = jnp.asarray(masks_of_shape((3, 8, 16), 1))
    each = [int(metrics.sad(a, b)) for a, b in zip(old, new, strict=True)]
    assert jax.vmap(metrics.sad)(old, new).tolist() == each
    np.testing.assert_array_equal(
        jax.vmap(metrics.density)(new), np.asarray(new).mean((1, 2), dtype=np.float32)
    )


@pytest.mark.parametrize("spec", [("x", None), (None, "x"), (("x", "y"), None)])
def test_metrics_trace_on_an_explicit_mesh(spec):
    mesh = jax.make_mesh(
        (1, 1), ("x", "y"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    old, new = masks_of_shape((16, 32), 0), masks_of_shape((16, 32), 1)
    with jax.set_mesh(mesh):
        sharding = jax.NamedSharding(mesh, jax.P(*spec))
        a, b = (jax.device_put(mask, sharding) for mask in (old, new))
        weights = jax.device_put(np.ones((16, 32), np.float32), sharding)
        assert int(jax.jit(metrics.sad)(a, b)) == (old != new).sum()
        kept = jax.jit(metrics.kept_magnitude)(weights, b)
    np.testing.assert_allclose(kept, new.mean(), rtol=1e-6)


@pytest.mark.parametrize("rows, shards, split", [(32, 2, 0), (48, 2, 1), (48, 3, 0)])
def test_only_axes_that_split_between_shards_are_split(
    rows, shards, split, monkeypatch
):
    mask = jnp.ones((rows, 16), bool)
    monkeypatch.setattr(
        metrics, "count_shards", lambda _, axis: shards if axis == 0 else 1
    )
    expected = (rows // 16, 16) if split == 0 else (rows, 1)
    assert metrics._add_bytes(mask).shape == expected


def test_masks_of_other_types_are_refused():
    ones = jnp.ones((2, 2))
    good = jnp.ones((2, 2), bool)
    for call in (
        lambda: metrics.density({"w": ones}),
        lambda: metrics.sad({"w": good}, {"w": ones}),
        lambda: metrics.flip_rate({"w": ones}, {"w": good}),
        lambda: metrics.overlap({"w": good}, {"w": ones}),
        lambda: metrics.explore({"w": ones}, {"w": good}),
        lambda: metrics.kept_magnitude({"w": ones}, {"w": ones}),
        lambda: metrics.density_all({"w": ones}, {"w": ones}),
    ):
        with pytest.raises(TypeError, match=r"mask of leaf 'w' has dtype float32"):
            call()
    with pytest.raises(TypeError, match=r"mask of the array has dtype float32"):
        metrics.density(ones)
    with pytest.raises(TypeError, match=r"leaf 'w' has dtype int32, must be floating"):
        metrics.kept_magnitude({"w": jnp.ones((2, 2), int)}, {"w": good})


def test_trees_that_do_not_fit_are_refused():
    a, b = jnp.ones(4, bool), jnp.ones(5, bool)
    with pytest.raises(ValueError, match=r"'v' is in new but not in old"):
        metrics.sad({"w": a}, {"w": a, "v": a})
    with pytest.raises(ValueError, match=r"'v' is in new but not in old"):
        metrics.explore({"w": a}, {"w": a, "v": a})
    with pytest.raises(ValueError, match=r"'w' has shape \(5,\) in new but \(4,\) in"):
        metrics.overlap({"w": a}, {"w": b})
    with pytest.raises(ValueError, match=r"'v' is in old but not in new"):
        metrics.flip_rate({"w": a, "v": a}, {"w": a, "v": optax.MaskedNode()})
    with pytest.raises(ValueError, match=r"'w' has shape \(5,\) in new but \(4,\) in"):
        metrics.sad({"w": a}, {"w": b})
    with pytest.raises(ValueError, match=r"'w' is in masks but not in params"):
        metrics.kept_magnitude({"v": jnp.ones(4)}, {"w": a})
    with pytest.raises(ValueError, match=r"'w' is in tree 1 but not in tree 0"):
        metrics.per_leaf(metrics.sad, {"v": a}, {"w": a})


def test_masks_without_entries_are_refused():
    with pytest.raises(ValueError, match=r"masks has no array"):
        metrics.density({"w": optax.MaskedNode()})
    with pytest.raises(ValueError, match=r"no entries"):
        metrics.density(jnp.ones((0, 4), bool))
