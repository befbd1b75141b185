"""Transforms that hold masks: exactly sparse after every step, whatever is inside."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax as nm
from nmjax import schedules

STEPS = 7
RANGE = {"total_steps": 20, "delta_t": 3, "stop": 20}


def random_params(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "a": {
            "kernel": jax.random.normal(keys[0], (16, 8)),
            "bias": jax.random.normal(keys[1], (8,)),
        },
        "b": {"kernel": jax.random.normal(keys[2], (8, 4))},
    }


PLANS = {
    "unstructured": (nm.Unstructured(), nm.erk(0.3)),
    "fan_in": (nm.FanIn(), nm.erk(0.3)),
    "nm": ({"kernel": nm.NM(2, 4)}, None),
}
METHODS = {
    "static": ("nm", lambda inner, plan: nm.static(inner, plan)),
    "set_": (
        "unstructured",
        lambda inner, plan: nm.set_(inner, plan, key=jax.random.key(5), **RANGE),
    ),
    "set_fan_in": (
        "fan_in",
        lambda inner, plan: nm.set_(inner, plan, key=jax.random.key(5), **RANGE),
    ),
    "rigl": ("unstructured", lambda inner, plan: nm.rigl(inner, plan, **RANGE)),
    "rigl_nm": ("nm", lambda inner, plan: nm.rigl(inner, plan, **RANGE)),
    "rigl_accumulated": (
        "unstructured",
        lambda inner, plan: nm.rigl(inner, plan, accumulate=2, **RANGE),
    ),
    "srigl": ("fan_in", lambda inner, plan: nm.srigl(inner, plan, **RANGE)),
    "srigl_nm": ("nm", lambda inner, plan: nm.srigl(inner, plan, **RANGE)),
    "one_shot": ("nm", lambda inner, plan: nm.one_shot(inner, plan, at=3)),
    "gradual": (
        "unstructured",
        lambda inner, plan: nm.gradual(inner, plan, start=1, stop=5, every=2),
    ),
    "progressive_nm": (
        "nm",
        lambda inner, plan: nm.progressive_nm(inner, plan, {0: 3, 3: 2}),
    ),
}


def label(params):
    return {
        "a": {"kernel": "adam", "bias": "sgd"},
        "b": {"kernel": "adam"},
    }


INNERS = {
    "adam": optax.adam(1e-2),
    "adamw": optax.adamw(1e-2),
    "momentum": optax.sgd(0.1, momentum=0.9),
    "lion": optax.lion(1e-3),
    "rmsprop": optax.rmsprop(1e-2),
    "adafactor": optax.adafactor(1e-2),
    "muon": optax.contrib.muon(1e-2),
    "schedule_free": optax.contrib.schedule_free_adamw(1e-2),
    "multi_steps": optax.MultiSteps(optax.adam(1e-2), 2),
    "chain": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)),
    "injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "partition": optax.partition(
        {"adam": optax.adam(1e-2), "sgd": optax.sgd(1.0)}, label
    ),
}


@pytest.fixture(autouse=True)
def standard():
    """The inner optimizers of optax multiply counts with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def plan_of(kind, params):
    pattern, density = PLANS[kind]
    return nm.plan(params, pattern, density=density)


def build(method, inner):
    kind, make = METHODS[method]
    params = random_params(0)
    plan = plan_of(kind, params)
    if method not in ("one_shot", "gradual", "progressive_nm"):
        params = nm.project(params, plan)
    return make(inner, plan), plan, params


def run(tx, params, steps=STEPS, grads_of=random_params):
    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    state, found = tx.init(params), []
    for i in range(steps):
        params, state = step(params, state, grads_of(100 + i))
        found.append((params, state))
    return found


def kernels(tree):
    return {layer: np.asarray(tree[layer]["kernel"]) for layer in ("a", "b")}


@pytest.mark.parametrize("inner", INNERS)
def test_params_and_moments_are_zero_where_inactive(inner):
    tx, _, params = build("rigl", INNERS[inner])
    first = kernels(nm.masks(tx.init(params)))
    for now, state in run(tx, params):
        masks = kernels(nm.masks(state))
        for layer, weights in kernels(now).items():
            assert (weights[~masks[layer]] == 0).all()
        moments = [x for x in jax.tree.leaves(state.inner) if x.shape == (16, 8)]
        for moment in moments:
            assert (np.asarray(moment)[~masks["a"]] == 0).all()
    assert (masks["a"] != first["a"]).any()


