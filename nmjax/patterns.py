"""Patterns: static descriptions of where a layer may keep weights.

A pattern is a frozen dataclass. It knows how to check a shape (`validate`), how
many weights it keeps (`kept`) and how to turn scores into a mask (`mask`); the
work is done by the functions of `nmjax.masking`.

Axes count from the end of one layer's kernel. ``axis=None`` means the fan-in axis
as Flax lays kernels out: -2 for Dense ``(in, out)`` and conv ``(h, w, in, out)``
kernels, -3 for the query, key and value kernels ``(in, heads, head_dim)`` of
attention. `nm.plan` fills it in and shows it.

`budget` is the number of weights that one layer may keep. The patterns here keep a
fixed fraction and take none; those of `nmjax.budgets` need one.
"""

import dataclasses
import math
from fractions import Fraction
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp

from nmjax.masking import nm_mask, transposable_nm_mask, vnm_mask
from nmjax.masking.ordering import as_axis, check_multiple, check_n_of_m
from nmjax.typing import Budget, FloatArray, MaskArray

Shape = tuple[int, ...]


@runtime_checkable
class Pattern(Protocol):
    """What every pattern offers."""

    def validate(self, shape: Shape) -> None:
        """Raise ValueError unless a kernel of this shape can hold the pattern."""

    def kept(self, shape: Shape, budget: Budget | None = None) -> int:
        """Count the weights that one layer keeps."""
        ...

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Compute the mask; the first `stacked` axes count layers."""
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """Keep every weight.

    Example:
      >>> import nmjax as nm
      >>> rules = {"stem": nm.Dense(), ...: nm.NM(2, 4)}
    """

    def validate(self, shape: Shape) -> None:
        """Accept any shape."""

    def kept(self, shape: Shape, budget: Budget | None = None) -> int:
        """Count all weights."""
        return math.prod(shape)

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Keep everything."""
        return jnp.ones_like(scores, dtype=bool)

    def __str__(self) -> str:
        """Name the pattern."""
        return "dense"


@dataclasses.dataclass(frozen=True)
class NM:
    """Keep n of every m consecutive weights along one axis.

    Attributes:
      n: weights kept in a group, 1 <= n <= m.
      m: length of a group, up to 64.
      axis: axis along which groups run; None: the fan-in axis.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> nm.NM(2, 4).mask(jnp.array([[4.0], [3.0], [2.0], [1.0]]))[:, 0].tolist()
      [True, True, False, False]

    Reference:
      Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From
      Scratch", 2021, arXiv 2102.04010.
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self) -> None:
        """Check n and m."""
        check_n_of_m(self.n, self.m)

    def oriented(self, fan_in: tuple[int, ...]) -> "NM":
        """Fill in the axis from the fan-in axes of a kernel."""
        return with_axis(self, fan_in)

    def validate(self, shape: Shape) -> None:
        """Raise unless the axis exists and its length is a multiple of m."""
        fits_multiple(shape, axis_of(self), self.m, "m")

    def kept(self, shape: Shape, budget: Budget | None = None) -> int:
        """Count n of every m."""
        return math.prod(shape) * self.n // self.m

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Keep the n largest scores of every group; see `nm.nm_mask`."""
        axis = from_end(axis_of(self), scores.ndim, stacked)
        return nm_mask(scores, self.n, self.m, axis)

    def __str__(self) -> str:
        """Name the pattern."""
        return f"{self.n}:{self.m}{axis_text(self.axis)}"


