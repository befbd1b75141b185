"""compute_masks, apply_masks, project and sparsify."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import nmjax as nm


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "a": {
            "kernel": jax.random.normal(keys[0], (8, 16)),
            "bias": jax.random.normal(keys[1], (16,)),
        },
        "b": {"kernel": jax.random.normal(keys[2], (16, 8))},
    }


@pytest.fixture
def plan(params):
    return nm.plan(params, nm.NM(2, 4))


def test_masks_have_the_structure_of_params(params, plan):
    masks = nm.compute_masks(params, plan)
    assert masks["a"]["bias"] == optax.MaskedNode()
    for layer in ("a", "b"):
        groups = np.asarray(masks[layer]["kernel"]).reshape(
            -1, 4, params[layer]["kernel"].shape[1]
        )
        assert (groups.sum(1) == 2).all()


def test_given_scores_decide(params, plan):
    scores = jax.tree.map(lambda p: -jnp.abs(p), params)
    masks = nm.compute_masks(params, plan, scores)
    best = nm.compute_masks(params, plan)
    assert (masks["a"]["kernel"] == ~best["a"]["kernel"]).all()


def test_scores_may_leave_out_dense_leaves(params, plan):
    scores = {
        "a": {"kernel": jnp.abs(params["a"]["kernel"]), "bias": optax.MaskedNode()},
        "b": {"kernel": jnp.abs(params["b"]["kernel"])},
    }
    masks = nm.compute_masks(params, plan, scores)
    assert (masks["b"]["kernel"] == nm.compute_masks(params, plan)["b"]["kernel"]).all()
    scores["a"]["kernel"] = optax.MaskedNode()
    with pytest.raises(
        ValueError, match=r"'a/kernel' of shape \(8, 16\) has no scores"
    ):
        nm.compute_masks(params, plan, scores)


def test_global_density_shares_one_budget(params):
    plan = nm.plan(params, nm.Unstructured(), density=nm.global_(0.25))
    scaled = {**params, "b": {"kernel": params["b"]["kernel"] * 100.0}}
    masks = nm.compute_masks(scaled, plan)
    kept = int(masks["a"]["kernel"].sum()), int(masks["b"]["kernel"].sum())
    assert sum(kept) == plan.count == 64
    assert kept[1] > kept[0]


def test_project_is_exact_and_keeps_dtype(params, plan):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    small = nm.project(half, plan)
    assert small["a"]["kernel"].dtype == jnp.bfloat16
    mask = nm.compute_masks(half, plan)["a"]["kernel"]
    assert (small["a"]["kernel"][~mask] == 0).all()
    assert (small["a"]["kernel"][mask] == half["a"]["kernel"][mask]).all()
    assert (small["a"]["bias"] == half["a"]["bias"]).all()


def test_dropped_inf_and_nan_leave_no_trace():
    weights = {"w": jnp.array([jnp.inf, jnp.nan, 1.0])}
    masks = {"w": jnp.array([False, False, True])}
    assert nm.apply_masks(weights, masks)["w"].tolist() == [0.0, 0.0, 1.0]


def test_sparsify_passes_the_gradient_straight_through(params, plan):
    def loss(p):
        return sum(jnp.sum(x**2) for x in jax.tree.leaves(nm.sparsify(p, plan)))

    small = nm.project(params, plan)
    grads = jax.jit(jax.grad(loss))(params)
    for layer in ("a", "b"):
        np.testing.assert_array_equal(
            grads[layer]["kernel"], 2 * small[layer]["kernel"]
        )
    ones = jax.grad(lambda p: nm.sparsify(p, plan)["a"]["kernel"].sum())(params)
    assert (ones["a"]["kernel"] == 1).all()


def test_sparsify_supports_forward_mode_and_remat(params, plan):
    tangent = jax.tree.map(jnp.ones_like, params)
    out, dot = jax.jvp(lambda p: nm.sparsify(p, plan), (params,), (tangent,))
    assert (dot["a"]["kernel"] == 1).all()
    assert (out["a"]["kernel"] == nm.project(params, plan)["a"]["kernel"]).all()

    def loss(p):
        return jnp.sum(jnp.sin(nm.sparsify(p, plan)["b"]["kernel"]))

    expected, found = jax.grad(loss)(params), jax.grad(jax.checkpoint(loss))(params)
    np.testing.assert_array_equal(found["b"]["kernel"], expected["b"]["kernel"])


def test_inactive_sparsify_is_dense(params, plan):
    @jax.jit
    def forward(p, active):
        return nm.sparsify(p, plan, active=active)["a"]["kernel"]

    assert (forward(params, False) == params["a"]["kernel"]).all()
    assert (forward(params, True) == nm.project(params, plan)["a"]["kernel"]).all()
    assert (nm.sparsify(params, plan, active=False)["b"]["kernel"] != 0).all()


def test_sparsify_takes_masks(params, plan):
    masks = nm.compute_masks(params, plan)
    by_masks, by_plan = nm.sparsify(params, masks), nm.sparsify(params, plan)
    assert (by_masks["a"]["kernel"] == by_plan["a"]["kernel"]).all()


def test_vmap_over_seeds_equals_a_loop(plan):
    def masks_of(key):
        first, second = jax.random.split(key)
        kernels = {
            "a": {"kernel": jax.random.normal(first, (8, 16)), "bias": jnp.ones(16)},
            "b": {"kernel": jax.random.normal(second, (16, 8))},
        }
        return nm.compute_masks(kernels, plan)["b"]["kernel"]

    keys = jax.random.split(jax.random.key(1), 3)
    loop = jnp.stack([masks_of(key) for key in keys])
    assert (jax.vmap(masks_of)(keys) == loop).all()


def test_masked_leaves_pass_through(params, plan):
    partial = {"a": params["a"], "b": optax.MaskedNode()}
    small = nm.sparsify(partial, plan)
    assert small["b"] == optax.MaskedNode()
    assert (small["a"]["kernel"] == nm.project(params, plan)["a"]["kernel"]).all()


def test_a_plan_of_another_model_is_refused(params, plan):
    with pytest.raises(ValueError, match="leaf 'c/kernel' is not in the plan"):
        nm.project({**params, "c": {"kernel": jnp.ones((4, 8))}}, plan)
    with pytest.raises(ValueError, match="knows a leaf 'b/kernel' that these params"):
        nm.project({"a": params["a"]}, plan)
    with pytest.raises(ValueError, match=r"'b/kernel' has shape \(4, 8\).*\(16, 8\)"):
        nm.project({**params, "b": {"kernel": jnp.ones((4, 8))}}, plan)


def test_a_tree_one_level_off_is_explained(params, plan):
    with pytest.raises(ValueError, match="made for a tree inside these"):
        nm.project({"params": params}, plan)
    outer = nm.plan({"params": params}, nm.NM(2, 4))
    with pytest.raises(ValueError, match="made for the tree around these"):
        nm.project(params, outer)


def test_bad_masks_are_refused(params):
    masks = nm.compute_masks(params, nm.plan(params, nm.NM(2, 4)))
    with pytest.raises(TypeError, match="'b/kernel' has dtype float32, must be bool"):
        nm.apply_masks(params, {**masks, "b": {"kernel": jnp.ones((16, 8))}})
    with pytest.raises(ValueError, match=r"'b/kernel' has shape \(8, 8\)"):
        nm.apply_masks(params, {**masks, "b": {"kernel": jnp.ones((8, 8), bool)}})
    with pytest.raises(ValueError, match="'b/kernel' of the params is missing"):
        nm.apply_masks(params, {"a": masks["a"]})
    with pytest.raises(ValueError, match="'c' has no counterpart"):
        nm.apply_masks(params, {**masks, "c": jnp.ones(3, bool)})


def limited_counts(scores, budget, least, most):
    """Give every leaf its best, one weight at a time, within its limits."""
    order = sorted(
        ((-score, path, i) for path, s in scores.items() for i, score in enumerate(s)),
    )
    counts = dict(least)
    taken = {path: 0 for path in scores}
    for path in scores:  # the best of each leaf are its own in any case
        taken[path] = least[path]
    left = budget - sum(least.values())
    rank = {path: 0 for path in scores}
    for _, path, _ in order:
        rank[path] += 1
        if rank[path] > least[path] and counts[path] < most[path] and left:
            counts[path] += 1
            left -= 1
    return counts


@pytest.mark.parametrize("seed", range(4))
def test_global_budgets_keep_their_limits(seed):
    rng = np.random.default_rng(seed)
    scale = {"a": 1.0, "b": 10.0, "c": 0.1}
    scores = {k: jnp.asarray(s * rng.random(20), jnp.float32) for k, s in scale.items()}
    params = {k: s.reshape(4, 5) for k, s in scores.items()}
    density = nm.global_(0.4, min_density=0.12, max_density=0.72)
    plan = nm.plan(params, {"": nm.Unstructured()}, density=density)
    assert [leaf.limits for leaf in plan.leaves] == [(3, 14)] * 3
    masks = nm.compute_masks(params, plan)
    expected = limited_counts(
        {k: s.tolist() for k, s in scores.items()},
        24,
        dict.fromkeys("abc", 3),
        dict.fromkeys("abc", 14),
    )
    assert {k: int(mask.sum()) for k, mask in masks.items()} == expected
    assert sum(expected.values()) == plan.count == 24
    for k, mask in masks.items():  # and within a leaf, the best
        best = np.sort(np.asarray(params[k]).ravel())[-expected[k] :]
        np.testing.assert_array_equal(np.sort(np.asarray(params[k])[mask]), best)


def test_limits_hold_for_scores_that_are_not_finite():
    params = {"a": jnp.full((2, 4), jnp.nan), "b": jnp.full((2, 4), -jnp.inf)}
    density = nm.global_(0.5, min_density=0.25, max_density=0.75)
    plan = nm.plan(params, {"": nm.Unstructured()}, density=density)
    masks = nm.compute_masks(params, plan, params)
    assert {k: int(mask.sum()) for k, mask in masks.items()} == {"a": 6, "b": 2}


def test_limits_that_leave_no_room_are_refused():
    with pytest.raises(ValueError, match="min_density <= density <= max_density"):
        nm.global_(0.5, min_density=0.6)
    params = {"a": jnp.ones((3, 1)), "b": jnp.ones((3, 1))}
    density = nm.global_(0.5, min_density=0.5)
    with pytest.raises(ValueError, match="keeps 3 of 6 .* between 4 and 6"):
        nm.plan(params, {"": nm.Unstructured()}, density=density)


def test_the_table_shows_limits():
    params = {"a": jnp.ones((4, 5)), "b": jnp.ones((4, 5))}
    rules = {"": nm.Unstructured()}
    limited = nm.plan(params, rules, density=nm.global_(0.5, max_density=0.75))
    assert "0 to 0.75" in str(limited)
    assert "shared" in str(nm.plan(params, rules, density=nm.global_(0.5)))
