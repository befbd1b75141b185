"""Products with blocks for GPUs, without a GPU.

Pallas' interpreter runs what is written for warpgroups, with matrix instructions
emulated. What is written for single threads runs on the machine of `ptx`, as compiled
for Hopper.
"""

import contextlib
import io
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from deviceless import compile_kernels, interpreted, needs_compiler

from nmjax.kernels.gpu import blocks, narrow, wide
from nmjax.kernels.gpu.narrow import Tiles

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


def weights(shape, block, dtype):
    """Blocks, four in ten of all of them and none in the second column."""
    (length, width), (inputs, outputs) = shape, block
    grid = width // outputs, length // inputs
    some = np.random.default_rng(length).random(grid) < 0.4
    some[0, 0], some[1] = True, False
    columns, rows = np.nonzero(some)
    values = draw((len(rows), inputs, outputs), dtype, 1)
    return values, jnp.asarray(rows, jnp.uint16), jnp.asarray(columns, jnp.uint8)


def starts(columns, shape, block):
    """The first block of each column, and behind the last one their number."""
    bounds = np.searchsorted(np.asarray(columns), np.arange(shape[1] // block[1] + 1))
    return jnp.asarray(bounds, jnp.int32)


def expected(shape, values, rows, columns, x, scales=None, bias=None, activation=None):
    """The definition in float64, block by block."""
    x, values = np.asarray(x, np.float64), np.asarray(values, np.float64)
    total = np.zeros((len(x), shape[1]))
    _, inputs, outputs = values.shape
    factors = np.ones(len(values)) if scales is None else np.ravel(scales)
    places = np.asarray(rows, int) * inputs, np.asarray(columns, int) * outputs
    for block, row, column, factor in zip(values, *places, factors, strict=True):
        part = x[:, row : row + inputs] @ block * factor
        total[:, column : column + outputs] += part
    if bias is not None:
        total = total + np.asarray(bias, np.float64)
    return ACTIVATIONS[activation](total)


def assert_close(out, wanted, activation):
    if activation in ("gelu", "silu"):
        np.testing.assert_allclose(out, wanted, rtol=2e-6, atol=2e-6)
    else:
        np.testing.assert_array_equal(out, wanted)


@interpreted
@pytest.mark.parametrize(
    "batch, shape, block, dtype, activation",
    [
        (1, (128, 192), (64, 64), "bfloat16", None),
        (33, (128, 96), (32, 32), "float16", "gelu"),
        (70, (256, 128), (128, 64), "bfloat16", "relu"),
    ],
)
def test_tensor_cores_multiply_large_blocks(batch, shape, block, dtype, activation):
    values, rows, columns = weights(shape, block, dtype)
    x, bias = draw((batch, shape[0]), dtype, 2), draw(shape[1:], dtype, 3)
    assert blocks.on_tensor_cores(values, x)
    out = blocks.multiply(
        values,
        rows,
        columns,
        x,
        dense_shape=shape,
        bias=bias,
        activation=activation,
        out_dtype=jnp.float32,
        interpret=plgpu.InterpretGPUParams(),
    )
    wanted = expected(shape, values, rows, columns, x, bias=bias, activation=activation)
    assert_close(out, wanted, activation)
    # The column without blocks has the bias only.
    alone = ACTIVATIONS[activation](np.asarray(bias, np.float64))
    empty = slice(block[1], 2 * block[1])
    np.testing.assert_allclose(out[0, empty], alone[empty], rtol=2e-6, atol=2e-6)


@interpreted
@pytest.mark.parametrize("block, dtype", [((32, 32), "bfloat16"), ((1, 16), "float32")])
def test_no_warpgroup_reads_what_another_one_writes(block, dtype):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    # Steps and chunks go round in shared memory.
    shape = (640, 96) if dtype == "bfloat16" else (96, 64)
    values, rows, columns = weights(shape, block, dtype)
    given = (values, rows, starts(columns, shape, block))
    x = draw((70 if dtype == "bfloat16" else 3, shape[0]), dtype, 2)
    settings = {
        "bias": None,
        "activation": None,
        "out_dtype": jnp.float32,
        "interpret": plgpu.InterpretGPUParams(detect_races=True),
    }
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        if dtype == "bfloat16":
            tiles = wide.Tiles(groups=2, inputs=32, outputs=32, stages=2)
            out = wide.multiply(*given, x, shape[1], tiles=tiles, **settings)
        else:
            tiles = Tiles(rows=4, outputs=64, inputs=32, warpgroups=2)
            out = narrow.multiply(*given, x, shape[1], tiles=tiles, **settings)
        wanted = expected(shape, values, rows, columns, x)
        np.testing.assert_array_equal(out, wanted)
    assert not gpu_callbacks.get_races().races_found, printed.getvalue()


# Rows, shape of the matrix and of blocks, dtypes of x and of values, tiles, activation.
SMALL = {
    "one row": (1, (72, 30), (3, 3), "float32", "float32", None, "gelu"),
    "outputs share an input": (
        *(3, (40, 48), (1, 16), "float32", "float32"),
        *(Tiles(4, 32, 64, 1), None),
    ),
    "chunks": (
        *(33, (72, 48), (2, 4), "float32", "float32"),
        *(Tiles(32, 32, 32, 2), "relu"),
    ),
    "scaled": (
        *(20, (72, 48), (4, 8), "bfloat16", "int8"),
        *(Tiles(32, 32, 96, 1), None),
    ),
    "bfloat16": (
        *(20, (72, 48), (1, 16), "bfloat16", "bfloat16"),
        *(Tiles(32, 32, 32, 1), "silu"),
    ),
    "float16": (
        *(9, (72, 48), (8, 8), "float16", "float8_e4m3fn"),
        *(Tiles(8, 32, 96, 1), None),
    ),
}


def small(case):
    batch, shape, block, dtype, kind, tiles, activation = SMALL[case]
    values, rows, columns = weights(shape, block, kind)
    bounds = starts(columns, shape, block)
    x = draw((batch, shape[0]), dtype, 2)
    settings = {"bias": draw(shape[1:], "float32", 3)}
    if dtype != kind:
        settings["scales"] = draw((len(values), 1, 1), "float32", 4)
    arrays = values, rows, bounds, x
    wanted = expected(
        shape, values, rows, columns, x, **settings, activation=activation
    )
    options = {"activation": activation, "out_dtype": jnp.float32, "tiles": tiles}
    return arrays, settings, options, wanted


@interpreted
@pytest.mark.parametrize("case", ["outputs share an input", "chunks", "scaled"])
def test_narrow_blocks_are_multiplied_as_defined(case):
    arrays, settings, options, wanted = small(case)
    out = narrow.multiply(
        *arrays,
        wanted.shape[1],
        **settings,
        **options,
        interpret=plgpu.InterpretGPUParams(),
    )
    assert_close(out, wanted, options["activation"])


@needs_compiler
@pytest.mark.parametrize("case", SMALL)
def test_compiled_threads_multiply_narrow_blocks(case, tmp_path, monkeypatch):
    arrays, settings, options, wanted = small(case)
    values, rows, bounds, x = arrays

    def multiply(arrays, settings):
        return narrow.multiply(*arrays, wanted.shape[1], **settings, **options)

    target = {"target": "sm90", "folder": tmp_path, "monkeypatch": monkeypatch}
    (kernel,) = compile_kernels(multiply, arrays, settings, **target)
    assert kernel.spilled_bytes == 0
    tiles = options["tiles"] or narrow.choose(values, x, wanted.shape[1])
    scales = [np.ravel(settings["scales"])] if "scales" in settings else []
    # Weights are loaded ahead of the only chunk, behind the first of several.
    several = tiles.inputs < x.shape[1]
    operands = [values, rows, bounds, *scales, x]
    if several:
        operands = [bounds, x, values, rows, *scales]
    out = ptx.run(
        kernel.ptx,
        [*operands, settings["bias"]],
        wanted.shape,
        np.float32,
        (-(-wanted.shape[1] // tiles.outputs), -(-len(x) // tiles.rows), 1),
        128 * tiles.warpgroups,
    )
    assert_close(out, wanted, options["activation"])


@needs_compiler
@pytest.mark.parametrize(
    "batch, block, dtype, expected",
    [
        (1, (64, 64), "bfloat16", "m64n64k16.f32.bf16.bf16"),
        (2048, (128, 128), "float16", "m64n128k16.f32.f16.f16"),
        (256, (16, 48), "bfloat16", "m64n48k16.f32.bf16.bf16"),
        (1, (1, 16), "float32", None),
        (256, (1, 16), "bfloat16", None),
        (2048, (64, 64), "float32", None),
    ],
)
def test_layer_of_3072_inputs_compiles_without_spills(
    batch, block, dtype, expected, tmp_path, monkeypatch
):
    count = 3072 // block[0] * (768 // block[1]) // 10
    shapes = [
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (
            ((count, *block), dtype),
            ((count,), "uint16"),
            ((count,), "uint8"),
            ((batch, 3072), dtype),
        )
    ]

    def multiply(values, rows, columns, x):
        return blocks.multiply(
            values, rows, columns, x, dense_shape=(3072, 768), activation="gelu"
        )

    target = {"target": "sm90", "folder": tmp_path, "monkeypatch": monkeypatch}
    (kernel,) = compile_kernels(multiply, *shapes, **target)
    assert kernel.spilled_bytes == 0
    assert "serializ" not in kernel.log
    name = f"wgmma.mma_async.sync.aligned.{expected}"
    assert (name in kernel.instructions) == (expected is not None)


@pytest.mark.parametrize("block, dtype", [((64, 64), "bfloat16"), ((2, 4), "float32")])
def test_lowers_on_a_machine_without_gpu(block, dtype):
    values, rows, columns = weights((128, 128), block, dtype)

    @jax.jit
    def multiply(x):
        return blocks.multiply(values, rows, columns, x, dense_shape=(128, 128))

    traced = multiply.trace(draw((33, 128), dtype, 0))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("batch", [1, 33, 256, 5000])
@pytest.mark.parametrize("block", [(1, 1), (1, 16), (5, 6), (64, 64)])
@pytest.mark.parametrize("length", [320, 20480])
def test_chosen_tiles_of_narrow_blocks_fit(batch, block, length):
    values = jax.ShapeDtypeStruct((1000, *block), "float32")
    x = jax.ShapeDtypeStruct((batch, length), "float32")
    tiles = narrow.choose(values, x, 384)
    assert tiles.outputs % (narrow.unit(block[1]) * tiles.warpgroups) == 0
    stages = 1 if tiles.inputs >= length else 2
    shared = stages * tiles.inputs * tiles.rows + tiles.outputs * (tiles.rows + 2)
    assert 4 * shared < 227 * 1024


@pytest.mark.parametrize("batch", [1, 256])
@pytest.mark.parametrize("block", [(16, 32), (64, 64), (256, 512), (48, 80), (768, 16)])
def test_chosen_tiles_of_tensor_cores_fit(batch, block):
    values = jax.ShapeDtypeStruct((10, *block), "bfloat16")
    x = jax.ShapeDtypeStruct((batch, 3 * block[0]), "bfloat16")
    tiles = wide.choose(values, x)
    assert not block[0] % tiles.inputs and not block[1] % tiles.outputs
    rows = 64 * tiles.groups
    loaded = 2 * tiles.stages * tiles.inputs * (rows + tiles.outputs)
    assert tiles.stages >= 2
    assert loaded + 4 * rows * tiles.outputs < 227 * 1024


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"values": ("int16", (4, 1, 8))},
            "values are int16; the kernel takes float32",
        ),
        ({"values": ("float32", (4, 8))}, r"values of shape \(4, 8\) have not 3 axes"),
        ({"values": ("float32", (0, 1, 8))}, "there is nothing to compute"),
        ({"x": ("int8", (3, 16))}, "x are int8; the kernel takes float32"),
        ({"x": ("float32", (2**20, 2**11))}, "counts up to"),
    ],
)
def test_refusals_say_why(change, message):
    given = {"values": ("float32", (4, 1, 8)), "x": ("float32", (3, 16)), **change}
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in given.values()]
    assert re.search(message, blocks.refusal(*shapes))


@pytest.mark.parametrize(
    "shape, settings, message",
    [
        ((16, 30), {}, r"\(16, 30\) is not a matrix of blocks of 1 inputs and 8 out"),
        ((32, 16), {}, r"x has shape \(3, 16\); for dense_shape=\(32, 16\)"),
        ((16, 16), {"bias": jnp.ones(5)}, r"bias has shape \(5,\); for dense_shape"),
        ((16, 16), {"activation": "tanh"}, "activation='tanh' is none of"),
    ],
)
def test_settings_that_do_not_fit_are_errors(shape, settings, message):
    values, rows, columns = weights((16, 16), (1, 8), "float32")
    x = draw((3, 16), "float32", 0)
    with pytest.raises(ValueError, match=message):
        blocks.multiply(values, rows, columns, x, dense_shape=shape, **settings)
