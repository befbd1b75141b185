"""The kernel for Ampere: interpreted on a CPU, compiled for a GPU, run from assembly.

It has never run on hardware.
"""

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from deviceless import compile_kernels, interpreted, needs_compiler

from nmjax import formats
from nmjax.formats import prepared
from nmjax.kernels.gpu import ampere
from nmjax.kernels.gpu.ampere import Tiles

new_enough = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the layouts of warp-level instructions came with jax 0.11",
)
SMALL = Tiles(outputs=64, rows=16, inputs=128, warps=4, stages=2)
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
    ready = prepared.PreparedArray.from_canonical(small, "sm80")
    return ready, np.asarray(dense, np.float64)


def vars_behind(small):
    return small.codes, small.n, small.m, small.axis, small.dense_shape


def run(ready, x, **settings):
    settings = {"interpret": plgpu.InterpretGPUParams(), "tiles": SMALL} | settings
    return ampere.multiply(ready.values, ready.image, x, **settings)


@interpreted
@pytest.mark.parametrize(
    ("dtype", "batch", "inputs", "tiles"),
    [
        ("bfloat16", 5, 384, SMALL),
        ("float16", 40, 256, Tiles(128, 32, 64, 2, 3)),
        ("int8", 17, 128, Tiles(64, 16, 128, 4, 4)),  # fewer steps than stages
    ],
)
def test_products_are_what_weights_stand_for(dtype, batch, inputs, tiles):
    ready, dense = weights(dtype, inputs, 128)
    x = draw((batch, inputs), dtype, 2)
    out = run(ready, x, tiles=tiles, out_dtype=jnp.float32)
    assert out.shape == (batch, 128)
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)


@interpreted
def test_scales_bias_and_activation_follow_the_sums():
    ready, dense = weights("bfloat16", 128, 128)
    x, bias = draw((3, 128), "bfloat16", 2), draw((128,), "bfloat16", 3)
    scales = draw((128, 1), "bfloat16", 4)
    out = run(ready, x, scales=scales, bias=bias, activation="silu")
    sums = np.asarray(x, np.float64) @ dense * np.asarray(scales, np.float64)[:, 0]
    sums += np.asarray(bias, np.float64)
    assert out.dtype == jnp.bfloat16
    expected = sums / (1 + np.exp(-sums))
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-8, atol=1e-6)


@interpreted
def test_int8_gives_its_sums_where_nothing_is_done_with_them():
    ready, dense = weights("int8", 128, 128)
    x = draw((3, 128), "int8", 2)
    out = run(ready, x, tiles=None)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)


