"""One table of properties that every transform goes through.

A new transform adds a `Case` to `CASES` and nothing else.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax as nm
from nmjax.paths import is_masked

RATE = 0.1
STEPS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """One transform with one choice of arguments.

    Attributes:
      factory: makes the stage from a plan and the hyperparameters.
      hyperparameters: numbers that `optax.inject_hyperparams` may make dynamic.
      other: further arguments.
      build: makes a whole optimizer of the stage.
      forward: the params that the model computes with.
      static: arguments that `optax.inject_hyperparams` must leave alone.
      pattern: what the hidden kernel holds.
      only_chooses: the case differs from "rigl" in how it chooses masks and in nothing
        else, so that only tests that are marked with `chooses` run it.
    """

    factory: Callable[..., Any]
    hyperparameters: dict[str, Any]
    other: dict[str, Any] = dataclasses.field(default_factory=dict)
    build: Callable[[Any], Any] = lambda stage: optax.chain(
        stage, optax.sgd(RATE, momentum=0.9)
    )
    forward: Callable[..., Any] = lambda params, plan, state: nm.sparsify(params, plan)
    static: tuple[str, ...] = ()
    pattern: Any = nm.NM(2, 4)
    only_chooses: bool = False

    def plan(self, params, **options):
        return nm.plan(params, {"(hidden/|^)kernel": self.pattern}, **options)

    def optimizer(self, plan):
        return self.build(self.factory(plan, **self.hyperparameters, **self.other))


def preconditioner(stage):
    return optax.chain(stage, optax.scale_by_learning_rate(RATE))


def last(stage):
    return optax.chain(optax.sgd(RATE, momentum=0.9), stage)


def phased(params, plan, state):
    return nm.sparsify(params, plan, active=nm.sparse_phase(state))


def held(params, plan, state):
    return params


def growing(plan, drop_fraction, total_steps, delta_t):
    inner = optax.sgd(RATE, momentum=0.9)
    return nm.rigl(
        inner,
        plan,
        drop_fraction=drop_fraction,
        total_steps=total_steps,
        delta_t=delta_t,
    )


def choosing(method, pattern=None, **arguments):
    """Make the case of a method that holds masks, as rigl does."""
    return Case(
        lambda plan, **others: method(optax.sgd(RATE, momentum=0.9), plan, **others),
        {},
        arguments,
        build=lambda method: method,
        forward=held,
        pattern=pattern or nm.NM(2, 4),
        only_chooses=True,
    )


CASES = {
    "srste": Case(nm.srste, {"decay": 0.1}),
    "srste-scheduled": Case(
        nm.srste, {"decay": lambda step: 0.1 * (1.0 + step.astype(jnp.float32))}
    ),
    "srste-phases": Case(
        nm.srste, {"decay": 0.1, "start": 1, "stop": 3}, forward=phased
    ),
    "srste-refresh": Case(
        nm.srste,
        {"decay": 0.1, "refresh": 2},
        forward=lambda params, plan, state: nm.sparsify(params, nm.masks(state)),
    ),
    "srste-decoupled": Case(
        nm.srste,
        {"decay": 0.1, "learning_rate": RATE},
        {"mode": "decoupled"},
        build=last,
    ),
    "srste-hybrid": Case(
        nm.srste,
        {"decay": 0.1, "b1": 0.8, "b2": 0.9},
        {"mode": "hybrid"},
        build=preconditioner,
    ),
    "step": Case(
        nm.scale_by_step,
        {"decay": 0.1, "b1": 0.8, "b2": 0.5, "threshold": 1e9},
        {"window": 2},
        build=preconditioner,
        forward=phased,
        static=("window",),
    ),
    "step-started": Case(
        nm.scale_by_step,
        {"start": 2},
        build=preconditioner,
        forward=phased,
        static=("window",),
    ),
    "rigl": Case(
        growing,
        {"drop_fraction": 0.5},
        {"total_steps": 6, "delta_t": 2},
        build=lambda method: method,
        forward=held,
        static=("total_steps", "delta_t"),
    ),
    "static": choosing(nm.static),
    "set": choosing(nm.set_, key=jax.random.key(3), total_steps=6, delta_t=2),
    "srigl": choosing(nm.srigl, nm.FanIn(0.5), total_steps=6, delta_t=2),
    "one-shot": choosing(nm.one_shot, at=2),
    "gradual": choosing(nm.gradual, nm.Unstructured(0.3), start=0, stop=3, every=1),
    "progressive-nm": choosing(nm.progressive_nm, ladder={0: 3, 2: 2}),
}


def chooses(test):
    """Mark a test that depends on how masks are chosen."""
    test.chooses = True
    return test


def compares_layers(test):
    """Mark a test of one layer at a time, for which random growth draws otherwise."""
    test.skips = "set"
    return chooses(test)


def pytest_generate_tests(metafunc):
    if "name" in metafunc.fixturenames:
        every = hasattr(metafunc.function, "chooses")
        skips = getattr(metafunc.function, "skips", None)
        names = [n for n, case in CASES.items() if every or not case.only_chooses]
        metafunc.parametrize("name", [n for n in names if n != skips])


@pytest.fixture
def standard():
    """Wrappers of optax multiply flags and counts with floats."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def random_params(seed=0):
    """Two layers; only the kernel of the hidden one is sparse."""
    keys = jax.random.split(jax.random.key(seed), 3)
    return {
        "head": {"kernel": jax.random.normal(keys[0], (8, 2))},
        "hidden": {
            "bias": jax.random.normal(keys[1], (8,)),
            "kernel": jax.random.normal(keys[2], (8, 8)),
        },
    }


