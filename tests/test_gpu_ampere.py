"""The kernel for Ampere: interpreted on a CPU, and compiled for a GPU.

It has never run on hardware. What reaches its instruction is compared with what the PTX
manual says that the instruction does.
"""

import types

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest
from deviceless import compile_kernels, needs_compiler

from nmjax import formats
from nmjax.formats import prepared
from nmjax.kernels.gpu import ampere
from nmjax.kernels.gpu.ampere import Tiles

new_enough = pytest.mark.skipif(
    jax.__version_info__ < (0, 11),
    reason="the layouts of warp-level instructions came with jax 0.11",
)
interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of GPU kernels came with jax 0.11",
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


# The instruction --------------------------------------------------------------------


class Registers:
    """A matrix in registers, as a `FragmentedArray` gives them to all 128 threads."""

    def __init__(self, array, layout, dtype):
        self.array, self.layout, self.mlir_dtype = array, layout, dtype

    @property
    def shape(self):
        return self.array.shape

    @property
    def registers(self):
        """Arrays ``(warp, lane, value)``, as they are ordered in a thread."""
        tiled = self.array
        for tile in self.layout.tiling.tiles:
            rank = tiled.ndim - len(tile)
            split = [
                part
                for length, size in zip(tiled.shape[rank:], tile, strict=True)
                for part in (length // size, size)
            ]
            tiled = tiled.reshape(*tiled.shape[:rank], *split)
            order = [rank + 2 * i for i in range(len(tile))]
            order += [axis + 1 for axis in order]
            tiled = tiled.transpose(*range(rank), *order)
        lanes = list(self.layout.lane_dims)
        # A dimension that several warps hold the same of is appended.
        warps = []
        for dim in self.layout.warp_dims:
            if not isinstance(dim, int):
                tiled = np.broadcast_to(tiled, (dim.times, *tiled.shape))
                dim = -tiled.ndim
            warps.append(dim)
        named = [*warps, *lanes, self.layout.vector_dim]
        rest = [dim for dim in range(-tiled.ndim, 0) if dim not in named]
        ordered = tiled.transpose(*(dim % tiled.ndim for dim in rest + named))
        vector = tiled.shape[self.layout.vector_dim]
        ordered = ordered.reshape(-1, 4, 32, vector)
        found = np.empty(len(ordered), object)
        for i, register in enumerate(ordered):
            found[i] = register
        return found

    def copy(self):
        return Registers(self.array.copy(), self.layout, self.mlir_dtype)

    def __getitem__(self, place):
        return Registers(self.array[place], self.layout, self.mlir_dtype)

    def __setitem__(self, place, tile):
        self.array[place] = tile.array


def multiply_as_ptx_says(dtype, selector, sums, a, b, positions):
    """Do what the manual says of mma.sp m16n8k32 (16 bits) and m16n8k64 (8 bits)."""
    eight = dtype == "i8"
    per, depth = (4, 64) if eight else (2, 32)  # values of a register; inputs
    rows, columns = sums.shape
    result = sums.copy()
    for warp in range(4):
        kept = np.zeros((16, depth // 2))
        inputs = np.zeros((depth, 8))
        groups = np.zeros((16, depth // 4), int)
        for lane in range(32):
            quad, of_quad = divmod(lane, 4)
            for i in range(4):
                for e in range(per):
                    # First the row of the quad, then the one 8 below; then columns.
                    row, column = quad + 8 * (i % 2), of_quad * per + e
                    kept[row, column + 4 * per * (i // 2)] = a[i][warp, lane, e]
                    inputs[column + 4 * per * i, quad] = b[i][warp, lane, e]
            word = int(positions[32 * warp + lane])
            for i in range(8):
                code = word >> 4 * i & 15
                if eight:
                    groups[quad + 8 * (of_quad % 2), 8 * (of_quad // 2) + i] = code
                elif of_quad // 2 == selector:
                    groups[quad + 8 * (i // 4), 4 * (of_quad % 2) + i % 4] = code
        dense = np.zeros((16, depth))
        for row in range(16):
            for group, code in enumerate(groups[row]):
                for i in range(2):
                    place = 4 * group + (code >> 2 * i & 3)
                    dense[row, place] = kept[row, 2 * group + i]
        product = dense @ inputs
        # The tile of this warp, found by numbering the registers of the sums.
        numbers = Registers(
            np.arange(rows * columns).reshape(rows, columns), sums.layout, ""
        )
        for i in range(2):
            for lane in range(32):
                for e in range(2):
                    place = divmod(int(numbers.registers[i][warp, lane, e]), columns)
                    row, column = lane // 4 + 8 * i, 2 * (lane % 4) + e
                    result.array[place] += product[row, column]
    return result


@new_enough
@pytest.mark.parametrize("warps", [2, 4])
@pytest.mark.parametrize(("dtype", "name"), [("bfloat16", "bf16"), ("int8", "i8")])
def test_instructions_get_the_registers_that_they_want(
    dtype, name, warps, monkeypatch, unchecked
):
    threads = np.arange(128)
    place = {
        "constant": lambda kind, value: np.full(128, value),
        "index_cast": lambda kind, value: value,
        "remui": np.remainder,
        "divui": np.floor_divide,
        "addi": np.add,
        "muli": np.multiply,
    }
    kinds = types.SimpleNamespace(get_signless=lambda width: None, get=lambda: None)
    fakes = {
        "arith": place,
        "ir": {"IntegerType": kinds, "IndexType": kinds},
        "memref": {"load": lambda ref, place: ref[tuple(place)]},
        "utils": {
            "thread_idx": lambda: threads,
            "bitwidth": lambda kind: 8 if kind == "i8" else 16,
            "bitcast": lambda register, kind: register,
        },
    }
    for module, functions in fakes.items():
        monkeypatch.setattr(ampere, module, types.SimpleNamespace(**functions))
    monkeypatch.setattr(ampere, "_issue", multiply_as_ptx_says)

    outputs, rows, inputs = 128, 32, 128
    ready, dense = weights(dtype, inputs, outputs)
    x = np.asarray(draw((rows, inputs), dtype, 2), np.float64)
    acc, lhs, rhs = (
        layout(jnp.dtype(dtype), m_warps=warps).to_mgpu()
        for layout in (
            plgpu.Layout.MMA_ACC,
            plgpu.Layout.MMA_LHS,
            plgpu.Layout.MMA_RHS,
        )
    )
    kept = np.asarray(ready.values).astype(np.float64)
    sums = ampere._mma_sp(
        Registers(np.ones((outputs, rows)), acc, "f32"),
        Registers(kept[:, : inputs // 2], lhs, name),
        Registers(x.T, rhs, name),
        np.asarray(ready.image).view(np.uint32),
        warps,
    )
    np.testing.assert_array_equal(sums.array, 1 + dense.T @ x.T)


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
