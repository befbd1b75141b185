"""Products on GPUs: which kernel is taken, what it computes, how it is partitioned."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from deviceless import devices, interpreted, needs_compiler
from jax import export, lax
from jax.experimental import topologies
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import nmjax as nm
from nmjax import formats

pytest.importorskip("jax.experimental.pallas.mosaic_gpu")
from jax.experimental.pallas import mosaic_gpu as plgpu  # noqa: E402

from nmjax.kernels.gpu import products  # noqa: E402
from nmjax.kernels.settings import Epilogue  # noqa: E402

KERNEL = "mosaic_gpu_v2"


def normal(seed, shape, dtype=jnp.bfloat16):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values, jnp.float32).astype(dtype)


def grouped(shape, dtype=jnp.bfloat16, quantized=False, seed=0):
    weights = normal(seed, shape, dtype)
    kept = jnp.where(nm.nm_mask(weights, 2, 4), weights, 0)
    small = formats.NMArray.from_dense(kept, 2, 4)
    return formats.quantize(small) if quantized else small


def ready(small):
    return nm.prepare({"kernel": small}, "sm90")["kernel"]


def condensed(shape, ablated=()):
    weights = normal(1, shape)
    mask = nm.fan_in_mask(weights, 5)
    if ablated:
        mask = mask.at[:, jnp.array(ablated)].set(False)
    return formats.FanInArray.from_dense(jnp.where(mask, weights, 0), mask=mask)


def blocked(shape, outputs, inputs):
    weights = normal(2, shape)
    count = weights.size // (outputs * inputs) // 4
    mask = nm.block_mask(jnp.abs(weights), count, (inputs, outputs))
    return formats.BlockArray.from_dense(jnp.where(mask, weights, 0), outputs, inputs)


def lowered(function, *args):
    traced = jax.jit(function).trace(*args)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


# What is computed -------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("batch", [1, 9, 70])
@pytest.mark.parametrize("quantized", [False, True])
def test_prepared_arrays_of_any_size_are_multiplied(batch, quantized):
    small = grouped((132, 70), quantized=quantized)
    x, bias = normal(3, (batch, 132)), normal(4, (70,), jnp.float32)
    epilogue = Epilogue("silu", jnp.dtype(jnp.float32))
    found = products.multiply(
        x, ready(small), bias, epilogue, interpret=plgpu.InterpretGPUParams()
    )
    dense = np.asarray(small.place(small.values.astype(jnp.float32)), np.float64)
    scales = 1 if small.scales is None else np.asarray(small.scales, np.float64)[:, 0]
    sums = np.asarray(x, np.float64) @ dense * scales + np.asarray(bias)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, jax.nn.silu(sums), rtol=1e-3, atol=1e-3)


@interpreted
@pytest.mark.parametrize("kind", ["fan_in", "ablated", "wide blocks", "narrow blocks"])
def test_other_formats_are_multiplied(kind):
    w = {
        "fan_in": lambda: condensed((40, 24)),
        "ablated": lambda: condensed((40, 24), ablated=(0, 7)),
        "wide blocks": lambda: blocked((128, 128), 64, 64),
        "narrow blocks": lambda: blocked((32, 64), 16, 1),
    }[kind]()
    x, bias = normal(3, (3, w.shape[0])), normal(4, (w.shape[1],), jnp.float32)
    found = products.multiply(
        x,
        w,
        bias,
        Epilogue("relu", jnp.dtype(jnp.float32)),
        interpret=plgpu.InterpretGPUParams(),
    )
    sums = np.asarray(x, np.float64) @ np.asarray(w.todense(), np.float64)
    expected = np.maximum(sums + np.asarray(bias), 0)
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-3)


# What is taken ----------------------------------------------------------------------


def test_prepared_arrays_take_a_kernel_and_others_do_not_unless_it_is_asked_for():
    x, small = normal(0, (8, 128)), grouped((128, 128))
    fan_in = condensed((128, 64))
    assert lowered(nm.matmul, x, ready(small)).count(KERNEL) == 1
    for w in (small, fan_in):
        assert KERNEL not in lowered(nm.matmul, x, w)

    def named(name):
        return lambda x, w: nm.matmul(x, w, implementation=name)

    assert KERNEL not in lowered(named("xla"), x, ready(small))
    assert lowered(named("pallas"), x, fan_in).count(KERNEL) == 1
    # Where there is no native library, that is the reason.
    reason = "'native'(: .*library| serves CPUs only)"
    with pytest.raises(NotImplementedError, match=reason):
        lowered(named("native"), x, ready(small))
    with pytest.raises(NotImplementedError, match="'pallas' serves NVIDIA GPUs only"):
        jax.jit(named("pallas"))(x, ready(small))


def test_kernels_that_cannot_serve_give_way_or_say_why():
    small = grouped((128, 128))
    ampere = nm.prepare({"kernel": small}, "sm80")["kernel"]
    turned = dataclasses.replace(ready(small), axis=-1)
    cases = [
        (normal(0, (8, 128)), ampere, "the kernels for sm80 are experimental"),
        (normal(0, (8, 128)), turned, "groups along the inputs of a PreparedArray"),
        (normal(0, (0, 128)), ready(small), "there is nothing to compute"),
    ]
    for x, w, reason in cases:
        assert KERNEL not in lowered(nm.matmul, x, w)
        with pytest.raises(NotImplementedError, match=reason):
            lowered(lambda x, w: nm.matmul(x, w, implementation="pallas"), x, w)
        with pytest.raises(NotImplementedError, match=reason):
            products.multiply(x, w, None, Epilogue())
    reason = products.refusal(normal(0, (8, 128)), small, Epilogue())
    assert "prepare it once with nm.prepare" in reason


def test_kernels_lower_under_transformations():
    layers = [ready(grouped((128, 128), seed=seed)) for seed in range(2)]
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    x = normal(0, (4, 128))

    def scanned(x, stack):
        @jax.checkpoint
        def layer(x, w):
            return nm.matmul(x, w, activation="relu"), None

        return lax.scan(layer, x, stack)[0]

    assert KERNEL in lowered(scanned, x, stack)
    assert KERNEL in lowered(jax.vmap(nm.matmul, (None, 0)), x, stack)
    assert KERNEL in lowered(jax.vmap(nm.matmul, (0, None)), x[None], layers[0])

    def loss(x, stack):
        return jnp.sum(scanned(x, stack).astype(jnp.float32))

    assert KERNEL in lowered(jax.grad(loss), x, stack)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    mapped = jax.shard_map(
        nm.matmul, mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
    )
    assert KERNEL in lowered(mapped, normal(0, (8, 128)), layers[0])
    # The same programs on this platform.
    dense = [w.todense() for w in layers]
    expected = jax.nn.relu(jax.nn.relu(x @ dense[0]) @ dense[1])
    found = jax.jit(scanned)(x, stack)
    np.testing.assert_allclose(
        np.asarray(found, np.float32), np.asarray(expected, np.float32), 0.05, 0.5
    )


def test_exported_programs_hold_the_kernel_and_run_elsewhere():
    x, w = normal(0, (4, 128)), ready(grouped((128, 128)))
    kernels = [export.DisabledSafetyCheck.custom_call(KERNEL)]
    program = export.export(
        jax.jit(nm.matmul), platforms=["cpu", "cuda", "tpu"], disabled_checks=kernels
    )(x, w)
    again = export.deserialize(program.serialize())
    assert KERNEL in again.mlir_module()
    np.testing.assert_array_equal(
        np.asarray(again.call(x, w), np.float32),
        np.asarray(nm.matmul(x, w), np.float32),
    )
    rows = jax.ShapeDtypeStruct(export.symbolic_shape("batch, 128"), x.dtype)
    symbolic = export.export(jax.jit(nm.matmul), platforms=["cuda"])(rows, w)
    assert KERNEL not in symbolic.mlir_module()


# Several GPUs -----------------------------------------------------------------------


def compiled_for_four(function, x, w, rows, weights):
    mesh = topologies.make_mesh(devices("sm90", 4), (2, 2), ("data", "model"))

    def spread(spec):
        def one(leaf):
            fits = P(*spec, *(None,) * (leaf.ndim - len(spec)))
            sharding = NamedSharding(mesh, fits)
            return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

        return one

    x, w = spread(rows)(x), jax.tree.map(spread(weights), w)
    options = {"xla_gpu_autotune_level": "0"}
    program = jax.jit(function).lower(x, w).compile(options)
    collectives = re.findall(
        r"(all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)"
        r"(?:-start)?\(",
        program.as_text(),
    )
    return program, collectives


def activated(x, w):
    bias = jnp.ones(w.shape[1], x.dtype)
    return nm.matmul(x, w, bias=bias, activation="relu")


@needs_compiler
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("function", [nm.matmul, activated])
def test_four_gpus_share_rows_and_outputs_without_collectives(function, prepared):
    small = grouped((256, 512))
    w = ready(small) if prepared else small
    x = normal(0, (128, 256))
    program, found = compiled_for_four(function, x, w, ("data", None), ("model", None))
    assert not found
    assert program.output_shardings.spec == P("data", "model")
    assert (KERNEL in program.as_text()) == prepared


@needs_compiler
@pytest.mark.parametrize("prepared", [False, True])
@pytest.mark.parametrize("function", [nm.matmul, activated])
def test_four_gpus_complete_sums_by_one_reduction(function, prepared):
    small = grouped((256, 512))
    w = ready(small) if prepared else small
    x = normal(0, (128, 256))
    program, found = compiled_for_four(
        function, x, w, ("data", "model"), (None, "model")
    )
    assert found == ["all-reduce"]
    assert (KERNEL in program.as_text()) == prepared


@needs_compiler
def test_parts_that_no_kernel_takes_are_gathered():
    x, w = normal(0, (128, 256)), ready(grouped((256, 128)))
    program, found = compiled_for_four(nm.matmul, x, w, ("data", None), ("model", None))
    assert set(found) == {"all-gather"} and KERNEL in program.as_text()