PARAMS = random_params()
PLAN = CASES["srste"].plan(PARAMS)
GRADS = [random_params(100 + step) for step in range(STEPS)]
INPUTS = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)


@functools.cache
def optimizer(name):
    return CASES[name].optimizer(CASES[name].plan(PARAMS))


@functools.cache
def jitted(name):
    return jax.jit(functools.partial(step, optimizer(name)))


@functools.cache
def reference(name) -> Any:
    """Params and state after four jitted steps."""
    return run(jitted(name), PARAMS, jax.jit(optimizer(name).init)(PARAMS), GRADS)


def step(tx, params, state, grads) -> Any:
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def run(step, params, state, all_grads) -> Any:
    for grads in all_grads:
        params, state = step(params, state, grads)
    return params, state


def stacked(*trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def loss(params, x):
    hidden = jax.nn.relu(x @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return ((hidden @ params["head"]["kernel"]) ** 2).mean()


def assert_equal(got, expected, rtol=2e-5):
    leaves, treedef = jax.tree.flatten(got)
    others, other_treedef = jax.tree.flatten(expected)
    assert treedef == other_treedef
    for leaf, other in zip(leaves, others, strict=True):
        assert leaf.dtype == other.dtype
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf, other = jax.random.key_data(leaf), jax.random.key_data(other)
        np.testing.assert_allclose(
            np.asarray(leaf), np.asarray(other), rtol=rtol, atol=1e-6
        )


@chooses
def test_jitted_equals_eager(name):
    tx = optimizer(name)
    got = run(functools.partial(step, tx), PARAMS, tx.init(PARAMS), GRADS)
    assert_equal(got, reference(name))


def test_stage_of_a_longer_chain(name):
    tx = optax.chain(optax.clip(1e6), optimizer(name), optax.scale(1.0))
    params, state = run(
        jax.jit(functools.partial(step, tx)), PARAMS, tx.init(PARAMS), GRADS
    )
    assert_equal((params, state[1]), reference(name))


@chooses
@pytest.mark.usefixtures("standard")
def test_multi_steps_equal_the_mean_gradient_in_one_step(name):
    tx = optax.MultiSteps(optimizer(name), 2)
    halves = [jax.tree.map(lambda g, s=s: s * g, g) for g in GRADS for s in (0.5, 1.5)]
    got, state = run(
        jax.jit(functools.partial(step, tx)), PARAMS, tx.init(PARAMS), halves
    )
    assert_equal((got, state.inner_opt_state), reference(name))


def test_masked_transforms_its_part_alone(name):
    part = {"head": False, "hidden": True}
    tx = optax.masked(optimizer(name), part)
    params, state = run(
        jax.jit(functools.partial(step, tx)), PARAMS, tx.init(PARAMS), GRADS
    )
    assert_equal(params["hidden"], reference(name)[0]["hidden"])
    plain = functools.reduce(
        optax.apply_updates, [g["head"] for g in GRADS], PARAMS["head"]
    )
    assert_equal(params["head"], plain)
    forward = CASES[name].forward(params, PLAN, state)
    assert jax.tree.structure(forward) == jax.tree.structure(params)


def test_partition_transforms_its_part_alone(name):
    labels = {"head": "dense", "hidden": {"bias": "dense", "kernel": "sparse"}}
    tx = optax.partition({"sparse": optimizer(name), "dense": optax.sgd(RATE)}, labels)
    params, state = run(
        jax.jit(functools.partial(step, tx)), PARAMS, tx.init(PARAMS), GRADS
    )
    expected = reference(name)[0]["hidden"]["kernel"]
    assert_equal(params["hidden"]["kernel"], expected)
    forward = CASES[name].forward(params, PLAN, state)
    assert jax.tree.structure(forward) == jax.tree.structure(params)


@pytest.mark.usefixtures("standard")
def test_injected_hyperparameters_are_dynamic(name):
    case = CASES[name]
    make = optax.inject_hyperparams(case.factory, static_args=case.static)
    tx = case.build(make(PLAN, **case.hyperparameters, **case.other))
    state = tx.init(PARAMS)
    injected = functools.partial(step, tx)
    got, _ = run(jax.jit(injected), PARAMS, state, GRADS)
    assert_equal(got, reference(name)[0], rtol=1e-3)


@pytest.mark.usefixtures("standard")
def test_apply_if_finite_skips_a_bad_step(name):
    tx = optax.apply_if_finite(optimizer(name), 5)
    one = jax.jit(functools.partial(step, tx))
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), GRADS[0])
    params, state = run(one, PARAMS, tx.init(PARAMS), [GRADS[0], bad, *GRADS[1:]])
    assert_equal((params, state.inner_state), reference(name))


