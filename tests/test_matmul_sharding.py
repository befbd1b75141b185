"""Matmuls with sharded compressed weights: which collectives they need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from test_masking_sharding import collectives, hlo_of
from test_matmul import K, as_float64, assert_close, densify, make, normal, with_values

import nmjax as nm


def shard(mesh, array, spec):
    def put(leaf):
        fits = leaf.ndim == len(spec)
        return jax.device_put(leaf, NamedSharding(mesh, spec if fits else P()))

    return jax.tree.map(put, array)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("kind", ["nm", "fan_in"])
@pytest.mark.parametrize("batch", [4, 16])
def test_outputs_and_batch_are_partitioned_without_collectives(kind, batch, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    # Three inputs of 16 are added up by slots at a batch of 4, decompressed at 16.
    w, x = make(kind, shape=(16, 32)), normal(1, (batch, 16))
    expected = as_float64(x) @ as_float64(densify(w))
    with jax.set_mesh(mesh):
        x, w = shard(mesh, x, P("data", None)), shard(mesh, w, P("model", None))
        compiled = jax.jit(nm.matmul).lower(x, w).compile()
        assert not collectives(hlo_of(compiled))
        y = compiled(x, w)
    assert y.sharding.spec == P("data", "model")
    assert_close(y, expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_gradients_of_partitioned_layers_are_summed_once(axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    for kind in ("nm", "fan_in"):
        w, x = make(kind, shape=(64, 32)), normal(1, (16, 64))

        def loss(x, values, w):
            return jnp.sum(jnp.sin(nm.matmul(x, with_values(w, values))))

        expected = jax.grad(loss, (0, 1))(x, w.values, w)
        with jax.set_mesh(mesh):
            x, w = shard(mesh, x, P("data", None)), shard(mesh, w, P("model", None))
            gradient = jax.jit(jax.grad(loss, (0, 1)))
            compiled = gradient.lower(x, w.values, w).compile()
            found = collectives(hlo_of(compiled))
            # One over outputs for dx, one over the batch for the values.
            assert {name for name, _ in found} == {"all-reduce"}
            assert found.total() <= 2
            assert_close(compiled(x, w.values, w), expected)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("x_spec", [P("data", None), P("data", "model")])
def test_sums_over_a_sharded_axis_need_one_reduction(x_spec, axis_type):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)
    w, x = make("nm", shape=(64, 32)), normal(1, (16, 64))
    expected = as_float64(x) @ as_float64(densify(w))
    with jax.set_mesh(mesh):
        x, w = shard(mesh, x, x_spec), shard(mesh, w, P(None, "model"))
        compiled = jax.jit(nm.matmul).lower(x, w).compile()
        found = collectives(hlo_of(compiled))
        assert found == {("all-reduce", 16 * 32 // 2): 1}
        assert_close(compiled(x, w), expected)


@pytest.mark.parametrize("kind", ["fan_in ablated", "block"])
def test_explicit_meshes_take_every_format(kind):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    w, x = make(kind), normal(1, (2, 4, K))
    with jax.set_mesh(mesh):
        x = shard(mesh, x, P("data", None, "model"))
        y = jax.jit(nm.matmul)(x, shard(mesh, w, P()))
        clash = shard(mesh, make("nm"), P("data", None))
        z = nm.matmul(x, clash)  # outputs over the axis of the batch: the batch has it
    assert y.sharding.spec == z.sharding.spec == P("data", None, None)
    assert_close(y, np.asarray(x) @ np.asarray(densify(w)))
