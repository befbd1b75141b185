"""N:M arrays: the kept values of every group, and where in the group they stood."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nmjax.formats.checks import (
    Compressed,
    check_concrete,
    check_shape_of_mask,
    first_place,
    register,
)
from nmjax.formats.packing import code_bits, pack_codes, unpack_codes
from nmjax.masking.ordering import (
    as_axis,
    check_multiple,
    check_n_of_m,
    merge_axis,
    split_axis,
)
from nmjax.typing import MaskArray, WeightArray


@register
@dataclasses.dataclass(frozen=True, repr=False)
class NMArray(Compressed):
    """An array of which n of every m consecutive entries are stored.

    Groups run along `axis` of the dense array. Axes behind it count outputs, all others
    inputs; where it is the last axis, all others count outputs. Stored are the values
    of one output after the other: a Dense kernel ``(K, F)`` has values
    ``(F, K * n / m)``, a convolution ``(h, w, K, F)`` has ``(F, h * w * K * n / m)``,
    and a table ``(F, K)`` with groups along its last axis has ``(F, K * n / m)`` too.

    Positions in a group are ascending and distinct, also in groups with fewer
    non-zeros than n: these are filled up with zeros. They take 1, 2, 4 or 8 bits, for
    m up to 2, 4, 16 or 256: 2 bits for 2:4, four to a byte, the first in the lowest
    bits.

    Attributes:
      values: kept values, ``(F, K * n / m)``.
      scales: None, or a factor of each output of quantized values, ``(F, 1)``.
      codes: their positions, packed along the last axis, uint8.
      n: values kept of a group.
      m: length of a group.
      axis: axis of the dense array along which groups run, counted from the end.
      dense_shape: shape of the dense array (of one layer, where layers are stacked).

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> weights = jnp.array([[0.0], [3.0], [0.0], [4.0]])
      >>> small = formats.NMArray.from_dense(weights, 2, 4)
      >>> small
      NMArray(2:4 along -2, float32[4, 1], 9 bytes, 0.562 of dense)
      >>> small.values.tolist(), small.positions.tolist()
      ([[3.0, 4.0]], [[1, 3]])

    Reference:
      The 2:4 format of sparse tensor cores: Mishra et al., 2021, arXiv 2104.08378.
    """

    values: Any
    scales: Any
    codes: Any
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    dense_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_dense(
        cls,
        weights: WeightArray,
        n: int,
        m: int,
        axis: int = -2,
        mask: MaskArray | None = None,
        stacked: int = 0,
    ) -> "NMArray":
        """Compress an array.

        Args:
          weights: the dense array.
          n: values kept of a group.
          m: length of a group.
          axis: axis along which groups run.
          mask: active weights, which keep their positions even where they are zero.
            Default: those that are not zero.
          stacked: number of leading axes that count the layers of a stack.

        Returns:
          The compressed array, of the same dtype.

        Raises:
          ValueError: a group has more than n active weights, a weight that is not
            active is not zero, or the axis does not divide into groups.
          TypeError: the arrays are traced: whether they fit can then not be checked.
        """
        check_concrete("NMArray.from_dense", weights, mask)
        check_n_of_m(n, m)
        axis = as_axis(axis, weights.shape) - weights.ndim
        check_multiple(weights.shape, weights.ndim + axis, m)
        mask = check_shape_of_mask(weights, mask)
        shape = tuple(weights.shape[stacked:])
        if stacked and weights.ndim + axis < stacked:
            raise ValueError(
                f"axis={axis} of shape {weights.shape} is one of the {stacked} that "
                "count layers"
            )
        groups, active = (
            split_axis(_rows(array, axis, stacked), stacked + 1, m)
            for array in (weights, mask)
        )
        counts = jnp.sum(active, axis=-1, dtype=jnp.int32)
        if (place := first_place(counts > n)) is not None:
            *layer, output, group = place
            outputs = [shape[i] for i in _outputs(axis, len(shape))]
            others = [int(i) for i in np.unravel_index(output, outputs)]
            per_line = shape[axis] // m
            raise ValueError(
                f"group {group % per_line} along axis {axis}, at "
                f"{tuple(layer + others)} of the outputs, has {int(counts[place])} "
                f"active weights, more than n={n} of m={m}"
            )
        # Active positions first, then the lowest others; back in ascending order.
        order = jnp.argsort(~active, axis=-1, stable=True)[..., :n]
        positions = jnp.sort(order, axis=-1)
        values = jnp.take_along_axis(groups, positions, axis=-1)
        last = values.ndim - 2
        codes = merge_axis(positions.astype(jnp.uint8), last)
        packed = pack_codes(codes, code_bits(m))
        return cls(merge_axis(values, last), None, packed, n, m, axis, shape)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Lengths of the leading axes that count the layers of a stack."""
        return self.values.shape[:-2]

    @property
    def matrix(self) -> "NMArray | None":
        """The same array as a matrix, if groups do not run along its last axis."""
        if self.axis == -1:
            return None
        split = len(self.dense_shape) + self.axis + 1
        shape = math.prod(self.dense_shape[:split]), math.prod(self.dense_shape[split:])
        return dataclasses.replace(self, axis=-2, dense_shape=shape)

    @property
    def transposed(self) -> "NMArray | None":
        """The transpose of a matrix; None for other ranks."""
        if len(self.dense_shape) != 2:
            return None
        shape = self.dense_shape[::-1]
        return dataclasses.replace(self, axis=-3 - self.axis, dense_shape=shape)

    @property
    def positions(self) -> Array:
        """Positions in their groups, uint8, of the shape of `values`."""
        return unpack_codes(self.codes, code_bits(self.m), self.values.shape[-1])

    @property
    def layout(self) -> str:
        """What is stored, in words."""
        return f"{self.n}:{self.m} along {self.axis}"

    def place(self, values: WeightArray) -> WeightArray:
        """Put values like `values` to where these stand in the dense array."""
        last = values.ndim - 1
        kept = split_axis(values, last, self.n)
        positions = split_axis(self.positions, last, self.n)
        lane = jnp.arange(self.m, dtype=jnp.uint8)
        groups = jnp.zeros((*kept.shape[:-1], self.m), values.dtype)
        for i in range(self.n):
            here = positions[..., i : i + 1] == lane
            groups = jnp.where(here, kept[..., i : i + 1], groups)
        rows = merge_axis(groups, last)
        if self.axis != -1:
            rows = rows.mT
        return rows.reshape(*values.shape[:-2], *self.dense_shape)


def _outputs(axis: int, rank: int) -> range:
    """Give the axes that count outputs, of a dense array of this rank."""
    return range(rank - 1) if axis == -1 else range(rank + axis + 1, rank)


def _rows(array: Array, axis: int, stacked: int) -> Array:
    """Bring outputs to rows, their inputs to columns."""
    outputs = [array.shape[stacked + i] for i in _outputs(axis, array.ndim - stacked)]
    count = math.prod(outputs)
    stack = array.shape[:stacked]
    inputs = math.prod(array.shape[stacked:]) // max(1, count)
    if axis == -1:
        return array.reshape(*stack, count, inputs)
    return array.reshape(*stack, inputs, count).mT