@chooses
def test_vmap_over_seeds_equals_a_loop(name):
    tx = optimizer(name)
    seeds = [random_params(seed) for seed in (0, 7)]
    params = stacked(*seeds)
    states = jax.vmap(tx.init)(params)
    many = jax.jit(jax.vmap(functools.partial(step, tx), in_axes=(0, 0, None)))
    got = run(many, params, states, GRADS)
    loop = [run(jitted(name), p, tx.init(p), GRADS) for p in seeds]
    assert_equal(got, stacked(*loop))


def test_scan_over_steps_equals_a_loop(name):
    tx = optimizer(name)
    all_grads = stacked(*GRADS)

    @jax.jit
    def scanned(params):
        def body(carry, grads):
            params, state = carry
            return step(tx, params, state, grads), None

        return jax.lax.scan(body, (params, tx.init(params)), all_grads)[0]

    assert_equal(scanned(PARAMS), reference(name))


def test_rematerialised_loss_has_the_same_gradient(name):
    _, state = reference(name)

    def forward_loss(params):
        return loss(CASES[name].forward(params, PLAN, state), INPUTS)

    plain, remat = jax.jit(
        lambda p: (jax.grad(forward_loss)(p), jax.grad(jax.checkpoint(forward_loss))(p))
    )(PARAMS)
    assert_equal(remat, plain)
    assert (plain["hidden"]["kernel"] != 0).any()


@chooses
def test_bfloat16_params_keep_their_dtypes(name):
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), (PARAMS, GRADS[0]))
    tx = optimizer(name)
    state = tx.init(half[0])
    updates, new = jax.jit(tx.update)(half[1], state, half[0])
    assert all(u.dtype == jnp.bfloat16 for u in jax.tree.leaves(updates))
    kinds = [jax.tree.map(lambda x: (x.shape, x.dtype), s) for s in (state, new)]
    assert kinds[0] == kinds[1]


@chooses
def test_state_can_be_donated(name):
    tx = optimizer(name)
    donating = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, PARAMS)
    assert_equal(run(donating, params, tx.init(params), GRADS), reference(name))


@compares_layers
def test_layers_of_a_stack_are_transformed_one_by_one(name):
    names = ("kernel", "bias")
    layers = [{k: random_params(seed)["hidden"][k] for k in names} for seed in (0, 7)]
    grads = [[{k: g["hidden"][k] for k in names} for g in GRADS]] * 2
    stack = stacked(*layers)
    case = CASES[name]
    tx = case.optimizer(case.plan(stack, stacked="kernel"))
    one = case.optimizer(case.plan(layers[0]))
    got, _ = run(
        jax.jit(functools.partial(step, tx)),
        stack,
        tx.init(stack),
        [
            jax.tree.map(lambda *g: jnp.stack(g), *both)
            for both in zip(*grads, strict=True)
        ],
    )
    single = jax.jit(functools.partial(step, one))
    loop = [
        run(single, p, one.init(p), g)[0] for p, g in zip(layers, grads, strict=True)
    ]
    assert_equal(got, jax.tree.map(lambda *p: jnp.stack(p), *loop))


