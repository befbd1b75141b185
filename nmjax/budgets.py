"""Patterns that keep as many weights as a budget pays for.

The budget is an integer number of weights of one layer. It comes from the
pattern's own `density` or from the plan's; `nmjax.patterns` says the rest.
"""

import dataclasses
import math
from typing import Any

import jax

from nmjax.distributions import check_density, round_half_up
from nmjax.masking import (
    block_mask,
    block_sums,
    channel_mask,
    fan_in_mask,
    topk_mask,
)
from nmjax.masking.ordering import as_axis
from nmjax.patterns import Shape, axis_of, axis_text, fits_multiple, from_end, with_axis
from nmjax.typing import Budget, FloatArray, MaskArray


@dataclasses.dataclass(frozen=True)
class Unstructured:
    """Keep the best weights of a layer wherever they are.

    Attributes:
      density: kept fraction in (0, 1]; None: from the plan's `density`.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> nm.Unstructured().mask(jnp.array([[1.0, 4.0], [3.0, 2.0]]), 2).tolist()
      [[False, True], [True, False]]
    """

    density: float | None = None

    def __post_init__(self) -> None:
        """Check the density."""
        _check_own_density(self)

    def validate(self, shape: Shape) -> None:
        """Accept any shape with weights in it."""

    def kept(self, shape: Shape, budget: Budget | None = None) -> Any:
        """Count the whole budget."""
        return _budget(self, shape, budget)

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Keep the `budget` largest scores of each layer; see `nm.topk_mask`."""
        k = self.kept(scores.shape[stacked:], budget)
        axis = tuple(range(stacked, scores.ndim)) if stacked else None
        return topk_mask(scores, k, axis)

    def __str__(self) -> str:
        """Name the pattern."""
        return "unstructured"


@dataclasses.dataclass(frozen=True)
class FanIn:
    """Keep the same number of inputs for every neuron (constant fan-in).

    Each neuron keeps ``budget // neurons`` weights.

    Attributes:
      density: kept fraction in (0, 1]; None: from the plan's `density`.
      neuron_axes: axes that count neurons; None: all that are not fan-in, which is
        the last axis, or heads and head_dim of query, key and value kernels.

    Example:
      >>> import jax
      >>> import nmjax as nm
      >>> scores = jax.random.uniform(jax.random.key(0), (6, 3))
      >>> nm.FanIn().mask(scores, budget=7).sum(0).tolist()
      [2, 2, 2]

    Reference:
      Lasby et al., "Dynamic Sparse Training with Structured Sparsity", 2024,
      arXiv 2305.02299.
    """

    density: float | None = None
    neuron_axes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        """Check the density."""
        _check_own_density(self)

    def oriented(self, fan_in: tuple[int, ...]) -> "FanIn":
        """Fill in the neuron axes from the fan-in axes of a kernel."""
        if self.neuron_axes is not None:
            return self
        neurons = tuple(a for a in range(min(fan_in), 0) if a not in fan_in)
        return dataclasses.replace(self, neuron_axes=neurons)

    def validate(self, shape: Shape) -> None:
        """Raise unless there is a fan-in axis beside the neuron axes."""
        for axis in self._neuron_axes:
            as_axis(axis, shape)
        if len(shape) <= len(self._neuron_axes):
            raise ValueError(f"shape {shape} has no fan-in axis beside its neurons")

    def neurons(self, shape: Shape) -> int:
        """Count the neurons of a kernel."""
        return math.prod(shape[axis] for axis in self._neuron_axes)

    def fan_in(self, shape: Shape, budget: Budget | None = None) -> Any:
        """Count the weights that each neuron keeps."""
        return _budget(self, shape, budget) // self.neurons(shape)

    def kept(self, shape: Shape, budget: Budget | None = None) -> Any:
        """Count fan-in times neurons, at most the budget."""
        return self.fan_in(shape, budget) * self.neurons(shape)

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Keep the largest scores of each neuron; see `nm.fan_in_mask`."""
        k = self.fan_in(scores.shape[stacked:], budget)
        axes = tuple(from_end(a, scores.ndim, stacked) for a in self._neuron_axes)
        return fan_in_mask(scores, k, (*range(stacked), *axes))

    @property
    def _neuron_axes(self) -> tuple[int, ...]:
        return (-1,) if self.neuron_axes is None else self.neuron_axes

    def __str__(self) -> str:
        """Name the pattern."""
        return f"fan-in{_axes_text(self.neuron_axes)}"


