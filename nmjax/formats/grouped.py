"""N:M arrays: the kept values of every group, and where in the group they stood."""

import dataclasses
from typing import Any

import jax.numpy as jnp
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
from nmjax.typing import FloatArray, MaskArray


@register
@dataclasses.dataclass(frozen=True, repr=False)
class NMArray(Compressed):
    """An array of which n of every m consecutive entries are stored.

    Groups run along `axis` of the dense array, length K. It comes last in what is
    stored: a Dense kernel ``(K, F)`` has values ``(F, K * n / m)``, a convolution
    ``(h, w, K, F)`` has ``(h, w, F, K * n / m)``.

    Positions in a group are ascending and distinct, also in groups with fewer
    non-zeros than n: these are filled up with zeros. They take 1, 2, 4 or 8 bits, for
    m up to 2, 4, 16 or 256: 2 bits for 2:4, four to a byte, the first in the lowest
    bits.

    Attributes:
      values: kept values, ``(..., F, K * n / m)``.
      codes: their positions, packed along the last axis, uint8.
      n: values kept of a group.
      m: length of a group.
      axis: axis of the dense array along which groups run, counted from the end.

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
    codes: Any
    n: int = dataclasses.field(metadata={"static": True})
    m: int = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_dense(
        cls,
        weights: FloatArray,
        n: int,
        m: int,
        axis: int = -2,
        mask: MaskArray | None = None,
    ) -> "NMArray":
        """Compress an array.

        Args:
          weights: the dense array.
          n: values kept of a group.
          m: length of a group.
          axis: axis along which groups run.
          mask: active weights, which keep their positions even where they are zero.
            Default: those that are not zero.

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
        groups, active = (
            split_axis(jnp.moveaxis(array, axis, -1), weights.ndim - 1, m)
            for array in (weights, mask)
        )
        counts = jnp.sum(active, axis=-1, dtype=jnp.int32)
        if (place := first_place(counts > n)) is not None:
            raise ValueError(
                f"group {place[-1]} along axis {axis}, at {place[:-1]} of the other "
                f"axes, has {int(counts[place])} active weights, more than n={n} of "
                f"m={m}"
            )
        # Active positions first, then the lowest others; back in ascending order.
        order = jnp.argsort(~active, axis=-1, stable=True)[..., :n]
        positions = jnp.sort(order, axis=-1)
        values = jnp.take_along_axis(groups, positions, axis=-1)
        last = values.ndim - 2
        codes = merge_axis(positions.astype(jnp.uint8), last)
        packed = pack_codes(codes, code_bits(m))
        return cls(merge_axis(values, last), packed, n, m, axis)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        *others, kept = self.values.shape
        others.insert(len(others) + 1 + self.axis, kept * self.m // self.n)
        return tuple(others)

    @property
    def positions(self) -> Array:
        """Positions in their groups, uint8, of the shape of `values`."""
        return unpack_codes(self.codes, code_bits(self.m), self.values.shape[-1])

    @property
    def layout(self) -> str:
        """What is stored, in words."""
        return f"{self.n}:{self.m} along {self.axis}"

    def todense(self) -> FloatArray:
        """Give the dense array."""
        last = self.values.ndim - 1
        values = split_axis(self.values, last, self.n)
        positions = split_axis(self.positions, last, self.n)
        lane = jnp.arange(self.m, dtype=jnp.uint8)
        groups = jnp.zeros((*values.shape[:-1], self.m), values.dtype)
        for i in range(self.n):
            here = positions[..., i : i + 1] == lane
            groups = jnp.where(here, values[..., i : i + 1], groups)
        return jnp.moveaxis(merge_axis(groups, last), -1, self.axis)
