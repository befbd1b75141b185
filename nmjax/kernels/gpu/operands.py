"""Checks of what the GPU kernels are given."""

from typing import Any

import jax
import jax.numpy as jnp

from nmjax.formats import images, prepared
from nmjax.kernels.gpu import finishing


def sizes(values: jax.Array, x: jax.Array) -> tuple[int, int, int]:
    """Give the outputs, inputs and rows of a product.

    Args:
      values: kept values, ``(F, K / 2)``.
      x: inputs, ``(batch, K)``.

    Returns:
      F, K and the batch.
    """
    return values.shape[0], x.shape[1], x.shape[0]


def check(
    values: jax.Array,
    image: jax.Array | None,
    x: jax.Array,
    scales: Any,
    bias: Any,
    activation: str | None,
    out_dtype: Any,
) -> None:
    """Check operands of a product with 2:4 weights against each other.

    Args:
      values: kept values, ``(F, K / 2)``.
      image: their positions, int32 ``(F / 64, K / 64, 128)``, or twice as long along
        its second axis for 16-bit inputs. None: its shape is another one.
      x: inputs, ``(batch, K)``.
      scales: None, or a factor of each output, ``(F, 1)``.
      bias: None, or what is added to each output, ``(F,)``.
      activation: of `nmjax.kernels.gpu.finishing.ACTIVATIONS`.
      out_dtype: None, or dtype of the results.

    Raises:
      ValueError: they do not fit.
      TypeError: the GPU has no instruction for these dtypes.
    """
    features, kept = values.shape
    multiple = prepared.MULTIPLE
    if features % multiple or 2 * kept % multiple or not values.size:
        raise ValueError(
            f"values of shape {values.shape} have {features} outputs and {2 * kept} "
            f"inputs, but both must be multiples of {multiple}; nmjax.prepare fills "
            "them up"
        )
    if x.ndim != 2 or x.shape[1] != 2 * kept or not x.shape[0]:
        raise ValueError(
            f"x of shape {x.shape} must be (batch, {2 * kept}) with at least one row, "
            f"for values of shape {values.shape}"
        )
    for name, array in (("values", values), ("x", x)):
        if str(array.dtype) not in prepared.DTYPES:
            raise TypeError(
                f"{name} of dtype {array.dtype} must be one of "
                f"{', '.join(prepared.DTYPES)}"
            )
    tiles, steps = features // images.FEATURES, 2 * kept // images.INPUTS
    shapes = [(tiles, steps, images.THREADS)]
    if x.dtype.itemsize == 2:
        shapes.append((tiles, 2 * steps, images.THREADS))
    unknown = image is not None and image.shape not in shapes
    if image is not None and (unknown or image.dtype != "int32"):
        raise ValueError(
            f"image {image.dtype}{list(image.shape)} does not belong to values of "
            f"shape {values.shape}: it must be int32{list(shapes[0])}, from "
            "formats.images.encode"
        )
    vectors = (("scales", scales, (features, 1)), ("bias", bias, (features,)))
    for name, vector, shape in vectors:
        if vector is not None and vector.shape != shape:
            raise ValueError(
                f"{name} of shape {vector.shape} must be {shape}, one for each output "
                "of the values"
            )
    if activation not in finishing.ACTIVATIONS:
        names = ", ".join(map(repr, finishing.ACTIVATIONS))
        raise ValueError(f"activation={activation!r} is none of {names}")
    known = ["bfloat16", "float16", "float32"]
    if x.dtype == "int8":
        known.append("int32")
    if out_dtype is not None and str(jnp.dtype(out_dtype)) not in known:
        raise TypeError(
            f"out_dtype={jnp.dtype(out_dtype)} of a product with {x.dtype} must be one "
            f"of {', '.join(known)}"
        )


def check_same(values: jax.Array, x: jax.Array) -> None:
    """Check that operands have one dtype.

    Args:
      values: kept values.
      x: inputs.

    Raises:
      TypeError: they have not.
    """
    if values.dtype != x.dtype:
        raise TypeError(
            f"values are {values.dtype} and x is {x.dtype}, but this kernel multiplies "
            "operands of one dtype; hopper_weight_only takes 8-bit values with 16-bit "
            "inputs"
        )
