"""Block arrays: whole blocks of weights, and where they stood."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nmjax.formats.checks import (
    Compressed,
    check_concrete,
    check_shape_of_mask,
    register,
)
from nmjax.formats.fan_in import index_dtype
from nmjax.masking.ordering import as_axis, check_multiple
from nmjax.typing import MaskArray, WeightArray


@register
@dataclasses.dataclass(frozen=True, repr=False)
class BlockArray(Compressed):
    """An array of which whole blocks of `outputs` x `inputs` weights are stored.

    Blocks run along the last axis (outputs) and along `axis` (inputs). All other axes
    are taken together with `axis`: a convolution ``(h, w, K, F)`` is a matrix
    ``(h * w * K, F)`` of blocks.

    Attributes:
      values: the blocks, ``(blocks, inputs, outputs)``.
      rows: number of each block along the inputs, ``(blocks,)``.
      columns: number of each block along the outputs, ``(blocks,)``. Blocks are sorted
        by column, then by row. Both are uint8, uint16 or uint32.
      scales: None, or a factor of each block of quantized values, ``(blocks, 1, 1)``.
      dense_shape: shape of the dense array.
      axis: axis that counts inputs, from the end.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> weights = jnp.array([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
      >>> small = formats.BlockArray.from_dense(weights, outputs=2, inputs=1)
      >>> small
      BlockArray(1 of 4 blocks 2x1, float32[2, 4], 10 bytes, 0.312 of dense)
      >>> small.values.tolist(), small.rows.tolist(), small.columns.tolist()
      ([[[1.0, 2.0]]], [0], [1])
    """

    values: Any
    scales: Any
    rows: Any
    columns: Any
    dense_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_dense(
        cls,
        weights: WeightArray,
        outputs: int,
        inputs: int,
        axis: int = -2,
        mask: MaskArray | None = None,
    ) -> "BlockArray":
        """Compress an array.

        Args:
          weights: the dense array.
          outputs: length of a block along the last axis.
          inputs: length of a block along `axis`.
          axis: axis that counts inputs.
          mask: active weights, whole blocks of them. Default: the blocks that are not
            all zero.

        Returns:
          The compressed array, of the same dtype.

        Raises:
          ValueError: blocks do not tile the array, the mask cuts a block, or a weight
            that is not active is not zero.
          TypeError: the arrays are traced.
        """
        check_concrete("BlockArray.from_dense", weights, mask)
        axis = as_axis(axis, weights.shape) - weights.ndim
        if axis == -1:
            raise ValueError("axis=-1 counts outputs; inputs are on another axis")
        check_multiple(weights.shape, weights.ndim + axis, inputs, "inputs")
        check_multiple(weights.shape, weights.ndim - 1, outputs, "outputs")
        given = mask is not None
        mask = check_shape_of_mask(weights, mask)
        blocks, active = (
            _split(array, axis, inputs, outputs) for array in (weights, mask)
        )
        some = np.asarray(jnp.any(active, axis=(2, 3)))
        if given:
            cut = some & ~np.asarray(jnp.all(active, axis=(2, 3)))
            if cut.any():
                column, row = np.argwhere(cut)[0]
                raise ValueError(
                    f"the mask cuts the block {row} along the inputs, {column} along "
                    f"the outputs, of {outputs}x{inputs} weights"
                )
        columns, rows = np.nonzero(some)
        return cls(
            blocks[columns, rows],
            None,
            jnp.asarray(rows, index_dtype(some.shape[1])),
            jnp.asarray(columns, index_dtype(some.shape[0])),
            tuple(weights.shape),
            axis,
        )

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Lengths of the leading axes that count the layers of a stack."""
        return self.values.shape[:-3]

    @property
    def layout(self) -> str:
        """What is stored, in words."""
        *_, count, inputs, outputs = self.values.shape
        total = math.prod(self.dense_shape) // (inputs * outputs)
        return f"{count} of {total} blocks {outputs}x{inputs}"

    @property
    def matrix(self) -> "BlockArray | None":
        """The same array as a matrix, if its last axis alone counts outputs."""
        if self.axis != -2:
            return None
        *inputs, outputs = self.dense_shape
        return dataclasses.replace(self, dense_shape=(math.prod(inputs), outputs))

    def place(self, values: WeightArray) -> WeightArray:
        """Put values like `values` to where these stand in the dense array."""
        if values.ndim > 3:  # a stack of layers
            return jax.vmap(type(self).place)(self, values)
        _, inputs, outputs = values.shape
        moved = list(self.dense_shape)
        length = moved.pop(self.axis)
        moved.insert(len(moved) - 1, length)
        columns = moved[-1] // outputs
        rows = math.prod(moved[:-1]) // inputs
        grid = jnp.zeros((columns, rows, inputs, outputs), values.dtype)
        grid = grid.at[self.columns, self.rows].set(values, unique_indices=True)
        matrix = grid.transpose(1, 2, 0, 3).reshape(moved)
        return jnp.moveaxis(matrix, -2, self.axis)


def _split(array: Array, axis: int, inputs: int, outputs: int) -> Array:
    """Cut into blocks: (columns, rows, inputs, outputs)."""
    moved = jnp.moveaxis(array, axis, -2)
    columns = array.shape[-1] // outputs
    grid = moved.reshape(-1, inputs, columns, outputs)
    return grid.transpose(2, 0, 1, 3)
