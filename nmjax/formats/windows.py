"""Window arrays: constant fan-in weights in the order in which AVX-512 takes them."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from nmjax.formats.checks import Compressed, check_concrete, register
from nmjax.formats.fan_in import FanInArray, NeuronArray, index_dtype
from nmjax.typing import WeightArray

LANES = 16
"""Neurons side by side: floats in a register."""

SLOTS = 2
"""Weights that each of them has in a window."""

WINDOW = 64
"""Inputs of a window: floats in four registers."""

FILLER = 0x80
"""Flag of a position where there is no weight."""


@register
@dataclasses.dataclass(frozen=True, repr=False)
class WindowArray(NeuronArray):
    """A constant fan-in array whose weights are grouped by windows of the inputs.

    A processor has no fast gather from memory, but AVX-512 looks up 16 numbers at once
    among those in its registers. So 16 neurons stand side by side, and a window is 64
    inputs in a row, in four registers, from which each of them takes two of its
    weights; where a neuron has fewer left in the window, a zero fills the place.

    Made from a `FanInArray` by `nmjax.prepare`, once; `canonical` gives it back. It is
    for running, not for keeping: what is saved should be the `FanInArray`.

    Attributes:
      values: weights and zeros, ``(windows, 2, 16)``.
      scales: None, or factors of quantized values, ``(alive, 1)``.
      positions: those of both weights in their window, uint16 ``(windows, 16)``: the
        first in the low byte, the second in the high one. A zero that fills a place
        has position 128.
      starts: first input of each window, int32 ``(windows,)``.
      offsets: first window of each 16 neurons, and the end of the last one's, int32
        ``(ceil(alive / 16) + 1,)``. In a stack, layers are filled up with windows
        behind the end.
      neurons: as in `FanInArray`.
      kept: number k of inputs of an active neuron.
      dense_shape: as in `FanInArray`.
      neuron_axes: as in `FanInArray`.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import formats
      >>> small = formats.FanInArray.from_dense(2.0 * jnp.eye(64))
      >>> ready = nm.prepare({"kernel": small}, "cpu")["kernel"]
      >>> ready
      WindowArray(fan-in 1 of 64, 64 of 64 neurons, 4 windows, float32[64, 64], 932 ...
      >>> bool((ready.todense() == 2.0 * jnp.eye(64)).all())
      True
    """

    values: Any
    scales: Any
    positions: Any
    starts: Any
    offsets: Any
    neurons: Any
    kept: int = dataclasses.field(metadata={"static": True})
    dense_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    neuron_axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_canonical(cls, small: FanInArray) -> "WindowArray":
        """Lay out a constant fan-in array in windows.

        Windows of 16 neurons are taken from left to right: each starts at the first
        input that one of them still needs, rounded down to a multiple of 16, and
        every neuron takes its next two weights, as far as they are in the window.

        Args:
          small: the array, not traced, or a stack of them.

        Returns:
          The same weights.

        Raises:
          ValueError: `refusal` gives a reason.
          TypeError: the array is traced.
        """
        if reason := refusal(small):
            raise ValueError(f"{small!r} cannot be prepared for cpu: {reason}")
        check_concrete("WindowArray.from_canonical", small.values, small.indices)
        shape = -1, *small.values.shape[-2:]
        values = np.asarray(small.values).reshape(shape)
        indices = np.asarray(small.indices).astype(np.int64).reshape(shape)
        layers = [
            _lay_out(values[i], indices[i], small.inputs) for i in range(len(values))
        ]
        most = max(len(layer.starts) for layer in layers)
        filled = (layer.filled(most) for layer in layers)
        stacked = map(np.stack, zip(*filled, strict=True))
        values, positions, starts, offsets = (
            jnp.asarray(array.reshape(*small.stack_shape, *array.shape[1:]))
            for array in stacked
        )
        return cls(
            values,
            small.scales,
            positions,
            starts,
            offsets,
            small.neurons,
            small.fan_in,
            small.dense_shape,
            small.neuron_axes,
        )

    @property
    def canonical(self) -> FanInArray:
        """The `FanInArray` that it was made from, bit for bit."""
        if self.stack_shape:
            return jax.vmap(lambda layer: layer.canonical)(self)
        alive = self.neurons.size
        rows, inputs, real = self._slots
        # Those of a neuron follow each other in the order of its inputs.
        order = jnp.argsort(jnp.where(real, rows, alive).ravel(), stable=True)
        order = order[: alive * self.fan_in].reshape(alive, self.fan_in)
        return FanInArray(
            self.values.ravel()[order],
            self.scales,
            inputs.ravel()[order].astype(index_dtype(self.inputs)),
            self.neurons,
            self.dense_shape,
            self.neuron_axes,
        )

    @property
    def _slots(self) -> tuple[Array, Array, Array]:
        """Give row among the active neurons, input, and whether there is a weight.

        Each ``(windows, 2, 16)``, of one layer.
        """
        numbers = jnp.arange(self.starts.size)
        groups = jnp.searchsorted(self.offsets, numbers, side="right") - 1
        rows = groups[:, None, None] * LANES + jnp.arange(LANES)
        positions = jnp.stack([self.positions & 0xFF, self.positions >> 8], axis=1)
        inputs = self.starts[:, None, None] + (positions & (WINDOW - 1)).astype("int32")
        rows = jnp.broadcast_to(rows, inputs.shape)
        return rows, inputs, positions < FILLER

    @property
    def fan_in(self) -> int:
        """Number k of inputs of an active neuron."""
        return self.kept

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Lengths of the leading axes that count the layers of a stack."""
        return self.values.shape[:-3]

    @property
    def layout(self) -> str:
        """What is stored, in words."""
        return f"{super().layout}, {self.values.shape[-3]} windows"

    @property
    def weights(self) -> WeightArray:
        """The stored weights: `values`, times `scales` where there are scales."""
        if self.scales is None:
            return self.values
        if self.stack_shape:
            return jax.vmap(lambda layer: layer.weights)(self)
        rows, _, _ = self._slots
        scales = self.scales.ravel().at[rows].get(mode="clip").astype(jnp.float32)
        return (self.values.astype(jnp.float32) * scales).astype(self.scales.dtype)

    def place(self, values: WeightArray) -> WeightArray:
        """Put values like `values` to where these stand in the dense array."""
        if values.ndim > 3:  # a stack of layers
            return jax.vmap(type(self).place)(self, values)
        rows, inputs, real = self._slots
        neurons = self.neurons.at[rows].get(mode="clip")
        # A zero that fills a place is dropped: its row is one that there is not, and
        # is that of no other zero.
        beyond = self.outputs + jnp.arange(real.size, dtype="int32").reshape(real.shape)
        zeros = jnp.zeros_like(values, shape=(self.outputs, self.inputs))
        return self._from_rows(
            zeros.at[jnp.where(real, neurons, beyond), inputs].set(
                values, mode="drop", unique_indices=True
            )
        )


def refusal(small: Compressed) -> str:
    """Say why an array cannot be laid out in windows; empty where it can.

    Args:
      small: a compressed array.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.formats import windows
      >>> windows.refusal(formats.FanInArray.from_dense(jnp.eye(32)))
      'a window is 64 inputs, and the array has 32'
    """
    if not isinstance(small, FanInArray):
        return f"{type(small).__name__} has no layout for CPUs but its own"
    if small.inputs < WINDOW:
        return f"a window is {WINDOW} inputs, and the array has {small.inputs}"
    return ""


class _Layer(NamedTuple):
    """Arrays of one layer, in NumPy; shapes as in `WindowArray`."""

    values: np.ndarray
    positions: np.ndarray
    starts: np.ndarray
    offsets: np.ndarray

    def filled(self, count: int) -> "_Layer":
        """Fill up with windows without weights, behind the end."""
        missing = count - len(self.starts)
        return _Layer(
            np.pad(self.values, [(0, missing), (0, 0), (0, 0)]),
            np.pad(
                self.positions, [(0, missing), (0, 0)], constant_values=FILLER * 0x101
            ),
            np.pad(self.starts, [(0, missing)]),
            self.offsets,
        )


def _lay_out(values: np.ndarray, indices: np.ndarray, inputs: int) -> _Layer:
    """Lay out one layer: values and indices ``(alive, k)``."""
    alive, k = values.shape
    groups = -(-alive // LANES)
    none = np.iinfo(indices.dtype).max
    upcoming = np.full((groups * LANES, k + 1), none)
    upcoming[:alive, :k] = indices
    rows, taken = np.arange(groups * LANES), np.zeros(groups * LANES, indices.dtype)
    firsts, slots = [], []
    while True:
        first = upcoming[rows, taken].reshape(groups, LANES).min(axis=1)
        if (first == none).all():
            break
        start = np.minimum(first // LANES * LANES, inputs - WINDOW)
        ends = np.repeat(start + WINDOW, LANES)
        for _ in range(SLOTS):
            inside = upcoming[rows, taken] < ends
            slots.append(np.where(inside, taken, -1))
            taken += inside
        firsts.append(np.where(first == none, -1, start))
    starts = np.stack(firsts, axis=1)  # (groups, steps)
    used = starts >= 0
    which = np.stack(slots).reshape(-1, SLOTS, groups, LANES)
    which = which.transpose(2, 0, 1, 3)[used]  # (windows, slots, lanes)
    real = which >= 0
    owners = np.nonzero(used)[0][:, None, None] * LANES + np.arange(LANES)
    where = np.minimum(owners, alive - 1), which
    starts = starts[used]
    places = np.where(real, indices[where] - starts[:, None, None], FILLER)
    return _Layer(
        np.where(real, values[where], np.zeros((), values.dtype)),
        (places[:, 0] | places[:, 1] << 8).astype(np.uint16),
        starts.astype(np.int32),
        np.concatenate([[0], np.cumsum(used.sum(axis=1))]).astype(np.int32),
    )
