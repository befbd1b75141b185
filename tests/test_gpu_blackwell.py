"""The kernel for Blackwell: interpreted on a CPU, and compiled for a GPU.

It has never run on hardware.
"""

import contextlib
import io

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from deviceless import compile_kernels, interpreted, needs_compiler

from nmjax import formats
from nmjax.formats import prepared
from nmjax.kernels.gpu import blackwell
from nmjax.kernels.gpu.blackwell import Tiles

SMALL = Tiles(rows=16, stages=2, blocks=2)
PAIRS = np.array([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], np.uint8)


def draw(shape, dtype, seed):
    """Integers that are exact in every dtype, and so are their sums in float32."""
    numbers = np.random.default_rng(seed).integers(-4, 5, shape)
    return jnp.asarray(numbers.astype(np.float32)).astype(dtype)


def weights(dtype, inputs, outputs):
    """A prepared 2:4 array, and the dense array as float64."""
    pairs = np.random.default_rng(0).integers(0, 6, (inputs // 4, outputs))
    mask = np.zeros((inputs // 4, 4, outputs), bool)
    np.put_along_axis(mask, PAIRS[pairs].transpose(0, 2, 1), True, axis=1)
    mask = jnp.asarray(mask.reshape(inputs, outputs))
    dense = jnp.where(mask, draw((inputs, outputs), "float32", 1), 0)
    small = formats.NMArray.from_dense(dense.astype("bfloat16"), 2, 4, mask=mask)
    small = formats.NMArray(small.values.astype(dtype), None, *vars_behind(small))
    ready = prepared.PreparedArray.from_canonical(small, "sm100")
    return ready, np.asarray(dense, np.float64)


def vars_behind(small):
    return small.codes, small.n, small.m, small.axis, small.dense_shape


def run(ready, x, **settings):
    settings = {"interpret": plgpu.InterpretGPUParams(), "tiles": SMALL} | settings
    return blackwell.multiply(ready.values, ready.image, x, **settings)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "batch", "inputs", "tiles"),
    [
        ("float16", 40, 128, Tiles(16, 2, 1)),  # several tiles of one step
        ("float8_e4m3fn", 70, 256, Tiles(64, 3, 2)),
        ("int8", 17, 384, Tiles(32, 2, 1)),
    ],
)
def test_products_are_what_weights_stand_for(dtype, batch, inputs, tiles):
    ready, dense = weights(dtype, inputs, 256)
    x = draw((batch, inputs), dtype, 2)
    out = run(ready, x, tiles=tiles, out_dtype=jnp.float32)
    assert out.shape == (batch, 256)
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)


@interpreted
def test_scales_bias_and_activation_follow_the_sums():
    ready, dense = weights("bfloat16", 128, 128)
    x, bias = draw((3, 128), "bfloat16", 2), draw((128,), "bfloat16", 3)
    scales = draw((128, 1), "bfloat16", 4)
    out = run(ready, x, scales=scales, bias=bias, activation="gelu")
    sums = np.asarray(x, np.float64) @ dense * np.asarray(scales, np.float64)[:, 0]
    sums += np.asarray(bias, np.float64)
    inner = np.sqrt(2 / np.pi) * (sums + 0.044715 * sums**3)
    assert out.dtype == jnp.bfloat16
    expected = sums / 2 * (1 + np.tanh(inner))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


@interpreted
def test_int8_gives_its_sums_where_nothing_is_done_with_them():
    ready, dense = weights("int8", 128, 128)
    x = draw((3, 128), "int8", 2)
    out = run(ready, x, tiles=None)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)


@interpreted
@pytest.mark.parametrize("inputs", [128, 640])
def test_no_two_threads_race(inputs):
    # More tiles than blocks, and fewer or more steps than stages.
    ready, dense = weights("bfloat16", inputs, 256)
    x = draw((70, inputs), "bfloat16", 2)
    interpret = plgpu.InterpretGPUParams(detect_races=True)
    tiles = Tiles(rows=32, stages=3, blocks=1)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        out = run(ready, x, tiles=tiles, out_dtype=jnp.float32, interpret=interpret)
        out = np.asarray(out)
    assert not said.getvalue()
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)


# The compiler -----------------------------------------------------------------------


def shapes(dtype, batch, outputs=256, inputs=1024):
    return (
        jax.ShapeDtypeStruct((outputs, inputs // 2), dtype),
        jax.ShapeDtypeStruct((outputs // 128, inputs // 128, 128, 4), "int32"),
        jax.ShapeDtypeStruct((batch, inputs), dtype),
    )


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "kind", "batch", "settings"),
    [
        ("bfloat16", "f16", 8, {}),
        ("float16", "f16", 200, {"activation": "gelu", "out_dtype": jnp.float32}),
        ("float8_e5m2", "f8f6f4", 33, {}),
        ("int8", "i8", 200, {}),
        ("int8", "i8", 1, {"activation": "silu"}),
    ],
)
def test_it_compiles_for_the_b200(dtype, kind, batch, settings, tmp_path, monkeypatch):
    def multiply(values, image, x, scales, bias):
        return blackwell.multiply(
            values, image, x, scales=scales, bias=bias, **settings
        )

    vectors = (None, None)
    if settings:
        vectors = (
            jax.ShapeDtypeStruct((256, 1), "bfloat16"),
            jax.ShapeDtypeStruct((256,), "bfloat16"),
        )
    (kernel,) = compile_kernels(
        multiply,
        *shapes(dtype, batch),
        *vectors,
        target="sm100",
        folder=tmp_path,
        monkeypatch=monkeypatch,
    )
    products = {name for name in kernel.instructions if ".mma." in name}
    assert products == {f"tcgen05.mma.sp.cta_group::1.kind::{kind}"}
    assert "tcgen05.cp.cta_group::1.128x128b" in kernel.instructions
    assert kernel.spilled_bytes == 0
    assert ".target sm_100a" in kernel.ptx


# Refusals ---------------------------------------------------------------------------


def test_what_it_does_not_multiply_is_refused():
    def refuse(values, x):
        return blackwell.refusal(jnp.zeros((128, 64), values), jnp.zeros((1, 128), x))

    assert "of their dtype, not int8 with bfloat16" in refuse("int8", "bfloat16")
    reason = refuse("float8_e4m3fn", "float8_e4m3fn")
    assert reason == "" or "needs jax >= 0.11" in reason
    image = jnp.zeros((1, 1, 128, 4), jnp.int32)
    with pytest.raises(NotImplementedError, match="not float32"):
        blackwell.multiply(jnp.zeros((128, 64)), image, jnp.zeros((1, 128)))


@interpreted
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 64), "bfloat16")}, r"x of shape \(2, 64\) must be"),
        ({"image": jnp.zeros((2, 2, 128), "int32")}, r"it must be \(1, 1, 128, 4\)"),
        ({"bias": jnp.ones(64)}, r"bias of shape \(64,\) must be \(128,\)"),
        ({"activation": "tanh"}, "activation='tanh' is none of"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message, unchecked):
    ready, _ = weights("bfloat16", 128, 128)
    x = jnp.ones((2, 128), "bfloat16")
    given = {"values": ready.values, "image": ready.image, "x": x} | change
    with pytest.raises(ValueError, match=message):
        blackwell.multiply(**given)
