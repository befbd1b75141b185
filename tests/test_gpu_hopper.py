"""The kernels for Hopper, run by Pallas' interpreter on a CPU.

Instructions are emulated from the same operands, so that what is checked is all else:
the image of positions, what is loaded when, barriers, epilogues and the stores.
"""

import contextlib
import dataclasses
import io

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from deviceless import interpreted

from nmjax import formats
from nmjax.formats import images, prepared
from nmjax.kernels import reference
from nmjax.kernels.gpu import hopper, hopper_decode, hopper_weight_only, tiling
from nmjax.kernels.gpu.tiles import PROCESSORS, Tiles

KERNELS = {
    "hopper": hopper,
    "hopper_decode": hopper_decode,
    "hopper_weight_only": hopper_weight_only,
}
SMALL = {
    "hopper": Tiles(rows=64, inputs=128, stages=2, panel=2),
    "hopper_decode": Tiles(rows=8, inputs=128, stages=2, splits=2),
    "hopper_weight_only": Tiles(rows=16, inputs=128, stages=2),
}
ACTIVATIONS = {
    None: lambda y: y,
    "relu": lambda y: np.maximum(y, 0),
    "silu": lambda y: y / (1 + np.exp(-y)),
    "gelu": lambda y: y / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3))),
}


def draw(shape, dtype, seed):
    """Numbers that are exact in every dtype, and whose sums are in float32."""
    numbers = np.random.default_rng(seed).integers(-4, 5, shape)
    return jnp.asarray(numbers / (1 if dtype == "int8" else 4)).astype(dtype)