@dataclasses.dataclass(frozen=True)
class TransposableNM:
    """Keep n of every m along both axes of each m x m block.

    The transposed kernel holds the pattern too, so that the matmul of the
    backward pass can also be sparse.

    Attributes:
      n: weights kept in each row and column of a block.
      m: side of a block.
      axis: fan-in axis; None: the fan-in axis. The other one is the last axis.

    Example:
      >>> import jax
      >>> import nmjax as nm
      >>> scores = jax.random.uniform(jax.random.key(0), (4, 4))
      >>> mask = nm.TransposableNM(2, 4).mask(scores)
      >>> mask.sum(0).tolist(), mask.sum(1).tolist()
      ([2, 2, 2, 2], [2, 2, 2, 2])

    Reference:
      Hubara et al., "Accelerated Sparse Neural Training: A Provable and Efficient
      Method to Find N:M Transposable Masks", 2021, arXiv 2102.08124.
    """

    n: int
    m: int
    axis: int | None = None

    def __post_init__(self) -> None:
        """Check n and m."""
        check_n_of_m(self.n, self.m)

    def oriented(self, fan_in: tuple[int, ...]) -> "TransposableNM":
        """Fill in the axis from the fan-in axes of a kernel."""
        return with_axis(self, fan_in)

    def validate(self, shape: Shape) -> None:
        """Raise unless both axes have lengths that are multiples of m."""
        fits_multiple(shape, axis_of(self), self.m, "m")
        fits_multiple(shape, -1, self.m, "m")

    def kept(self, shape: Shape, budget: Budget | None = None) -> int:
        """Count n of every m."""
        return math.prod(shape) * self.n // self.m

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Keep the best pattern of every block; see `nm.transposable_nm_mask`."""
        axis = from_end(axis_of(self), scores.ndim, stacked)
        return transposable_nm_mask(scores, self.n, self.m, (axis, -1))

    def __str__(self) -> str:
        """Name the pattern."""
        return f"transposable {self.n}:{self.m}{axis_text(self.axis)}"


@dataclasses.dataclass(frozen=True)
class VNM:
    """Keep n:4 inside 4 of every m inputs, the 4 shared by v outputs.

    Attributes:
      v: outputs that share their choice of 4 inputs.
      n: weights kept of the 4 chosen inputs, for each output.
      m: inputs from which 4 are chosen, 4 <= m.
      axis: fan-in axis; None: the fan-in axis. Vectors run along the last axis.

    Example:
      >>> import jax
      >>> import nmjax as nm
      >>> scores = jax.random.uniform(jax.random.key(0), (8, 4))
      >>> nm.VNM(4, 2, 8).mask(scores).sum(0).tolist()
      [2, 2, 2, 2]

    Reference:
      Castro et al., "VENOM: A Vectorized N:M Format for Unleashing the Power of
      Sparse Tensor Cores", 2023, arXiv 2310.02065.
    """

    v: int
    n: int
    m: int
    axis: int | None = None

    def __post_init__(self) -> None:
        """Check v, n and m."""
        check_n_of_m(self.n, self.m)
        check_n_of_m(1, self.v, largest=2**31 - 1)
        if self.n > 4 or self.m < 4:
            raise ValueError(
                f"{self!r} is not possible: n of 4 chosen inputs are kept out of "
                "every m, so n <= 4 <= m must hold"
            )

    def oriented(self, fan_in: tuple[int, ...]) -> "VNM":
        """Fill in the axis from the fan-in axes of a kernel."""
        return with_axis(self, fan_in)

    def validate(self, shape: Shape) -> None:
        """Raise unless blocks of m inputs and v outputs tile the kernel."""
        fits_multiple(shape, axis_of(self), self.m, "m")
        fits_multiple(shape, -1, self.v, "v")

    def kept(self, shape: Shape, budget: Budget | None = None) -> int:
        """Count n of every m."""
        return math.prod(shape) * self.n // self.m

    def mask(
        self, scores: FloatArray, budget: Budget | None = None, stacked: int = 0
    ) -> MaskArray:
        """Choose inputs per vector, then n of 4; see `nm.vnm_mask`."""
        axis = from_end(axis_of(self), scores.ndim, stacked)
        return vnm_mask(scores, self.v, self.n, self.m, axis, -1)

    def __str__(self) -> str:
        """Name the pattern."""
        return f"{self.v}:{self.n}:{self.m}{axis_text(self.axis)}"


def fixed_density(pattern: Pattern) -> Fraction | None:
    """Give the kept fraction that a pattern fixes by itself.

    Args:
      pattern: any pattern.

    Returns:
      An exact fraction, or None where a budget decides.

    Example:
      >>> import nmjax as nm
      >>> from nmjax import patterns
      >>> patterns.fixed_density(nm.NM(2, 4)), patterns.fixed_density(nm.FanIn())
      (Fraction(1, 2), None)
    """
    if isinstance(pattern, Dense):
        return Fraction(1)
    if isinstance(pattern, NM | TransposableNM | VNM):
        return Fraction(pattern.n, pattern.m)
    return None


def fan_in_axes(path: str, ndim: int) -> tuple[int, ...]:
    """Tell which axes of a kernel are its inputs, as Flax lays kernels out.

    Args:
      path: path name of the leaf.
      ndim: rank of one layer's kernel.

    Returns:
      Axes counted from the end: (-2,) for rank 2; (-3,) for the ``(in, heads,
      head_dim)`` kernels named query, key and value of attention; otherwise all but
      the last axis, as for convs and for attention's ``(heads, head_dim, out)``.

    Example:
      >>> from nmjax import patterns
      >>> patterns.fan_in_axes("attention/query/kernel", 3)
      (-3,)
      >>> patterns.fan_in_axes("conv/kernel", 4)
      (-4, -3, -2)
    """
    parent = path.split("/")[-2:-1]
    if ndim == 3 and parent and parent[0] in ("query", "key", "value"):
        return (-3,)
    return tuple(range(-ndim, -1))


def axis_of(pattern: Any) -> int:
    """Give a pattern's axis, -2 where it is still open."""
    return -2 if pattern.axis is None else pattern.axis


def with_axis(pattern: Any, fan_in: tuple[int, ...]) -> Any:
    """Fill in a pattern's open axis with the last of a kernel's fan-in axes."""
    if pattern.axis is not None:
        return pattern
    return dataclasses.replace(pattern, axis=fan_in[-1])


def from_end(axis: int, ndim: int, stacked: int) -> int:
    """Count an axis of one layer's kernel from the end."""
    return axis if axis < 0 else axis - (ndim - stacked)


def fits_multiple(shape: Shape, axis: int, length: int, name: str) -> None:
    """Raise unless an axis exists and its length is a multiple of a group's.

    Args:
      shape: shape of one layer's kernel.
      axis: the axis, counted from either end.
      length: length of a group.
      name: name of the group's length, for the message.

    Raises:
      ValueError: the axis is missing or does not divide into whole groups.
    """
    as_axis(axis, shape)
    check_multiple(shape, axis, length, name)


def axis_text(axis: int | None) -> str:
    """Name an axis, if there is one to name."""
    return "" if axis is None else f" along {axis}"
