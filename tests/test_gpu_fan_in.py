"""The constant fan-in product for GPUs, without a GPU.

Pallas' interpreter runs what is written for warpgroups: chunks, barriers, tiles. What
is written for single threads runs on the machine of `ptx`, as compiled for Hopper.
"""

import contextlib
import io

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from deviceless import compile_kernels, interpreted, needs_compiler

from nmjax.kernels.gpu import fan_in
from nmjax.kernels.gpu.fan_in import Tiles
from nmjax.kernels.gpu.tiles import PROCESSORS

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


def weights(alive, k, inputs, dtype, index):
    generator = np.random.default_rng(alive)
    order = generator.permuted(np.tile(np.arange(inputs), (alive, 1)), axis=1)
    indices = np.sort(order[:, :k])
    return draw((alive, k), dtype, 1), jnp.asarray(indices.astype(index))


def expected(values, indices, x, scales=None, bias=None, activation=None):
    """The definition in float64, neuron by neuron."""
    x, values = np.asarray(x, np.float64), np.asarray(values, np.float64)
    columns = [
        x[:, own] @ row for own, row in zip(np.asarray(indices), values, strict=True)
    ]
    total = np.stack(columns, axis=1)
    if scales is not None:
        total = total * np.asarray(scales, np.float64)[:, 0]
    if bias is not None:
        total = total + np.asarray(bias, np.float64)
    return ACTIVATIONS[activation](total)


# Rows, neurons, inputs and weights of neurons, then what is special about the case.
SMALL = {
    "one row": (1, 6, 40, 5, Tiles(1, 4, 64, 1, 1), {"index": "uint8"}),
    "rows left over": (3, 9, 41, 7, Tiles(4, 8, 64, 4, 2), {"bias": True}),
    "chunks": (33, 5, 70, 33, Tiles(32, 4, 32, 4, 1), {"activation": "relu"}),
    "chunks, one weight": (5, 6, 70, 1, Tiles(8, 4, 32, 2, 1), {"bias": True}),
    "all weights": (5, 3, 40, 40, Tiles(8, 4, 32, 2, 1), {"activation": "gelu"}),
    "bfloat16": (33, 5, 72, 33, Tiles(64, 4, 32, 2, 1), {"x": "bfloat16"}),
    "float16": (9, 5, 103, 8, Tiles(8, 4, 128, 2, 1), {"x": "float16"}),
    "bfloat16, one row": (1, 5, 50, 9, Tiles(1, 4, 64, 4, 1), {"x": "bfloat16"}),
    "int8": (2, 5, 103, 33, Tiles(2, 4, 128, 4, 1), {"values": "int8"}),
    "float8": (2, 5, 50, 33, Tiles(2, 4, 64, 1, 1), {"values": "float8_e4m3fn"}),
    "other float8": (3, 5, 50, 11, Tiles(4, 4, 64, 4, 1), {"values": "float8_e5m2"}),
    "silu": (
        3,
        6,
        40,
        5,
        Tiles(4, 4, 64, 4, 1),
        {"index": "uint32", "activation": "silu"},
    ),
}


def small(case):
    batch, alive, inputs, k, tiles, special = SMALL[case]
    dtype = special.get("x", "bfloat16" if "values" in special else "float32")
    kind = special.get("values", dtype)
    values, indices = weights(alive, k, inputs, kind, special.get("index", "uint16"))
    settings = {"activation": special.get("activation")}
    if "values" in special:
        settings["scales"] = draw((alive, 1), "float32", 2)
    if "bias" in special:
        settings["bias"] = draw((alive,), dtype, 3)
    return values, indices, draw((batch, inputs), dtype, 4), settings, tiles


def assert_close(out, values, indices, x, settings):
    wanted = expected(values, indices, x, **settings)
    if settings["activation"] in ("gelu", "silu"):
        np.testing.assert_allclose(out, wanted, rtol=2e-6, atol=2e-6)
    else:
        np.testing.assert_array_equal(out, wanted)


@interpreted
@pytest.mark.parametrize("case", ["rows left over", "chunks", "int8"])
def test_product_is_that_of_the_definition(case):
    values, indices, x, settings, tiles = small(case)
    out = fan_in.multiply(
        values,
        indices,
        x,
        **settings,
        out_dtype=jnp.float32,
        tiles=tiles,
        interpret=plgpu.InterpretGPUParams(),
    )
    assert_close(out, values, indices, x, settings)


@interpreted
def test_no_thread_reads_what_another_one_writes():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    # Three chunks, two warpgroups: shared memory is written again while it is read.
    values, indices = weights(8, 20, 96, "float32", "uint8")
    x, tiles = draw((3, 96), "float32", 0), Tiles(4, 8, 32, 2, 2)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        out = fan_in.multiply(
            values,
            indices,
            x,
            tiles=tiles,
            interpret=plgpu.InterpretGPUParams(detect_races=True),
        )
        np.testing.assert_array_equal(out, expected(values, indices, x))
    assert not gpu_callbacks.get_races().races_found, printed.getvalue()


