"""2:4 products on the sparse tensor cores of Hopper.

`product` makes the kernel of `hopper_kernel` for given operands, and serves
`hopper_decode` and `hopper_weight_only` too. All shapes are those of a `PreparedArray`:
outputs and inputs are multiples of 128.
"""

from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Int32, Num

from nmjax.kernels.gpu import finishing, operands, tiling
from nmjax.kernels.gpu.hopper_kernel import Kernel
from nmjax.kernels.gpu.tiles import GROUPS, Tiles, count_processors


def multiply(
    values: Num[Array, "F kept"],
    image: Int32[Array, "tiles steps 128"],
    x: Num[Array, "batch K"],
    *,
    scales: Num[Array, "F 1"] | None = None,
    bias: Num[Array, " F"] | None = None,
    activation: str | None = None,
    out_dtype: Any = None,
    tiles: Tiles | None = None,
    processors: int | None = None,
    interpret: Any = False,
) -> Num[Array, "batch F"]:
    r"""Multiply with 2:4 weights of the dtype of the inputs.

    .. math:: y_{bf} = \sigma\Big(s_f \sum_k W_{fk} \, x_{bk} + c_f\Big)

    Sums are float32, int32 for int8; scales, bias and activation are applied to them
    before they are cast.

    Args:
      values: kept values, ``(F, K / 2)``, bfloat16, float16, float8_e4m3fn,
        float8_e5m2 or int8.
      image: their positions, from `nmjax.formats.images.encode`, or from
        `nmjax.formats.images.broadcast`.
      x: inputs, ``(batch, K)``, of the same dtype. Rows are filled up to a multiple of
        8 where there are more than 8.
      scales: :math:`s`, a factor of each output, ``(F, 1)``.
      bias: :math:`c`, ``(F,)``.
      activation: :math:`\sigma`: None, ``"relu"``, ``"gelu"`` (approximated by tanh)
        or ``"silu"``.
      out_dtype: bfloat16, float16, float32 or int32. Default: as
        `nmjax.kernels.gpu.finishing.result_dtype` says.
      tiles: sizes. Default: `nmjax.kernels.gpu.tiling.choose`.
      processors: multiprocessors that take tiles. Default: all of the GPU.
      interpret: `plgpu.InterpretGPUParams` to run without a GPU.

    Returns:
      The product.

    Raises:
      ValueError: shapes, activation or tiles do not fit.
      TypeError: dtypes do not fit.
    """
    operands.check(values, image, x, scales, bias, activation, out_dtype)
    operands.check_same(values, x)
    if tiles is None:
        tiles = tiling.choose("hopper", x.dtype, *operands.sizes(values, x))
    if tiles.splits != 1:
        raise ValueError(f"splits={tiles.splits} needs hopper_decode")
    if out_dtype is None:
        out_dtype = finishing.result_dtype(x.dtype, scales, bias, activation)
    (results,) = product(
        values,
        image,
        x,
        scales=scales,
        bias=bias,
        activation=activation,
        out_dtype=out_dtype,
        tiles=tiles,
        processors=processors,
        interpret=interpret,
    )
    return results


def product(
    values: Array,
    image: Array,
    x: Array,
    *,
    scales: Array | None = None,
    bias: Array | None = None,
    activation: str | None = None,
    out_dtype: Any,
    tiles: Tiles,
    processors: int | None,
    interpret: Any,
) -> Array:
    """Run the kernel on operands that were checked.

    Args:
      values: as in `multiply`; 8-bit values with 16-bit x are widened in registers.
      image: as in `multiply`.
      x: as in `multiply`.
      scales: as in `multiply`.
      bias: as in `multiply`.
      activation: as in `multiply`.
      out_dtype: dtype of the results.
      tiles: sizes; with splits, inputs are cut into as many parts.
      processors: as in `multiply`.
      interpret: as in `multiply`.

    Returns:
      Results for each part of the inputs, ``(splits, batch, F)``.
    """
    features, inputs, batch = operands.sizes(values, x)
    word_inputs = inputs // image.shape[1]
    types = values.dtype, x.dtype, out_dtype
    if reason := tiles.refusal(*types, features, inputs, word_inputs):
        raise ValueError(f"{tiles} do not fit: {reason}")
    # The memory engine reads zeros where rows are missing and leaves out what it would
    # write there, but a tile of eight rows is missing as a whole or, if it is the only
    # one, in part. The interpreter reads nothing beyond an array.
    step = tiles.rows if interpret else 8 if batch > 8 else batch
    if missing := -batch % step:
        x = jnp.pad(x, ((0, missing), (0, 0)))
    given = {}
    if scales is not None:
        given["scales"] = scales.reshape(features)
    if bias is not None:
        given["bias"] = bias
    kernel = Kernel(
        batch=x.shape[0],
        features=features,
        inputs=inputs,
        word_inputs=word_inputs,
        values_dtype=values.dtype,
        x_dtype=x.dtype,
        out_dtype=jnp.dtype(out_dtype),
        given=tuple(given),
        activation=activation,
        tiles=tiles,
        interpreted=bool(interpret),
    )
    cluster = {}
    if tiles.cluster > 1:
        cluster = {"cluster": (tiles.cluster,), "cluster_names": ("member",)}
    processors = processors or count_processors()
    run = plgpu.kernel(
        kernel.body,
        out_type=jax.ShapeDtypeStruct(
            (tiles.splits, kernel.batch, kernel.features), kernel.out_dtype
        ),
        scratch_types=kernel.scratch(),
        grid=(min(processors // tiles.cluster, kernel.count),),
        grid_names=("processor",),
        num_threads=GROUPS + 1,
        thread_name="group",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,  # exp by the instruction, to 2 ulp
            lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
        ),
        interpret=interpret,
        **cluster,
    )
    return run(values, image, x, *given.values())[:, :batch]