@pytest.mark.parametrize("method", METHODS)
def test_masks_keep_their_counts_and_params_follow(method):
    tx, plan, params = build(method, INNERS["momentum"])
    changed = False
    before = kernels(nm.masks(tx.init(params)))
    for now, state in run(tx, params):
        masks = kernels(nm.masks(state))
        for layer, weights in kernels(now).items():
            assert (weights[~masks[layer]] == 0).all()
        changed = changed or any((masks[k] != before[k]).any() for k in masks)
    assert changed == (method != "static")
    counts = {leaf.path: leaf.count for leaf in plan.sparse_leaves}
    for layer, mask in masks.items():
        assert mask.sum() == counts[f"{layer}/kernel"]
    if METHODS[method][0] == "nm":
        assert (masks["a"].reshape(4, 4, 8).sum(1) == 2).all()


ONE = optax.GradientTransformation(
    lambda params: optax.TraceState(jax.tree.map(jnp.ones_like, params)),
    lambda u, s, p=None: (u, optax.TraceState(jax.tree.map(lambda m: m + 1, s.trace))),
)


@pytest.mark.parametrize(
    "inner",
    [
        optax.chain(optax.centralize(), optax.sgd(0.1, momentum=0.9)),
        optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.1, momentum=0.9)),
        optax.adagrad(0.1),
        ONE,
    ],
    ids=["centralized", "decayed", "adagrad", "counting"],
)
def test_moments_that_leave_zero_are_reset_from_params_that_were_dense(inner):
    tx, _, _ = build("rigl", inner)
    params = random_params(3)  # not sparse: the first update makes them so
    for now, state in run(tx, params, steps=4):
        mask = kernels(nm.masks(state))["a"]
        assert (kernels(now)["a"][~mask] == 0).all()
        moments = [x for x in jax.tree.leaves(state.inner) if x.shape == (16, 8)]
        assert moments
        for moment in moments:
            assert (np.asarray(moment)[~mask] == 0).all()
            assert (np.asarray(moment)[mask] != 0).any()


def test_a_donated_state_leaves_the_key_of_the_method_alone():
    tx, _, params = build("set_", optax.sgd(0.1))
    step = jax.jit(lambda s, g, p: tx.update(g, s, p)[1], donate_argnums=0)
    step(tx.init(params), params, params)
    assert not tx.init(params).key.is_deleted()


def test_grown_weights_start_at_zero_with_fresh_moments():
    tx, _, params = build("rigl", INNERS["adam"])
    [_, (_, before), (now, state)] = run(tx, params, steps=3)
    masks = kernels(nm.masks(state))
    grown = masks["a"] & ~kernels(nm.masks(before))["a"]
    assert grown.any()
    assert (kernels(now)["a"][grown] == 0).all()
    mu = np.asarray(state.inner[0].mu["a"]["kernel"])
    assert (mu[grown] == 0).all()
    assert (mu[masks["a"] & ~grown] != 0).any()


def test_rigl_step_equals_the_rule_after_the_inner_step():
    tx, plan, params = build("rigl", optax.sgd(0.1))
    [_, (old, old_state), (new, new_state)] = run(tx, params, steps=3)
    grads = random_params(102)
    mask = nm.masks(old_state)["a"]["kernel"]
    stepped = jnp.where(mask, old["a"]["kernel"] - 0.1 * grads["a"]["kernel"], 0)
    fraction = schedules.cosine_drop(0.3, 20)(3)
    expected = nm.rigl_update(
        stepped, mask, grads["a"]["kernel"], drop_fraction=fraction
    )
    np.testing.assert_array_equal(nm.masks(new_state)["a"]["kernel"], expected)
    np.testing.assert_allclose(
        new["a"]["kernel"], jnp.where(mask & expected, stepped, 0), rtol=1e-6
    )


def test_infinite_gradients_of_inactive_weights_leave_no_trace():
    tx, _, params = build("static", INNERS["adam"])
    mask = nm.masks(tx.init(params))["a"]["kernel"]

    def poisoned(seed):
        grads = random_params(seed)
        bad = jnp.where(mask, grads["a"]["kernel"], jnp.nan)
        return {**grads, "a": {**grads["a"], "kernel": bad}}

    for now, state in run(tx, params, grads_of=poisoned):
        assert jnp.isfinite(now["a"]["kernel"]).all()
        assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(state.inner))


