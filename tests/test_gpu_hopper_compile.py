"""The kernels for Hopper, compiled to machine code without a GPU."""

import jax
import jax.numpy as jnp
import pytest
from deviceless import compile_kernels, devices, needs_compiler

from nmjax.kernels.gpu import hopper, hopper_decode, hopper_weight_only, tiling
from nmjax.kernels.gpu.tiles import Tiles

KERNELS = {
    "hopper": hopper,
    "hopper_decode": hopper_decode,
    "hopper_weight_only": hopper_weight_only,
}
NAMES = {
    "bfloat16": "k32.f32.bf16.bf16",
    "float16": "k32.f32.f16.f16",
    "float8_e4m3fn": "k64.f32.e4m3.e4m3",
    "float8_e5m2": "k64.f32.e5m2.e5m2",
    "int8": "k64.s32.s8.s8",
}
FEATURES, INPUTS = 4096, 4096


def operands(values, x, rows, word_inputs=64, **vectors):
    """Shapes of the operands; vectors are dtypes of scales and bias."""
    arrays = {
        "values": ((FEATURES, INPUTS // 2), values),
        "image": ((FEATURES // 64, INPUTS // word_inputs, 128), "int32"),
        "x": ((rows, INPUTS), x),
    }
    if "scales" in vectors:
        arrays["scales"] = ((FEATURES, 1), vectors["scales"])
    if "bias" in vectors:
        arrays["bias"] = ((FEATURES,), vectors["bias"])
    return {name: jax.ShapeDtypeStruct(*array) for name, array in arrays.items()}


def compile_one(kind, arrays, folder, monkeypatch, **settings):
    """Compile a product, and check what the assembler made of its kernel."""
    (kernel,) = compile_kernels(
        lambda arrays: KERNELS[kind].multiply(**arrays, **settings),
        arrays,
        target="sm90",
        folder=folder,
        monkeypatch=monkeypatch,
    )
    assert kernel.spilled_bytes == 0, kernel.log
    assert "serializ" not in kernel.log, kernel.log
    return kernel


def check_instructions(kernel, tiles, x):
    """All sparse instructions of a step, or of several where the loop was unrolled."""
    inputs = 32 if jnp.dtype(x).itemsize == 2 else 64
    own = tiles.inputs // (1 + tiles.together)
    name = f"wgmma.mma_async.sp.sync.aligned.m64n{tiles.rows}{NAMES[x]}"
    found = {n: k for n, k in kernel.instructions.items() if "mma_async" in n}
    assert list(found) == [name]
    assert found[name] % (tiles.features // 64 * own // inputs) == 0


# Every kernel, dtype and tile that tuning may choose.
SWEPT = [
    *(("hopper", dtype, dtype, 4096) for dtype in NAMES),
    *(("hopper_decode", dtype, dtype, rows) for dtype in NAMES for rows in (16, 64)),
    *(
        ("hopper_weight_only", values, "bfloat16", rows)
        for values in ("int8", "float8_e4m3fn", "float8_e5m2")
        for rows in (16, 4096)
    ),
]
CANDIDATES = [
    (kind, values, x, rows, tiles)
    for kind, values, x, rows in SWEPT
    for tiles in tiling.candidates(kind, values, FEATURES, INPUTS, rows)
]
DEFAULTS = [
    *(("hopper", dtype, dtype, 4096) for dtype in NAMES),
    *(("hopper_decode", dtype, dtype, 16) for dtype in NAMES),
    *(
        ("hopper_weight_only", values, x, 16)
        for values in ("int8", "float8_e4m3fn", "float8_e5m2")
        for x in ("bfloat16", "float16")
    ),
]


def describe(value):
    """Name a test by what tiles differ in from the default."""
    if not isinstance(value, Tiles):
        return str(value)
    return "-".join(f"{name[:2]}{int(size)}" for name, size in vars(value).items())


@needs_compiler
@pytest.mark.parametrize("kind, values, x, rows, tiles", CANDIDATES, ids=describe)
def test_every_candidate_compiles(kind, values, x, rows, tiles, tmp_path, monkeypatch):
    arrays = operands(values, x, rows)
    kernel = compile_one(kind, arrays, tmp_path, monkeypatch, tiles=tiles)
    check_instructions(kernel, tiles, x)


@needs_compiler
@pytest.mark.parametrize("kind, values, x, rows", DEFAULTS)
def test_epilogues_compile(kind, values, x, rows, tmp_path, monkeypatch):
    arrays = operands(values, x, rows, scales="bfloat16", bias="float32")
    tiles = tiling.default(kind, values, FEATURES, INPUTS, rows)
    tiles = Tiles(**vars(tiles) | {"splits": 1})
    settings = {"tiles": tiles, "activation": "gelu", "out_dtype": jnp.float32}
    kernel = compile_one(kind, arrays, tmp_path, monkeypatch, **settings)
    check_instructions(kernel, tiles, x)
    assert "ex2.approx" in kernel.ptx


@needs_compiler
@pytest.mark.parametrize("kind, values, x", [
    ("hopper", "bfloat16", "bfloat16"),
    ("hopper_decode", "float16", "float16"),
    ("hopper_weight_only", "int8", "bfloat16"),
])  # fmt: skip
def test_broadcast_images_compile(kind, values, x, tmp_path, monkeypatch):
    arrays = operands(values, x, 7, word_inputs=32)
    tiles = tiling.choose(kind, values, FEATURES, INPUTS, 7)
    kernel = compile_one(kind, arrays, tmp_path, monkeypatch)
    check_instructions(kernel, tiles, x)


@needs_compiler
def test_pairs_of_instructions_select_different_threads(tmp_path, monkeypatch):
    def selectors(word_inputs):
        folder = tmp_path / str(word_inputs)
        folder.mkdir()
        arrays = operands("bfloat16", "bfloat16", 8, word_inputs)
        tiles = Tiles(rows=8, inputs=128, stages=3)
        ptx = compile_one("hopper", arrays, folder, monkeypatch, tiles=tiles).ptx
        lines = [line for line in ptx.splitlines() if "mma_async.sp" in line]
        # ... descriptor of x, word, selector, p, signs and transpositions.
        return [int(line.split(", p, ")[0].split(", ")[-1]) for line in lines]

    assert selectors(64) == [0, 1, 0, 1]
    assert selectors(32) == [0, 0, 0, 0]


@needs_compiler
@pytest.mark.parametrize(
    "kind, tiles, fusions",
    [
        ("hopper", None, 0),
        ("hopper_decode", None, 0),
        ("hopper_decode", Tiles(rows=8, inputs=128, splits=4), 1),
    ],
)
def test_there_is_one_kernel_and_one_fusion_to_add_up_parts(kind, tiles, fusions):
    sharding = jax.sharding.SingleDeviceSharding(devices("sm90").devices[0])
    arrays = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding)
        for name, a in operands("bfloat16", "bfloat16", 8, bias="bfloat16").items()
    }
    settings = {"activation": "silu", "tiles": tiles}
    product = jax.jit(lambda a: KERNELS[kind].multiply(**a, **settings))
    compiled = product.lower(arrays).compile({"xla_gpu_autotune_level": "0"})
    text = compiled.as_text()
    entry = text[text.index("ENTRY") :]
    assert entry.count("custom-call(") == 1
    assert entry.count(" fusion(") == fusions
    assert " copy(" not in entry and " pad(" not in entry