@dataclasses.dataclass(frozen=True)
class Block:
    """Keep whole blocks of `outputs` x `inputs` weights.

    ``Block(4, 1)`` is the 4x1 of the field: 4 consecutive output channels of one
    input. A block's score is the sum of its weights' scores.

    Attributes:
      outputs: length of a block along the last axis.
      inputs: length of a block along the fan-in axis.
      density: kept fraction in (0, 1]; None: from the plan's `density`.
      axis: fan-in axis; None: the fan-in axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> scores = jnp.array([[1.0, 1.0, 5.0, 5.0], [2.0, 2.0, 3.0, 3.0]])
      >>> nm.Block(2, 1).mask(scores, budget=4).astype(int).tolist()
      [[0, 0, 1, 1], [0, 0, 1, 1]]
    """

    outputs: int
    inputs: int
    density: float | None = None
    axis: int | None = None

    def __post_init__(self) -> None:
        """Check the block and the density."""
        for name in ("outputs", "inputs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} of {self!r} must be an int >= 1")
        _check_own_density(self)

    def oriented(self, fan_in: tuple[int, ...]) -> "Block":
        """Fill in the axis from the fan-in axes of a kernel."""
        return with_axis(self, fan_in)

    def validate(self, shape: Shape) -> None:
        """Raise unless blocks tile the kernel."""
        fits_multiple(shape, axis_of(self), self.inputs, "inputs")
        fits_multiple(shape, -1, self.outputs, "outputs")

    def kept(self, shape: Shape, budget: Budget | None = None) -> Any:
        """Count the weights of the blocks that the budget pays for."""
        size = self.outputs * self.inputs
        return _budget(self, shape, budget) // size * size

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Keep the blocks with the largest sums; see `nm.block_mask`."""
        kept = self.kept(scores.shape[stacked:], budget)
        axis = from_end(axis_of(self), scores.ndim, stacked)
        return block_mask(
            scores,
            kept // (self.outputs * self.inputs),
            (self.inputs, self.outputs),
            axes=(axis, -1),
            batch_axes=tuple(range(stacked)),
        )

    def group_sums(self, values: FloatArray, stacked: int = 0) -> FloatArray:
        """Give every weight the sum of its block's values, in float32."""
        axis = from_end(axis_of(self), values.ndim, stacked)
        return block_sums(values, (self.inputs, self.outputs), (axis, -1))

    def __str__(self) -> str:
        """Name the pattern."""
        return f"block {self.outputs}x{self.inputs}{axis_text(self.axis)}"


@dataclasses.dataclass(frozen=True)
class Channel:
    """Keep whole output channels (or other slices along one axis).

    A channel's score is the sum of its weights' scores.

    Attributes:
      density: kept fraction in (0, 1]; None: from the plan's `density`.
      axis: axis that counts channels.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> scores = jnp.array([[1.0, 5.0], [2.0, 5.0]])
      >>> nm.Channel().mask(scores, budget=2).astype(int).tolist()
      [[0, 1], [0, 1]]
    """

    density: float | None = None
    axis: int = -1

    def __post_init__(self) -> None:
        """Check the density."""
        _check_own_density(self)

    def validate(self, shape: Shape) -> None:
        """Raise unless the axis exists."""
        as_axis(self.axis, shape)

    def kept(self, shape: Shape, budget: Budget | None = None) -> Any:
        """Count the weights of the channels that the budget pays for."""
        size = math.prod(shape) // shape[self.axis]
        return _budget(self, shape, budget) // size * size

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Keep the channels with the largest sums; see `nm.channel_mask`."""
        shape = scores.shape[stacked:]
        k = self.kept(shape, budget) * shape[self.axis] // math.prod(shape)
        axis = from_end(self.axis, scores.ndim, stacked)
        return channel_mask(scores, k, axis, batch_axes=tuple(range(stacked)))

    def group_sums(self, values: FloatArray, stacked: int = 0) -> FloatArray:
        """Give every weight the sum of its channel's values, in float32."""
        channel = from_end(self.axis, values.ndim, stacked) % values.ndim
        axes = tuple(a for a in range(stacked, values.ndim) if a != channel)
        return block_sums(values, tuple(values.shape[a] for a in axes), axes)

    def __str__(self) -> str:
        """Name the pattern."""
        return f"channel{axis_text(None if self.axis == -1 else self.axis)}"


def _check_own_density(pattern) -> None:
    if pattern.density is not None:
        check_density(pattern.density, repr(pattern))


def _budget(pattern: Any, shape: Shape, budget: Budget | None) -> Any:
    """Resolve a layer's budget from the argument or the pattern's own density."""
    size = math.prod(shape)
    if budget is None:
        if pattern.density is None:
            raise ValueError(
                f"{pattern!r} does not say how much to keep: give it a density, or "
                "give the plan one, as in nm.plan(params, pattern, density=0.1)"
            )
        budget = round_half_up(size * pattern.density)
    if isinstance(budget, jax.Array):
        return budget  # it changes during training and cannot be checked
    if not 0 <= budget <= size:
        raise ValueError(f"budget={budget} of a kernel of shape {shape}, size {size}")
    return budget


def _axes_text(axes: tuple[int, ...] | None) -> str:
    if axes is None or axes == (-1,):
        return ""
    return " of neurons " + ", ".join(str(a) for a in axes)