def test_half_precision_params_stay_exactly_sparse():
    tx, _, params = build("rigl", INNERS["momentum"])
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    for now, state in run(tx, half, grads_of=lambda s: random_params(s)):
        masks = kernels(nm.masks(state))
        assert now["a"]["kernel"].dtype == jnp.bfloat16
        assert (kernels(now)["a"][~masks["a"]] == 0).all()


def test_multi_steps_outside_gives_the_same_density():
    tx, plan, params = build("rigl", INNERS["adam"])
    for now, state in run(optax.MultiSteps(tx, 2), params, steps=12):
        masks = kernels(nm.masks(state))
        assert masks["a"].sum() + masks["b"].sum() == plan.count
        assert (kernels(now)["a"][~masks["a"]] == 0).all()


def test_two_jitted_steps_equal_one_with_a_condition():
    tx, _, params = build("rigl", INNERS["adam"])
    expected, _ = run(tx, params, steps=3)[-1]
    state = tx.init(params)
    steps = [
        jax.jit(functools.partial(tx.update, topology=topology))
        for topology in (False, True)
    ]
    for i in range(3):
        updates, state = steps[i == 2](random_params(100 + i), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["a"]["kernel"], expected["a"]["kernel"])


def test_vmap_over_seeds_equals_a_loop():
    tx, _, params = build("srigl", INNERS["momentum"])

    def train(seed):
        def body(carry, i):
            params, state = carry
            grads = jax.tree.map(
                lambda p: jax.random.normal(jax.random.fold_in(seed, i), p.shape),
                params,
            )
            updates, state = tx.update(grads, state, params)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(body, (params, tx.init(params)), jnp.arange(4))[0][0]

    seeds = jax.random.split(jax.random.key(0), 2)
    many, train_one = jax.jit(jax.vmap(train))(seeds), jax.jit(train)
    for i, seed in enumerate(seeds):
        one = train_one(seed)
        np.testing.assert_allclose(
            many["a"]["kernel"][i], one["a"]["kernel"], rtol=1e-5, atol=1e-6
        )
        assert ((many["a"]["kernel"][i] == 0) == (one["a"]["kernel"] == 0)).all()


def test_donated_state_works():
    tx, _, params = build("rigl_accumulated", INNERS["adam"])
    step = jax.jit(
        lambda state, grads, params: tx.update(grads, state, params)[1],
        donate_argnums=0,
    )
    state = tx.init(params)
    for i in range(3):
        state = step(state, random_params(i), params)
    assert int(state.count) == 3


def test_accumulated_gradients_decide_growth():
    tx, _, params = build("rigl_accumulated", optax.sgd(0.0))
    # The last gradient alone would grow elsewhere than the sum of the last two.
    strong = jnp.zeros((16, 8)).at[0].set(10.0)
    grads = [random_params(i) for i in range(3)]
    grads[1]["a"]["kernel"] = strong
    state = tx.init(params)
    for g in grads:
        updates, state = tx.update(g, state, params)
        params = optax.apply_updates(params, updates)
    assert nm.masks(state)["a"]["kernel"][0].all()
    assert (state.growth["a"]["kernel"] == 0).all()


def test_ablation_keeps_the_budget_and_spares_exempt_leaves():
    params = random_params(0)
    plan = plan_of("fan_in", params)
    params = nm.project(params, plan)
    tx = nm.srigl(optax.sgd(0.1), plan, gamma_sal=0.95, exempt="b/", **RANGE)
    _, state = run(tx, params)[-1]
    masks = kernels(nm.masks(state))
    alive = (masks["a"].sum(0) > 0).sum()
    fan_in = plan.by_path["a/kernel"].budget // alive
    assert alive < 8
    assert set(masks["a"].sum(0).tolist()) == {0, fan_in}
    assert (masks["b"].sum(0) > 0).all()


def test_attention_kernels_and_stacked_layers_have_constant_fan_in():
    params = {
        "query": {"kernel": jax.random.normal(jax.random.key(0), (16, 2, 4))},
        "layers": {"kernel": jax.random.normal(jax.random.key(1), (3, 16, 8))},
    }
    plan = nm.plan(params, nm.FanIn(), density=0.25, stacked="layers")
    params = nm.project(params, plan)
    tx = nm.srigl(optax.sgd(0.1), plan, gamma_sal=None, **RANGE)

    def grads_of(seed):
        return jax.tree.map(
            lambda p: jax.random.normal(jax.random.key(seed), p.shape), params
        )

    _, state = run(tx, params, grads_of=grads_of)[-1]
    masks = nm.masks(state)
    assert (masks["query"]["kernel"].sum(0) == 4).all()
    assert (masks["layers"]["kernel"].sum(1) == 4).all()


