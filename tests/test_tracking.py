"""The tracker in the loops that people train with."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import nmjax as nm
from nmjax import metrics
from nmjax.tracking import TrackerState


def make_params(seed=0):
    keys = jax.random.split(jax.random.key(seed), 2)
    return {
        "hidden": {"kernel": jax.random.normal(keys[0], (16, 8)), "bias": jnp.ones(8)},
        "out": {"kernel": jax.random.normal(keys[1], (8, 8))},
    }


def make_plan():
    return nm.plan(make_params(), nm.NM(2, 4))


def moved(params, seed):
    """Give params that differ by noise."""
    return jax.tree.map(
        lambda p: p + 0.5 * jax.random.normal(jax.random.key(seed), p.shape), params
    )


def expected(params, old, new):
    """Compute all metrics with NumPy."""
    paths = {"hidden/kernel": ("hidden", "kernel"), "out/kernel": ("out", "kernel")}
    out, flips, kept, size, magnitude = {}, 0, 0, 0, np.zeros(2)
    for path, (layer, leaf) in paths.items():
        w, a, b = (np.asarray(tree[layer][leaf]) for tree in (params, old, new))
        sums = np.array([np.abs(w)[b].sum(), np.abs(w).sum()], np.float64)
        out[f"density/{path}"] = b.mean()
        out[f"flip_rate/{path}"] = (a != b).mean()
        out[f"kept_magnitude/{path}"] = sums[0] / sums[1]
        flips, kept, size = flips + (a != b).sum(), kept + b.sum(), size + b.size
        magnitude += sums
    totals = {
        "density": kept / size,
        "density_all": (kept + 8) / (size + 8),
        "sad": flips,
        "flip_rate": flips / size,
        "kept_magnitude": magnitude[0] / magnitude[1],
    }
    return out | totals


def assert_metrics(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_tracker_reports_what_numpy_does(wrap):
    plan, params = make_plan(), make_params()
    tracker = nm.tracker(plan)
    state = wrap(tracker.init)(params)
    old = nm.compute_masks(params, plan)
    for seed in range(2):
        params = moved(params, seed)
        found, state = wrap(tracker.update)(params, state)
        new = nm.compute_masks(params, plan)
        wanted = expected(params, old, new)
        assert_metrics(found, wanted)
        assert wanted["sad"] > 0
        assert found["sad"].dtype == jnp.int32
        assert all(v.dtype == jnp.float32 for k, v in found.items() if k != "sad")
        old = new


def test_nothing_moves_nothing_flips():
    params, tracker = make_params(), nm.tracker(make_plan())
    found, _ = tracker.update(params, tracker.init(params))
    assert int(found["sad"]) == 0
    assert float(found["flip_rate"]) == 0.0
    assert float(found["density"]) == 0.5


def test_scan_gives_the_same_as_a_loop_and_updates_nothing_else():
    plan = make_plan()
    tracker, tx = nm.tracker(plan), optax.chain(nm.srste(plan, 0.1), optax.sgd(0.1))

    def step(carry, key):
        params, opt_state, tracked = carry
        grads = jax.tree.map(lambda p: jax.random.normal(key, p.shape), params)
        updates, opt_state = tx.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        found, tracked = tracker.update(params, tracked)
        return (params, opt_state, tracked), found

    params = make_params()
    carry = (params, tx.init(params), tracker.init(params))
    keys = jax.random.split(jax.random.key(5), 4)
    _, stacked = jax.jit(lambda c: jax.lax.scan(step, c, keys))(carry)
    step_once = jax.jit(step)
    for i, key in enumerate(keys):
        carry, found = step_once(carry, key)
        assert_metrics(found, {name: value[i] for name, value in stacked.items()})
    assert int(stacked["sad"].sum()) > 0


def test_vmap_over_seeds_tracks_every_seed():
    tracker = nm.tracker(make_plan())
    before = [make_params(seed) for seed in (0, 1, 2)]
    after = [moved(params, 7) for params in before]
    stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)  # noqa: E731
    states = jax.vmap(tracker.init)(stack(before))
    found, _ = jax.jit(jax.vmap(tracker.update))(stack(after), states)
    for i in range(3):
        one, _ = tracker.update(after[i], tracker.init(before[i]))
        assert_metrics({name: value[i] for name, value in found.items()}, one)


def test_state_is_donated_also_with_masks_that_another_state_holds():
    plan, params = make_plan(), make_params()
    tracker, tx = nm.tracker(plan), nm.srste(plan, refresh=2)

    def step(params, opt_state, tracked):
        updates, opt_state = tx.update(params, opt_state, params)
        params = optax.apply_updates(params, updates)
        found, tracked = tracker.update(params, tracked, nm.masks(opt_state))
        return params, opt_state, tracked, found

    opt_state = tx.init(params)
    tracked = tracker.init(params, nm.masks(opt_state))
    donating, found = jax.jit(step, donate_argnums=(0, 1, 2)), {}
    for _ in range(3):
        params, opt_state, tracked, found = donating(params, opt_state, tracked)
    assert float(found["density"]) == 0.5
    for layer in ("hidden", "out"):
        np.testing.assert_array_equal(
            tracked.previous[layer]["kernel"], nm.masks(opt_state)[layer]["kernel"]
        )


def test_given_masks_are_measured_in_place_of_the_plan_s():
    plan, params = make_plan(), make_params()
    tracker = nm.tracker(plan)
    first = jax.tree.map(lambda m: jnp.ones_like(m), nm.compute_masks(params, plan))
    second = jax.tree.map(lambda m: m.at[0].set(False), first)
    found, state = tracker.update(params, tracker.init(params, first), second)
    assert_metrics(found, expected(params, first, second))
    assert int(found["sad"]) == 16
    assert isinstance(state, TrackerState)


def test_tracker_state_is_not_taken_for_the_masks_of_a_transform():
    plan, params = make_plan(), make_params()
    tx, tracked = nm.srste(plan, refresh=2), nm.tracker(plan).init(params)
    masks = nm.masks({"opt": tx.init(params), "tracker": tracked})
    assert masks["out"]["kernel"].shape == (8, 8)
    with pytest.raises(ValueError, match=r"no transform keeps masks"):
        nm.masks(tracked)


def test_paths_are_the_same_for_linen_and_nnx_trees():
    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(8, name="hidden")(x)

    class Nnx(nnx.Module):
        def __init__(self, rngs):
            self.hidden = nnx.Linear(16, 8, rngs=rngs)

    linen = Linen().init(jax.random.key(0), jnp.ones((1, 16)))["params"]
    state = nnx.state(Nnx(nnx.Rngs(0)), nnx.Param)
    for params in (linen, state):
        tracker = nm.tracker(nm.plan(params, nm.NM(2, 4)))
        found, _ = jax.jit(tracker.update)(params, tracker.init(params))
        assert float(found["density/hidden/kernel"]) == 0.5
        assert float(found["kept_magnitude/hidden/kernel"]) > 0.5


def ablating_plan():
    return nm.plan(make_params(), {"kernel": nm.FanIn(0.5)})


def drawn_masks(seed):
    """Draw masks in which one neuron has no inputs."""
    rng = np.random.default_rng(seed)
    masks = {"hidden": {"kernel": rng.random((16, 8)) < 0.3, "bias": None}, "out": {}}
    masks["out"]["kernel"] = rng.random((8, 8)) < 0.3
    masks["hidden"]["kernel"][:, seed] = False
    masks["hidden"]["bias"] = optax.MaskedNode()
    return masks


def test_neurons_and_explored_positions_are_tracked_on_request():
    plan, params = ablating_plan(), make_params()
    tracker = nm.tracker(plan, include_itop=True, include_neurons=True)
    plain = nm.tracker(plan)
    update, plain_update = jax.jit(tracker.update), jax.jit(plain.update)
    old = drawn_masks(0)
    state, plain_state = tracker.init(params, old), plain.init(params, old)
    union = {layer: old[layer]["kernel"] for layer in ("hidden", "out")}
    for seed in (1, 2):
        masks = drawn_masks(seed)
        found, state = update(params, state, masks)
        wanted, plain_state = plain_update(params, plain_state, masks)
        wanted = dict(wanted)
        fan_ins = {}
        for layer in union:
            new, path = masks[layer]["kernel"], f"{layer}/kernel"
            union[layer] = union[layer] | new
            wanted[f"itop/{path}"] = union[layer].mean()
            fan_ins[layer] = new.sum(0)
            wanted[f"active_neurons/{path}"] = (fan_ins[layer] > 0).mean()
            wanted[f"fan_in_max/{path}"] = fan_ins[layer].max()
        flat = np.concatenate([mask.ravel() for mask in union.values()])
        every = np.concatenate(list(fan_ins.values()))
        wanted["itop"] = flat.mean()
        wanted["active_neurons"] = (every > 0).mean()
        wanted["fan_in_max"] = every.max()
        assert_metrics(found, wanted)
        assert wanted["active_neurons/hidden/kernel"] == 7 / 8
        assert found["fan_in_max"].dtype == jnp.int32
    np.testing.assert_array_equal(state.explored["out"]["kernel"], union["out"])
    np.testing.assert_array_equal(
        state.previous["out"]["kernel"], drawn_masks(2)["out"]["kernel"]
    )


def test_stacked_layers_have_neurons_of_their_own():
    params = {"kernel": jnp.ones((2, 4, 3))}
    plan = nm.plan(params, {"kernel": nm.FanIn(0.5)}, stacked="kernel")
    mask = jnp.ones((2, 4, 3), bool).at[0, :, 1].set(False)
    tracker = nm.tracker(plan, include_neurons=True)
    state = TrackerState({"kernel": mask})
    found, _ = jax.jit(tracker.update)(params, state, {"kernel": mask})
    np.testing.assert_allclose(found["active_neurons"], 5 / 6, rtol=2e-7)


def test_states_of_trackers_with_other_options_are_refused():
    plan, params = make_plan(), make_params()
    plain, exploring = nm.tracker(plan), nm.tracker(plan, include_itop=True)
    # Checkpoints of a tracker without options keep their structure.
    state = plain.init(params)
    assert state._fields == ("previous",)
    neurons = nm.tracker(plan, include_neurons=True).init(params)
    assert jax.tree.structure(neurons) == jax.tree.structure(state)
    with pytest.raises(TypeError, match=r"type TrackerState, but.*include_itop=True"):
        exploring.update(params, state)
    with pytest.raises(
        TypeError, match=r"type ExploringState, but.*itop=False keeps a"
    ):
        plain.update(params, exploring.init(params))


def test_an_exploring_state_is_donated_and_mapped_over_seeds():
    plan = make_plan()
    tracker = nm.tracker(plan, include_itop=True)
    params = jax.tree.map(lambda p: jnp.stack([p, p]), make_params())
    state = jax.jit(jax.vmap(tracker.init))(params)
    donating = jax.jit(jax.vmap(tracker.update), donate_argnums=1)
    # In the second seed the smallest become the largest: the masks turn over.
    turned = jax.tree.map(lambda p: p.at[1].set(1 / p[1]), params)
    for tree in (params, turned):
        found, state = donating(tree, state)
    assert found["itop"].tolist() == [0.5, 1.0]


def test_masked_params_are_left_out():
    plan, params = make_plan(), make_params()
    tracker = nm.tracker(plan)
    params = params | {"out": {"kernel": optax.MaskedNode()}}
    found, _ = tracker.update(params, tracker.init(params))
    assert "density/hidden/kernel" in found
    assert "density/out/kernel" not in found


def test_plans_too_large_for_sad_need_to_say_so(monkeypatch):
    monkeypatch.setattr(metrics, "INT32_MAX", 100)
    plan, params = make_plan(), make_params()
    with pytest.raises(ValueError, match=r"192 sparse weights.*counts to 100.*include"):
        nm.tracker(plan)
    tracker = nm.tracker(plan, include_sad=False)
    old = nm.compute_masks(params, plan)
    state, params = tracker.init(params), moved(params, 1)
    found, _ = tracker.update(params, state)
    wanted = expected(params, old, nm.compute_masks(params, plan))
    del wanted["sad"]
    assert_metrics(found, wanted)


def test_masks_and_params_of_another_plan_are_refused():
    plan, params = make_plan(), make_params()
    tracker, masks = nm.tracker(plan), nm.compute_masks(params, plan)
    state = tracker.init(params)
    other = {"hidden": {"kernel": jnp.ones((16, 16))}}
    with pytest.raises(ValueError, match=r"'hidden/kernel' has shape \(16, 16\)"):
        tracker.init(other)
    less = masks | {"out": {"kernel": optax.MaskedNode()}}
    with pytest.raises(ValueError, match=r"'out/kernel' is 2:4.*leave it dense"):
        tracker.update(params, state, less)
    more = masks | {"hidden": masks["hidden"] | {"bias": jnp.ones(8, bool)}}
    with pytest.raises(ValueError, match=r"mask of shape \(8,\) for a leaf.*is dense"):
        tracker.update(params, state, more)
    wrong = masks | {"out": {"kernel": jnp.ones((8, 9), bool)}}
    with pytest.raises(ValueError, match=r"'out/kernel' has shape \(8, 8\) in .* but"):
        tracker.update(params, state, wrong)
    floats = masks | {"out": {"kernel": jnp.ones((8, 8))}}
    with pytest.raises(TypeError, match=r"mask of leaf 'out/kernel' has dtype float32"):
        tracker.update(params, state, floats)