@pytest.mark.parametrize("rows", [1, 16, 33, 64, 65, 4096])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_two_blocks_fit_into_a_multiprocessor(rows, dtype):
    tiles = ampere.default_tiles(rows, dtype)
    size = jnp.dtype(dtype).itemsize
    step = tiles.inputs * (tiles.outputs * (size / 2 + 1 / 8) + tiles.rows * size)
    stored = 16 * (tiles.outputs * max(size, 4 // size) + 16)
    # CUDA itself takes 1 KiB for every block.
    assert 2 * (tiles.stages * step + stored + 1024) <= 164 * 1024
    assert tiles.rows >= min(rows, 128)


# The compiler -----------------------------------------------------------------------


def shapes(dtype, batch, outputs=256, inputs=1024):
    return (
        jax.ShapeDtypeStruct((outputs, inputs // 2), dtype),
        jax.ShapeDtypeStruct((outputs // 64, inputs // 64, 128), "int32"),
        jax.ShapeDtypeStruct((batch, inputs), dtype),
    )


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "batch", "settings"),
    [
        ("bfloat16", 8, {}),
        ("bfloat16", 200, {"activation": "gelu"}),
        ("float16", 33, {"out_dtype": jnp.float32}),
        ("int8", 1, {}),
        ("int8", 200, {"activation": "silu"}),
    ],
)
def test_it_compiles_for_the_a100(dtype, batch, settings, tmp_path, monkeypatch):
    def multiply(values, image, x, scales, bias):
        return ampere.multiply(values, image, x, scales=scales, bias=bias, **settings)

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
        target="sm80",
        folder=tmp_path,
        monkeypatch=monkeypatch,
    )
    kinds = {
        "bfloat16": "m16n8k32.row.col.f32.bf16.bf16.f32",
        "float16": "m16n8k32.row.col.f32.f16.f16.f32",
        "int8": "m16n8k64.row.col.s32.s8.s8.s32",
    }
    tiles = ampere.default_tiles(batch, dtype)
    depth = 64 if dtype == "int8" else 32
    count = tiles.outputs // 16 * tiles.rows // 8 * tiles.inputs // depth // 4
    assert kernel.instructions == {
        f"mma.sp::ordered_metadata.sync.aligned.{kinds[dtype]}": count
    }
    assert kernel.spilled_bytes == 0
    assert ".target sm_80" in kernel.ptx
    for name in ("cp.async.cg.shared.global", "ldmatrix.sync"):
        assert name in kernel.ptx


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "out_dtype", "tiles"),
    [
        ("bfloat16", "float32", SMALL),
        ("float16", "float16", Tiles(64, 32, 64, 4, 4)),
        ("bfloat16", "bfloat16", Tiles(128, 32, 64, 2, 3)),
        ("int8", "float32", Tiles(128, 32, 64, 2, 3)),
    ],
)
def test_compiled_threads_compute_the_product(
    dtype, out_dtype, tiles, tmp_path, monkeypatch
):
    ready, dense = weights(dtype, 256, 128)
    x, bias = draw((tiles.rows, 256), dtype, 2), draw((128,), "float32", 3)
    scales = draw((128, 1), "bfloat16", 4)

    def multiply(values, image, x, scales, bias):
        return ampere.multiply(
            values,
            image,
            x,
            scales=scales,
            bias=bias,
            activation="relu",
            out_dtype=out_dtype,
            tiles=tiles,
        )

    arrays = (ready.values, ready.image, x, scales, bias)
    (kernel,) = compile_kernels(
        multiply, *arrays, target="sm80", folder=tmp_path, monkeypatch=monkeypatch
    )
    sums = np.asarray(x, np.float64) @ dense * np.asarray(scales, np.float64)[:, 0]
    expected = np.maximum(sums + np.asarray(bias, np.float64), 0)
    for early in (False, True):
        # The compiler lists operands in an order of its own.
        out = ptx.run(
            kernel.ptx,
            [np.asarray(a) for a in (ready.image, scales, bias, ready.values, x)],
            (tiles.rows, 128),
            out_dtype,
            (1, 128 // tiles.outputs, 1),
            128,
            result=3,
            early=early,
        )
        np.testing.assert_array_equal(out, jnp.asarray(expected).astype(out_dtype))


# Refusals ---------------------------------------------------------------------------


def test_what_it_does_not_multiply_is_refused():
    def refuse(values, x):
        return ampere.refusal(jnp.zeros((128, 64), values), jnp.zeros((1, 128), x))

    assert "bfloat16, float16 and int8, not float8_e4m3fn" in refuse(
        "float8_e4m3fn", "float8_e4m3fn"
    )
    assert "of their dtype, not int8 with bfloat16" in refuse("int8", "bfloat16")
    reason = refuse("bfloat16", "bfloat16")
    assert reason == "" or "needs jax >= 0.11" in reason
    with pytest.raises(NotImplementedError, match="not float32"):
        ampere.multiply(
            jnp.zeros((128, 64)), jnp.zeros((2, 2, 128), jnp.int32), jnp.zeros((1, 128))
        )


@new_enough
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": jnp.ones((2, 64), "bfloat16")}, r"x of shape \(2, 64\) must be"),
        ({"image": jnp.zeros((2, 4, 128), "int32")}, "has words for each instruction"),
        ({"image": jnp.zeros((1, 2, 128), "int32")}, r"image int32\[1, 2, 128\] does"),
        ({"bias": jnp.ones(64)}, r"bias of shape \(64,\) must be \(128,\)"),
        ({"activation": "tanh"}, "activation='tanh' is none of"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, message, unchecked):
    ready, _ = weights("bfloat16", 128, 128)
    x = jnp.ones((2, 128), "bfloat16")
    given = {"values": ready.values, "image": ready.image, "x": x} | change
    with pytest.raises(ValueError, match=message):
        ampere.multiply(**given)