def weights(dtype, inputs=256, outputs=128, values=None):
    """A 2:4 array, prepared; and what it stands for, in float64."""
    dense = np.asarray(draw((inputs // 4, 4, outputs), dtype, 0), np.float64)
    order = np.random.default_rng(1).random(dense.shape).argsort(axis=1)
    mask = np.asarray(order < 2).reshape(inputs, outputs)
    dense = np.where(mask, dense.reshape(inputs, outputs), 0)
    small = formats.NMArray.from_dense(
        jnp.asarray(dense).astype(dtype), 2, 4, mask=jnp.asarray(mask)
    )
    if values is not None:
        small = formats.quantize(small, values)
        scales = np.asarray(small.scales, np.float64)
        exact = dataclasses.replace(
            small, values=jnp.asarray(small.values, jnp.float32), scales=None
        )
        dense = np.asarray(exact.todense(), np.float64) * scales[:, 0]
    return small, prepared.PreparedArray.from_canonical(small, "sm90"), dense


def run(kind, ready, x, tiles=None, detect_races=False, **settings):
    tiles = SMALL[kind] if tiles is None else tiles
    interpret = plgpu.InterpretGPUParams(detect_races=detect_races)
    return KERNELS[kind].multiply(
        ready.values,
        ready.image,
        x,
        scales=ready.scales,
        tiles=tiles,
        processors=2,
        interpret=interpret,
        **settings,
    )


@interpreted
@pytest.mark.parametrize(
    "dtype, batch",
    [
        ("bfloat16", 1),
        ("bfloat16", 70),
        ("float16", 5),
        ("float8_e4m3fn", 70),
        ("float8_e5m2", 5),
        ("int8", 70),
    ],
)
def test_matmul_computes_what_weights_stand_for(dtype, batch):
    _, ready, dense = weights(dtype)
    x = draw((batch, 256), dtype, 2)
    out = run("hopper", ready, x, out_dtype=jnp.float32)
    assert out.shape == (batch, 128)
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)


@interpreted
@pytest.mark.parametrize(
    "dtype, splits",
    [("bfloat16", 1), ("bfloat16", 3), ("float8_e4m3fn", 4), ("int8", 1), ("int8", 2)],
)
def test_decode_adds_up_parts_of_the_inputs(dtype, splits):
    _, ready, dense = weights(dtype, inputs=512)
    x = draw((5, 512), dtype, 2)
    tiles = dataclasses.replace(SMALL["hopper_decode"], splits=splits)
    out = run("hopper_decode", ready, x, tiles, out_dtype=jnp.float32)
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)


@interpreted
@pytest.mark.parametrize(
    "values, dtype, batch, splits",
    [
        ("int8", "bfloat16", 1, 2),
        ("int8", "float16", 70, 1),
        ("float8_e4m3fn", "bfloat16", 70, 1),
        ("float8_e5m2", "float16", 5, 2),
    ],
)
def test_weight_only_scales_sums_of_quantized_values(values, dtype, batch, splits):
    _, ready, dense = weights(dtype, values=values)
    assert ready.values.dtype == values
    x = draw((batch, 256), dtype, 2)
    tiles = dataclasses.replace(SMALL["hopper_weight_only"], splits=splits)
    out = run("hopper_weight_only", ready, x, tiles, out_dtype=jnp.float32)
    expected = np.asarray(x, np.float64) @ dense
    # Sums are exact, and so are their products with scales up to one rounding.
    np.testing.assert_allclose(out, expected, rtol=2e-7, atol=1e-5)


@interpreted
@pytest.mark.parametrize(
    "activation, splits",
    [(None, 1), (None, 2), ("relu", 1), ("silu", 1), ("gelu", 1), ("gelu", 2)],
)
def test_epilogue_is_computed_in_float32(activation, splits):
    _, ready, dense = weights("bfloat16")
    x, bias = draw((5, 256), "bfloat16", 2), draw((128,), "float32", 3)
    tiles = dataclasses.replace(SMALL["hopper_decode"], splits=splits)
    settings = {"bias": bias, "activation": activation, "out_dtype": jnp.float32}
    out = run("hopper_decode", ready, x, tiles, **settings)
    sums = np.asarray(x, np.float64) @ dense + np.asarray(bias, np.float64)
    np.testing.assert_allclose(out, ACTIVATIONS[activation](sums), rtol=1e-5, atol=1e-6)


@interpreted
def test_int8_sums_take_scales_bias_and_activation():
    _, ready, dense = weights("int8")
    scales = draw((128, 1), "bfloat16", 4)
    x, bias = draw((9, 256), "int8", 2), draw((128,), "bfloat16", 3)
    out = hopper.multiply(
        ready.values,
        ready.image,
        x,
        scales=scales,
        bias=bias,
        activation="relu",
        tiles=SMALL["hopper"],
        processors=1,
        interpret=plgpu.InterpretGPUParams(),
    )
    sums = np.asarray(x, np.float64) @ dense * np.asarray(scales, np.float64)[:, 0]
    expected = np.maximum(sums + np.asarray(bias, np.float64), 0)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_array_equal(out, jnp.asarray(expected).astype(jnp.bfloat16))


@interpreted
def test_int8_gives_its_sums_where_nothing_is_done_with_them():
    _, ready, dense = weights("int8")
    x = draw((3, 256), "int8", 2)
    out = run("hopper_decode", ready, x)
    assert out.dtype == jnp.int32
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)


@interpreted
@pytest.mark.parametrize("kind", ["hopper", "hopper_weight_only"])
def test_broadcast_images_give_the_same(kind):
    values = "int8" if kind == "hopper_weight_only" else None
    _, ready, _ = weights("bfloat16", values=values)
    x = draw((5, 256), "bfloat16", 2)
    wide = dataclasses.replace(ready, image=images.broadcast(ready.image))
    assert wide.image.shape == (2, 8, 128)
    np.testing.assert_array_equal(run(kind, wide, x), run(kind, ready, x))


