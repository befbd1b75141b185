"""Constant fan-in arrays: each neuron's weights, and the inputs they belong to."""

import dataclasses
import math
from typing import Any, cast

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
from nmjax.masking.ordering import as_axes
from nmjax.typing import MaskArray, WeightArray


class NeuronArray(Compressed):
    """A compressed array whose active neurons all keep the same number of inputs."""

    neurons: Any
    neuron_axes: tuple[int, ...]

    @property
    def fan_in(self) -> int:
        """Number k of inputs of an active neuron."""
        raise NotImplementedError

    @property
    def outputs(self) -> int:
        """Number of neurons, ablated ones too."""
        return math.prod(self.dense_shape[axis] for axis in self.neuron_axes)

    @property
    def inputs(self) -> int:
        """Number of inputs that a neuron could have."""
        return math.prod(self.dense_shape) // max(1, self.outputs)

    @property
    def layout(self) -> str:
        """What is stored, in words."""
        alive = self.neurons.shape[-1]
        return (
            f"fan-in {self.fan_in} of {self.inputs}, {alive} of {self.outputs} neurons"
        )

    @property
    def matrix(self) -> "NeuronArray | None":
        """The same array as a matrix, if its trailing axes count neurons."""
        count = len(self.neuron_axes)
        if self.neuron_axes != tuple(range(-count, 0)):
            return None
        shape = self.inputs, self.outputs
        return dataclasses.replace(
            cast(Any, self), dense_shape=shape, neuron_axes=(-1,)
        )

    @property
    def transposed(self) -> "NeuronArray | None":
        """The transpose of a matrix; None for other ranks."""
        if len(self.dense_shape) != 2 or len(self.neuron_axes) != 1:
            return None
        axes = (-3 - self.neuron_axes[0],)
        return dataclasses.replace(
            cast(Any, self), dense_shape=self.dense_shape[::-1], neuron_axes=axes
        )

    def _from_rows(self, rows: Array) -> Array:
        """Give the dense array of one layer, of rows ``(outputs, inputs)``."""
        rank = len(self.dense_shape)
        neurons = [rank + axis for axis in self.neuron_axes]
        inputs = [axis for axis in range(rank) if axis not in neurons]
        shape = tuple(self.dense_shape[axis] for axis in (*neurons, *inputs))
        return rows.reshape(shape).transpose(np.argsort([*neurons, *inputs]).tolist())