def test_gradual_pruning_is_nested_and_ends_at_the_plan():
    for shape in ("cubic", "linear", "cosine", "exponential"):
        params = random_params(0)
        plan = nm.plan(params, nm.Unstructured(), density=nm.global_(0.2))
        tx = nm.gradual(optax.sgd(0.1), plan, start=0, stop=6, every=2, shape=shape)
        totals, before = [], None
        for _, state in run(tx, params):
            masks = kernels(nm.masks(state))
            now = np.concatenate([m.ravel() for m in masks.values()])
            assert before is None or not (now & ~before).any()
            totals.append(int(now.sum()))
            before = now
        assert totals[-1] == plan.count == totals[5]
        assert totals[0] == 160
        assert sorted(totals, reverse=True) == totals


def test_saliency_decides_what_one_shot_keeps():
    params = random_params(0)
    plan = plan_of("nm", params)
    grads = random_params(1)
    tx = nm.one_shot(optax.sgd(0.0), plan, at=1, saliency=lambda w, g: jnp.abs(w * g))
    _, state = tx.update(grads, tx.init(params), params)
    scores = jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads)
    expected = nm.compute_masks(params, plan, scores)["a"]["kernel"]
    np.testing.assert_array_equal(nm.masks(state)["a"]["kernel"], expected)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_sharded_masks_equal_those_of_one_device(kind):
    tx, _, params = build("rigl", optax.sgd(0.1))
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    _, expected = run(tx, params, steps=3)[-1]
    specs = {1: P(), 2: P("data", "model")}

    def place(tree):
        return jax.tree.map(
            lambda x: jax.device_put(x, NamedSharding(mesh, specs[x.ndim])), tree
        )

    with jax.set_mesh(mesh):
        found = run(
            tx, place(params), steps=3, grads_of=lambda s: place(random_params(s))
        )
    masks, plain = kernels(nm.masks(found[-1][1])), kernels(nm.masks(expected))
    np.testing.assert_array_equal(masks["a"], plain["a"])
    np.testing.assert_array_equal(masks["b"], plain["b"])


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda p: nm.rigl(optax.sgd(1.0), p["nm"]), TypeError, "total_steps"),
        (
            lambda p: nm.srigl(optax.sgd(1.0), p["unstructured"], total_steps=9),
            ValueError,
            "leaf 'a/kernel': nm.srigl grows FanIn, NM leaves, not unstructured",
        ),
        (
            lambda p: nm.srigl(
                optax.sgd(1.0), p["fan_in"], total_steps=9, exempt="nowhere"
            ),
            ValueError,
            "exempt='nowhere' matches no sparse leaf",
        ),
        (
            lambda p: nm.rigl(
                optax.sgd(1.0), p["nm"], total_steps=9, delta_t=2, accumulate=3
            ),
            ValueError,
            "accumulate=3 gradients do not fit",
        ),
        (
            lambda p: nm.gradual(optax.sgd(1.0), p["nm"], start=0, stop=3),
            ValueError,
            "leaf 'a/kernel': 2:4 along -2 has a fixed density",
        ),
        (
            lambda p: nm.progressive_nm(optax.sgd(1.0), p["nm"], {0: 3}),
            ValueError,
            "must end at the plan's n=2",
        ),
        (
            lambda p: nm.progressive_nm(optax.sgd(1.0), p["nm"], {0: 2, 5: 2}),
            ValueError,
            "must fall from step to step",
        ),
    ],
)
def test_bad_arguments_are_refused(make, error, match):
    plans = {kind: plan_of(kind, random_params(0)) for kind in PLANS}
    with pytest.raises(error, match=match):
        make(plans)


def test_update_without_params_is_refused():
    tx, _, params = build("rigl", optax.sgd(0.1))
    with pytest.raises(ValueError, match="nm.rigl needs the params"):
        tx.update(params, tx.init(params))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nm.gradual(optax.sgd(0.1), "2:4", start=0, stop=3),
        lambda: nm.progressive_nm(optax.sgd(0.1), "2:4", {0: 2}),
        lambda: nm.rigl(optax.sgd(0.1), "2:4", total_steps=9),
        lambda: nm.static(optax.sgd(0.1), "2:4"),
    ],
)
def test_what_is_no_plan_is_refused(unchecked, make):
    with pytest.raises(TypeError, match="plan must be made by nm.plan, got str"):
        make()