@interpreted
@pytest.mark.parametrize(
    "kind, tiles",
    [
        ("hopper", Tiles(rows=64, inputs=64, stages=3)),
        ("hopper", Tiles(rows=72, inputs=128, stages=2)),  # three parts are stored
        ("hopper", Tiles(features=128, rows=160, inputs=128, stages=1)),
        ("hopper", Tiles(rows=64, inputs=64, stages=2, cluster=2)),
        ("hopper", Tiles(rows=64, inputs=64, stages=2, overlap=True)),
        ("hopper_decode", Tiles(rows=48, inputs=64, stages=2, splits=3)),
        ("hopper_decode", Tiles(rows=8, inputs=128, stages=2, together=True)),
        ("hopper_weight_only", Tiles(rows=16, inputs=64, stages=2, splits=1)),
        ("hopper_weight_only", Tiles(features=128, rows=16, inputs=64, splits=2)),
        ("hopper_weight_only", Tiles(rows=16, inputs=128, stages=2, together=True)),
    ],
)
def test_no_two_threads_race(kind, tiles):
    # More tiles than processors, and no more stages than steps.
    values = "int8" if kind == "hopper_weight_only" else None
    _, ready, dense = weights("bfloat16", outputs=256, values=values)
    x = draw((tiles.rows + 6, 256), "bfloat16", 2)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        out = run(kind, ready, x, tiles, detect_races=True)
        out = np.asarray(out, np.float64)
    assert not said.getvalue()
    expected = np.asarray(x, np.float64) @ dense
    np.testing.assert_allclose(out, expected, rtol=2**-8, atol=2**-8)


@interpreted
def test_default_tiles_compute_the_same_as_the_reference():
    small, ready, _ = weights("bfloat16")
    x = draw((3, 256), "bfloat16", 2)
    out = hopper_decode.multiply(
        ready.values, ready.image, x, interpret=plgpu.InterpretGPUParams()
    )
    expected = reference.by_decompression(x, small)
    assert out.dtype == expected.dtype
    np.testing.assert_allclose(
        out.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-8
    )


OPERANDS = [
    *(
        (kind, dtype, dtype)
        for kind in ("hopper", "hopper_decode")
        for dtype in ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
    ),
    *(
        ("hopper_weight_only", values, dtype)
        for values in ("int8", "float8_e4m3fn")
        for dtype in ("bfloat16", "float16")
    ),
]


def shapes(values, x, batch, outputs=512, inputs=1024):
    return (
        jax.ShapeDtypeStruct((outputs, inputs // 2), values),
        jax.ShapeDtypeStruct((outputs // 64, inputs // 64, 128), "int32"),
        jax.ShapeDtypeStruct((batch, inputs), x),
    )


def lower(kind, arrays, **settings):
    multiply = jax.jit(lambda *arrays: KERNELS[kind].multiply(*arrays, **settings))
    return multiply.trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("kind, values, x", OPERANDS)
def test_kernels_lower_for_cuda(kind, values, x):
    for batch in (1, 300):
        assert "mosaic_gpu" in lower(kind, shapes(values, x, batch))


@pytest.mark.parametrize("kind", ["hopper", "hopper_decode"])
@pytest.mark.parametrize("batch, padded", [(1, 0), (7, 0), (16, 0), (21, 1), (328, 0)])
def test_rows_are_filled_up_only_to_eights(kind, batch, padded):
    text = lower(kind, shapes("bfloat16", "bfloat16", batch))
    assert text.count("stablehlo.pad") == padded


def test_kernels_lower_where_integers_have_64_bits():
    with jax.enable_x64(True):
        assert "mosaic_gpu" in lower("hopper", shapes("bfloat16", "bfloat16", 300))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"x": jnp.ones((2, 128), "bfloat16")}, ValueError, r"x of shape \(2, 128\)"),
        ({"x": jnp.ones((0, 256), "bfloat16")}, ValueError, "at least one row"),
        ({"x": jnp.ones((2, 256), "float32")}, TypeError, "x of dtype float32 must be"),
        ({"x": jnp.ones((2, 256), "float16")}, TypeError, "bfloat16 and x is float16"),
        ({"image": jnp.zeros((2, 2, 128), "int32")}, ValueError, r"int32\[2, 4, 128\]"),
        ({"bias": jnp.ones(64)}, ValueError, r"bias of shape \(64,\) must be \(128,\)"),
        ({"scales": jnp.ones(128)}, ValueError, r"scales of shape .* \(128, 1\)"),
        ({"activation": "tanh"}, ValueError, "activation='tanh' is none of None, 're"),
        ({"out_dtype": jnp.int32}, TypeError, "out_dtype=int32 of a product with bfl"),
        ({"tiles": Tiles(splits=2)}, ValueError, "splits=2 .* hopper_decode"),
        ({"tiles": Tiles(rows=20)}, ValueError, "rows=20 must be a multiple of 8 up"),
        ({"tiles": Tiles(features=96)}, ValueError, "features=96 must be 64 or 128"),
        ({"tiles": Tiles(inputs=96)}, ValueError, "inputs=96 must be 64, 128"),
        ({"tiles": Tiles(cluster=2)}, ValueError, "do not divide the 128 of"),
        ({"tiles": Tiles(stages=6)}, ValueError, "of the 232448 of shared memory"),
    ],
)
def test_operands_that_do_not_fit_are_refused(change, error, message, unchecked):
    _, ready, _ = weights("bfloat16")
    given = {
        "values": ready.values,
        "image": ready.image,
        "x": jnp.ones((2, 256), "bfloat16"),
    }
    with pytest.raises(error, match=message):
        hopper.multiply(**given | change)


