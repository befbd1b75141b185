"""Validation: what was not made by `from_dense` may hold anything."""

import math
from typing import Any

import jax.numpy as jnp

from nmjax.formats.blocks import BlockArray
from nmjax.formats.checks import Compressed, check_concrete, first_place
from nmjax.formats.fan_in import FanInArray
from nmjax.formats.grouped import NMArray
from nmjax.formats.windows import LANES, SLOTS, WINDOW, WindowArray


def validate(small: Compressed) -> Compressed:
    """Check positions of a compressed array that was read from somewhere.

    Products trust positions: they are checked when an array is made by ``from_dense``,
    and not at every call. Arrays from elsewhere, a file for example, should pass here
    once; an index that is out of range would read memory that is not the array's.

    Args:
      small: a compressed array, not traced; stacks are checked layer by layer.

    Returns:
      The same array.

    Raises:
      ValueError: shapes do not fit together, or positions are out of range or not in
        the order that the format has; the message names the first.
      TypeError: the array is traced.

    Example:
      >>> import dataclasses
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> small = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> formats.validate(small) is small
      True
      >>> wrong = dataclasses.replace(small, indices=small.indices + 1)
      >>> formats.validate(wrong)
      Traceback (most recent call last):
      ...
      ValueError: indices at (0, 0) is 2, but must be below 2
    """
    check_concrete("formats.validate", small.values)
    if isinstance(small, FanInArray):
        _validate_fan_in(small)
    elif isinstance(small, WindowArray):
        _validate_windows(small)
    elif isinstance(small, NMArray):
        _validate_groups(small)
    elif isinstance(small, BlockArray):
        _validate_blocks(small)
    return small


def _validate_fan_in(small: FanInArray) -> None:
    _check_shape("indices", small.indices, small.values.shape)
    _check_shape("neurons", small.neurons, small.values.shape[:-1])
    _check_below("indices", small.indices, small.inputs)
    _check_below("neurons", small.neurons, small.outputs)
    _check_ascending("indices", small.indices)
    _check_ascending("neurons", small.neurons)


def _validate_windows(small: WindowArray) -> None:
    windows, alive = small.values.shape[:-2], small.neurons.shape[-1]
    groups = -(-alive // LANES)
    _check_shape("values", small.values, (*windows, SLOTS, LANES))
    _check_shape("positions", small.positions, (*windows, LANES))
    _check_shape("starts", small.starts, windows)
    _check_shape("offsets", small.offsets, (*small.stack_shape, groups + 1))
    _check_below("starts", small.starts, small.inputs - WINDOW + 1)
    _check_below("offsets", small.offsets, windows[-1] + 1)
    _check_below("neurons", small.neurons, small.outputs)
    _check_ascending("offsets", small.offsets)
    _check_ascending("neurons", small.neurons)


def _validate_groups(small: NMArray) -> None:
    kept = math.prod(small.dense_shape) * small.n // small.m
    stored = math.prod(small.values.shape[-2:])
    if kept != stored:
        raise ValueError(
            f"values of shape {small.values.shape} hold {stored} weights, but "
            f"{small.n}:{small.m} of shape {small.dense_shape} keeps {kept}"
        )
    _check_below("positions", small.positions, small.m)
    shape = (*small.values.shape[:-1], -1, small.n)
    _check_ascending("positions", small.positions.reshape(shape))


def _validate_blocks(small: BlockArray) -> None:
    *_, inputs, outputs = small.values.shape
    columns = small.dense_shape[-1] // outputs
    rows = math.prod(small.dense_shape) // (small.dense_shape[-1] * inputs)
    for name in ("rows", "columns"):
        _check_shape(name, getattr(small, name), small.values.shape[:-2])
    _check_below("rows", small.rows, rows)
    _check_below("columns", small.columns, columns)
    order = small.columns.astype(jnp.int32) * rows + small.rows.astype(jnp.int32)
    _check_ascending("column * rows + row", order)


def _check_shape(name: str, found: Any, shape: tuple[int, ...]) -> None:
    if tuple(found.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {found.shape}, but must have {shape}")


def _check_below(name: str, found: Any, limit: int) -> None:
    signed = found.astype(jnp.int32) if found.dtype.itemsize < 4 else found
    wrong = (signed < 0) | (signed >= limit)
    if (place := first_place(wrong)) is not None:
        raise ValueError(
            f"{name} at {place} is {found[place]}, but must be below {limit}"
        )


def _check_ascending(name: str, found: Any) -> None:
    wrong = found[..., 1:] <= found[..., :-1]
    if (place := first_place(wrong)) is not None:
        *others, last = place
        one, other = found[place], found[(*others, last + 1)]
        raise ValueError(f"{name} must ascend, but {other} follows {one} at {place}")
