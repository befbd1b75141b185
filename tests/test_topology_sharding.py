"""Topology updates of sharded params: nothing but counts may cross devices."""

import functools

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_masking_sharding import collectives, hlo_of, mesh

import nmjax as nm

SHAPE = (256, 64)
NEURONS = SHAPE[-1]
RANGE = {"total_steps": 4, "delta_t": 2, "stop": 4}
METHODS = {
    "rigl": (nm.Unstructured(), functools.partial(nm.rigl, **RANGE)),
    "rigl 2:4": (nm.NM(2, 4), functools.partial(nm.rigl, **RANGE)),
    "srigl": (nm.FanIn(), functools.partial(nm.srigl, gamma_sal=0.9, **RANGE)),
    "set_": (
        nm.Unstructured(),
        functools.partial(nm.set_, key=jax.random.key(0), **RANGE),
    ),
}


def trees(seed):
    keys = jax.random.split(jax.random.key(seed), 3)
    return [{"kernel": jax.random.normal(key, SHAPE)} for key in keys]


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("name", METHODS)
def test_a_step_communicates_counts_only(name, axis_type):
    pattern, method = METHODS[name]
    params, *all_grads = trees(0)
    density = None if isinstance(pattern, nm.NM) else 0.25
    plan = nm.plan(params, {"kernel": pattern}, density=density)
    tx = method(optax.sgd(0.125, momentum=0.5), plan)

    @jax.jit
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = nm.project(params, plan)
    expected = params, tx.init(params)
    for grads in all_grads:
        expected = step(*expected, grads)
    spec = P("data", "model")
    sharding = NamedSharding(mesh(axis_type), spec)
    with jax.set_mesh(mesh(axis_type)):
        placed, *grads = (
            jax.tree.map(lambda x: jax.device_put(x, sharding), tree)
            for tree in (params, *all_grads)
        )
        got = placed, tx.init(placed)  # eager, so that moments are sharded alike
        compiled = step.lower(*got, grads[0]).compile()
        for g in grads:
            got = compiled(*got, g)
    hlo = hlo_of(compiled)
    found = collectives(hlo)
    assert {kind for kind, _ in found} <= {"all-reduce"}, found
    largest = max([size for _, size in found], default=0)
    assert largest <= (NEURONS if name == "srigl" else 1), found
    assert "[256,64]" not in hlo  # neither are random numbers made on every device
    assert got[0]["kernel"].sharding.is_equivalent_to(sharding, 2)
    mask, other = (nm.masks(state)["kernel"] for _, state in (got, expected))
    np.testing.assert_array_equal(mask, other)
    assert (mask != nm.masks(tx.init(params))["kernel"]).any()
    np.testing.assert_allclose(
        got[0]["kernel"], expected[0]["kernel"], rtol=1e-6, atol=1e-7
    )