def test_values_that_were_not_filled_up_are_refused(unchecked):
    arrays = shapes("bfloat16", "bfloat16", 2, outputs=64)
    with pytest.raises(ValueError, match=r"\(64, 512\) have 64 outputs .* of 128"):
        lower("hopper", arrays)


def test_weight_only_refuses_operands_of_one_dtype():
    _, ready, _ = weights("bfloat16")
    x = jnp.ones((2, 256), "bfloat16")
    with pytest.raises(TypeError, match="8-bit values with 16-bit inputs"):
        hopper_weight_only.multiply(ready.values, ready.image, x)


@pytest.mark.parametrize("kind, dtype", sorted({o[:2] for o in OPERANDS}))
def test_default_tiles_fit_every_product(kind, dtype):
    x = "bfloat16" if kind == "hopper_weight_only" else dtype
    out = "int32" if x == "int8" else "float32"
    for features in (128, 384, 4096, 14336):
        for inputs in (128, 384, 4096, 14336):
            for rows in (1, 8, 9, 33, 64, 65, 200, 1000, 4096):
                tiles = tiling.choose(kind, dtype, features, inputs, rows)
                place = features, inputs
                assert not tiles.refusal(dtype, x, out, *place), place


def test_few_rows_give_work_to_half_of_the_multiprocessors():
    shapes = (4096, 4096), (11008, 4096), (4096, 14336), (8192, 8192), (14336, 4096)
    for features, inputs in shapes:
        for rows in (1, 64):
            tiles = tiling.choose("hopper_decode", "bfloat16", features, inputs, rows)
            blocks = features // tiles.block * tiles.splits
            assert blocks >= 0.48 * PROCESSORS, (features, inputs, tiles)
            assert inputs // tiles.inputs >= 2 * tiles.splits


def test_one_kernel_is_enough_for_wide_products():
    for features, inputs in ((4096, 4096), (14336, 4096), (4096, 14336)):
        for rows in (1, 16):
            tiles = tiling.choose("hopper_decode", "bfloat16", features, inputs, rows)
            assert tiles.splits == 1


def test_candidates_differ_and_fit():
    for kind, dtype in sorted({o[:2] for o in OPERANDS}):
        x = "bfloat16" if kind == "hopper_weight_only" else dtype
        for rows in (16, 4096):
            found = tiling.candidates(kind, dtype, 4096, 4096, rows)
            assert found[0] == tiling.default(kind, dtype, 4096, 4096, rows)
            assert len(set(found)) == len(found) >= 7
            for tiles in found:
                assert not tiles.refusal(dtype, x, "float32", 4096, 4096)


def test_measured_tiles_are_chosen_for_their_batch(monkeypatch):
    best = Tiles(rows=128, cluster=2)
    entry = ("hopper", "bfloat16", 4096, 4096, 1024)
    monkeypatch.setattr(tiling, "table", lambda: {entry: best})
    assert tiling.choose("hopper", jnp.bfloat16, 4096, 4096, 1000) == best
    assert tiling.choose("hopper", jnp.bfloat16, 4096, 4096, 1025) != best
    assert tiling.choose("hopper", jnp.float16, 4096, 4096, 1000) != best


def test_unknown_kernels_have_no_tiles():
    with pytest.raises(ValueError, match="kind='ampere' is none of hopper, hopper_d"):
        tiling.choose("ampere", jnp.bfloat16, 128, 128, 1)