@needs_compiler
@pytest.mark.parametrize("case", SMALL)
def test_compiled_threads_compute_the_product(case, tmp_path, monkeypatch):
    values, indices, x, settings, tiles = small(case)
    given = {k: v for k, v in settings.items() if k != "activation" and v is not None}

    def multiply(values, indices, x, given):
        return fan_in.multiply(
            values,
            indices,
            x,
            **given,
            activation=settings["activation"],
            out_dtype=jnp.float32,
            tiles=tiles,
        )

    arguments = (values, indices, x, given)
    target = {"target": "sm90", "folder": tmp_path, "monkeypatch": monkeypatch}
    (kernel,) = compile_kernels(multiply, *arguments, **target)
    assert kernel.spilled_bytes == 0
    batch, alive = x.shape[0], values.shape[0]
    # Weights are loaded ahead of the only chunk, behind the first of several.
    weights = [values, indices]
    several = tiles.inputs < x.shape[1]
    operands = [x, *weights] if several else [*weights, x]
    out = ptx.run(
        kernel.ptx,
        [*operands, *given.values()],
        (batch, alive),
        np.float32,
        (-(-alive // tiles.neurons), -(-batch // tiles.rows), 1),
        128 * tiles.warpgroups,
    )
    assert_close(out, values, indices, x, settings)


@needs_compiler
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch", [1, 64, 256, 2048])
def test_layer_of_3072_inputs_compiles_without_spills(
    batch, dtype, tmp_path, monkeypatch
):
    shapes = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((768, 307), dtype),
            ((768, 307), "uint16"),
            ((batch, 3072), dtype),
        )
    ]
    target = {"target": "sm90", "folder": tmp_path, "monkeypatch": monkeypatch}
    (kernel,) = compile_kernels(fan_in.multiply, *shapes, **target)
    assert kernel.spilled_bytes == 0
    assert ".local" not in kernel.ptx
    # Pieces of 16 bytes from shared memory, four bytes a row of a single one.
    wide = "ld.shared.v4.b32" if batch > 1 else "ld.shared.b32"
    assert wide in kernel.ptx
    assert "ld.global.v" in kernel.ptx


@pytest.mark.parametrize("batch", [1, 33])
def test_lowers_on_a_machine_without_gpu(batch):
    values, indices = weights(6, 9, 40, "float32", "uint8")
    traced = jax.jit(fan_in.multiply).trace(
        values, indices, draw((batch, 40), "float32", 0)
    )
    lowered = traced.lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize("batch", [1, 2, 8, 33, 256, 5000])
@pytest.mark.parametrize(
    "length, alive, k", [(40, 3, 1), (3072, 768, 307), (20000, 9, 1000)]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_chosen_tiles_fit(batch, length, alive, k, dtype):
    tiles = fan_in.choose(batch, length, alive, k, dtype, dtype, "uint16")
    assert tiles.neurons % (4 * tiles.warpgroups) == 0
    assert tiles.inputs % 32 == 0
    stages = 1 if tiles.inputs >= length else 2
    size = max(jnp.dtype(dtype).itemsize, 4 // tiles.rows)
    shared = stages * tiles.inputs * tiles.rows * size
    assert shared + 4 * tiles.neurons * (tiles.rows + 2) < 227 * 1024


def test_wide_layers_fill_all_multiprocessors():
    tiles = fan_in.choose(1, 4096, 4096, 409, "float32", "float32", "uint16")
    assert 4096 / tiles.neurons >= 0.9 * PROCESSORS


@pytest.mark.parametrize(
    "change, message",
    [
        ({"values": ("int16", (6, 9))}, "values are int16; the kernel takes float32"),
        ({"indices": ("int32", (6, 9))}, "indices are int32; the kernel takes uint8"),
        ({"x": ("int8", (3, 40))}, "x are int8; the kernel takes float32"),
        ({"x": ("float32", (0, 40))}, "there is nothing to compute"),
        ({"x": ("float32", (40,))}, r"x of shape \(40,\) are no matrix"),
        ({"x": ("float32", (2**20, 2**11))}, "counts up to"),
    ],
)
def test_refusals_say_why(change, message, unchecked):
    given = {
        "values": ("float32", (6, 9)),
        "indices": ("uint8", (6, 9)),
        "x": ("float32", (3, 40)),
        **change,
    }
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in given.values()]
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(fan_in.multiply, *shapes)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"bias": jnp.ones(5)}, r"bias has shape \(5,\); for values of shape \(6, 9\)"),
        ({"scales": jnp.ones((6, 2))}, r"it must have \(6, 1\)"),
        ({"activation": "tanh"}, "activation='tanh' is none of"),
    ],
)
def test_settings_that_do_not_fit_are_errors(settings, message, unchecked):
    values, indices = weights(6, 9, 40, "float32", "uint8")
    with pytest.raises(ValueError, match=message):
        fan_in.multiply(values, indices, draw((3, 40), "float32", 0), **settings)