@register
@dataclasses.dataclass(frozen=True, repr=False)
class FanInArray(NeuronArray):
    """An array of which every neuron keeps the same number k of inputs.

    Neurons without inputs (ablated ones) are not stored; their entries are zero.

    Attributes:
      values: weights of the active neurons, ``(alive, k)``.
      indices: the input of each, in the fan-in axes taken together, ``(alive, k)``;
        ascending in a row. uint8, uint16 or uint32, whichever is the smallest that
        fits.
      neurons: the active neurons, ascending, in the neuron axes taken together,
        int32 ``(alive,)``.
      scales: None, or factors of quantized values, ``(alive, 1)``.
      dense_shape: shape of the dense array (of one layer, where layers are stacked).
      neuron_axes: axes of the dense array that count neurons, from the end, ascending.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> weights = jnp.array([[0.0, 0.0, 2.0], [1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
      >>> small = formats.FanInArray.from_dense(weights)
      >>> small
      FanInArray(fan-in 1 of 3, 2 of 3 neurons, float32[3, 3], 18 bytes, 0.5 of dense)
      >>> small.indices.tolist(), small.neurons.tolist()
      ([[1], [0]], [0, 2])

    Reference:
      Condensed layers: Lasby, Golubeva, Evci, Nica and Ioannou, "Dynamic Sparse
      Training with Structured Sparsity", 2024, arXiv 2305.02299.
    """

    values: Any
    scales: Any
    indices: Any
    neurons: Any
    dense_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    neuron_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_dense(
        cls,
        weights: WeightArray,
        neuron_axes: tuple[int, ...] = (-1,),
        mask: MaskArray | None = None,
    ) -> "FanInArray":
        """Compress an array.

        Args:
          weights: the dense array.
          neuron_axes: axes that count neurons.
          mask: active weights: each neuron has the same number of them, or none.
            Default: those that are not zero, filled up to the largest number with
            the lowest other inputs.

        Returns:
          The compressed array, of the same dtype.

        Raises:
          ValueError: the mask gives a neuron another number of active weights than the
            others; a weight that is not active is not zero; or no neuron has an active
            weight.
          TypeError: the arrays are traced.
        """
        check_concrete("FanInArray.from_dense", weights, mask)
        axes = tuple(sorted(as_axes(neuron_axes, weights.shape, "neuron_axes")))
        given = mask is not None
        mask = check_shape_of_mask(weights, mask)
        rows, active = (_rows(array, axes) for array in (weights, mask))
        counts = np.asarray(jnp.sum(active, axis=1, dtype=jnp.int32))
        neurons = np.flatnonzero(counts)
        if not neurons.size:
            raise ValueError("no neuron has an active weight")
        k = int(counts.max())
        fewer = np.flatnonzero((counts > 0) & (counts < k))
        if given and fewer.size:
            raise ValueError(
                f"neuron {fewer[0]} has {counts[fewer[0]]} active weights and neuron "
                f"{counts.argmax()} has {k}; the fan-in must be constant"
            )
        # Active inputs first, then the lowest others; back in ascending order.
        order = jnp.argsort(~active[neurons], axis=1, stable=True)[:, :k]
        indices = jnp.sort(order, axis=1)
        return cls(
            jnp.take_along_axis(rows[neurons], indices, axis=1),
            None,
            indices.astype(index_dtype(rows.shape[1])),
            jnp.asarray(neurons, jnp.int32),
            tuple(weights.shape),
            tuple(axis - weights.ndim for axis in axes),
        )

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Lengths of the leading axes that count the layers of a stack."""
        return self.values.shape[:-2]

    @property
    def fan_in(self) -> int:
        """Number k of inputs of an active neuron."""
        return self.values.shape[-1]

    def place(self, values: WeightArray) -> WeightArray:
        """Put values like `values` to where these stand in the dense array."""
        if values.ndim > 2:  # a stack of layers
            return jax.vmap(type(self).place)(self, values)
        total, length = self.outputs, self.inputs

        def row(values: Array, indices: Array) -> Array:
            zeros = jnp.zeros_like(values, shape=(length,))
            return zeros.at[indices].set(
                values,
                mode="promise_in_bounds",
                unique_indices=True,
                indices_are_sorted=True,
            )

        # Neuron by neuron, so that sharded neurons need no collective.
        rows = jax.vmap(row)(values, self.indices)
        if self.neurons.size < total:
            zeros = jnp.zeros_like(rows, shape=(total, length))
            rows = zeros.at[self.neurons].set(rows, unique_indices=True)
        return self._from_rows(rows)


def index_dtype(count: int) -> Any:
    """Give the smallest unsigned dtype for indices below a count.

    Example:
      >>> from nmjax.formats import fan_in
      >>> fan_in.index_dtype(256).name, fan_in.index_dtype(257).name
      ('uint8', 'uint16')
    """
    return np.dtype(next(t for t in ("u1", "u2", "u4") if count <= np.iinfo(t).max + 1))


def _rows(array: Array, neuron_axes: tuple[int, ...]) -> Array:
    """Bring neurons to the rows of a matrix, their inputs to its columns."""
    inputs = [axis for axis in range(array.ndim) if axis not in neuron_axes]
    neurons = math.prod(array.shape[axis] for axis in neuron_axes)
    return array.transpose([*neuron_axes, *inputs]).reshape(neurons, -1)
