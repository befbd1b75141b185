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

from nmjax import formats
from nmjax.formats import images, prepared
from nmjax.kernels import reference
from nmjax.kernels.gpu import hopper, hopper_decode, hopper_weight_only, tiling
from nmjax.kernels.gpu.tiling import Tiles

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"),
    reason="the interpreter of GPU kernels came with jax 0.11",
)
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
@pytest.mark.parametrize("batch", [1, 70])
@pytest.mark.parametrize(
    "dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8"]
)
def test_matmul_computes_what_weights_stand_for(dtype, batch):
    _, ready, dense = weights(dtype)
    x = draw((batch, 256), dtype, 2)
    out = run("hopper", ready, x, out_dtype=jnp.float32)
    assert out.shape == (batch, 128)
    np.testing.assert_array_equal(out, np.asarray(x, np.float64) @ dense)