class Model(nnx.Module):
    """The model of `loss` with the path names of `PARAMS`."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.hidden = nnx.Linear(8, 8, rngs=rngs)
        self.head = nnx.Linear(8, 2, use_bias=False, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.hidden(x)))


@pytest.mark.usefixtures("standard")
def test_nnx_optimizer_updates_the_model(name):
    model = Model()
    nnx.update(model, PARAMS)
    tracked = nnx.Optimizer(model, optimizer(name), wrt=nnx.Param)
    one = nnx.jit(lambda model, tracked, grads: tracked.update(model, grads))
    for grads in GRADS:
        one(model, tracked, nnx.state(nnx_grads(model, grads)))
    got = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    assert_equal(got, reference(name)[0])
    forward = CASES[name].forward(got, PLAN, tracked.opt_state)
    assert int((forward["hidden"]["kernel"] == 0).sum()) in (0, 32)


def nnx_grads(model, grads):
    copy = nnx.clone(model)
    nnx.update(copy, grads)
    return copy


def test_train_state_applies_gradients(name):
    state = TrainState.create(apply_fn=loss, params=PARAMS, tx=optimizer(name))
    one = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    for grads in GRADS:
        state = one(state, grads)
    assert_equal((state.params, state.opt_state), reference(name))
    CASES[name].forward(state.params, PLAN, state)


@chooses
def test_update_without_params_is_an_error(name):
    tx = optimizer(name)
    with pytest.raises(ValueError, match=r"nm\.\w+ needs the params: call tx.update"):
        tx.update(GRADS[0], tx.init(PARAMS))


@chooses
def test_plan_of_other_params_is_an_error(name):
    tx = optimizer(name)
    renamed = {"encoder": PARAMS["hidden"], "head": PARAMS["head"]}
    reshaped = {**PARAMS, "hidden": {"bias": jnp.ones(8), "kernel": jnp.ones((8, 4))}}
    with pytest.raises(ValueError, match="'encoder/.*' is not in the plan"):
        tx.init(renamed)
    with pytest.raises(ValueError, match=r"'hidden/kernel' has shape \(8, 4\), the pl"):
        tx.init(reshaped)
    with pytest.raises(ValueError, match="'encoder/.*' is not in the plan"):
        case = CASES[name]
        plan = case.plan(PARAMS)
        stage = case.factory(plan, **case.hyperparameters, **case.other)
        stage.update(renamed, stage.init(PARAMS), renamed)


def test_state_can_be_checkpointed(name):
    tx = optimizer(name)
    params, state = run(jitted(name), PARAMS, tx.init(PARAMS), GRADS[:2])
    leaves, treedef = jax.tree.flatten(state)
    restored = jax.tree.unflatten(treedef, [np.asarray(leaf).copy() for leaf in leaves])
    assert all(np.size(leaf) > 0 for leaf in leaves)
    assert_equal(run(jitted(name), params, restored, GRADS[2:]), reference(name))


def test_map_params_finds_the_parts_shaped_like_params(name):
    tx = optimizer(name)
    state = reference(name)[1]
    same = optax.tree.map_params(tx, lambda x: x, state)
    assert_equal(same, state)
    names = jax.tree.map(lambda p: "param", PARAMS)
    marked = optax.tree.map_params(
        tx,
        lambda x, mark: x if is_masked(x) else mark,
        state,
        names,
        transform_non_params=lambda x: "other",
        is_leaf=lambda x: x is None or is_masked(x),
    )
    for leaf, mark in zip(jax.tree.leaves(state), jax.tree.leaves(marked), strict=True):
        assert (mark == "param") == (leaf.ndim > 0 and leaf.shape != (2,))


@chooses
def test_traces_under_an_explicit_mesh_and_keeps_shardings(name):
    mesh = jax.make_mesh((2, 2), ("in", "out"), axis_types=(AxisType.Explicit,) * 2)
    specs = {
        "head": {"kernel": P("in", None)},
        "hidden": {"bias": P("out"), "kernel": P("in", "out")},
    }
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    tx = optimizer(name)
    with jax.set_mesh(mesh):
        params, *grads = (jax.device_put(t, shardings) for t in (PARAMS, *GRADS))
        state = jax.jit(tx.init)(params)
        got = run(jax.jit(functools.partial(step, tx)), params, state, grads)
    assert_equal(got, reference(name))
    for tree in (got[0], *moments(got[1])):
        assert jax.tree.map(lambda p: p.sharding.spec, tree) == specs


def moments(state):
    """The parts of a state that are shaped like the params."""
    found = [optax.tree.get(state, key) for key in ("mu", "nu", "trace")]
    return [tree for tree in found if tree is not None]


def test_boxed_params_are_transformed_as_plain_ones(name):
    def box(tree):
        return jax.tree.map(lambda p: nn.Partitioned(p, (None,) * p.ndim), tree)

    boxed = box(PARAMS)
    case = CASES[name]
    tx = case.optimizer(case.plan(boxed))
    assert tuple(leaf.path for leaf in PLAN.leaves) == tuple(
        leaf.path for leaf in case.plan(boxed).leaves
    )
    params, _ = run(
        jax.jit(functools.partial(step, tx)),
        boxed,
        tx.init(boxed),
        [box(grads) for grads in GRADS],
    )
    assert jax.tree.structure(params) == jax.tree.structure(boxed)
    assert_equal(nn.unbox(params), reference(name)[0])
