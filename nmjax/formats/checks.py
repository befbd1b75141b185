"""What all compressed arrays share: their size in words, and checks of what goes in."""

import dataclasses
import json
import math
from typing import Any, TypeVar, cast

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from nmjax.typing import MaskArray, WeightArray


class Compressed:
    """A compressed array: a frozen dataclass that is a pytree.

    Its arrays are the leaves, its shape and layout are static. Under `jax.vmap` and
    `jax.lax.scan` the leading axis of every array is mapped over, so that a stack of
    layers is a compressed array too.
    """

    values: Any
    scales: Any
    dense_shape: tuple[int, ...]

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Lengths of the leading axes that count the layers of a stack."""
        raise NotImplementedError

    @property
    def layout(self) -> str:
        """What is stored, in words."""
        raise NotImplementedError

    @property
    def matrix(self) -> "Compressed | None":
        """The same array as a matrix ``(inputs, outputs)``, without any work.

        None where inputs and outputs are not the leading and the trailing axes.
        """
        raise NotImplementedError

    @property
    def transposed(self) -> "Compressed | None":
        """The transpose of a matrix, without any work; None where there is none."""
        return None

    def place(self, values: WeightArray) -> WeightArray:
        """Put values like `values` to where these stand in the dense array."""
        raise NotImplementedError

    @property
    def weights(self) -> WeightArray:
        """The stored weights: `values`, times `scales` where there are scales."""
        if self.scales is None:
            return self.values
        scaled = self.values.astype(jnp.float32) * self.scales.astype(jnp.float32)
        return scaled.astype(self.scales.dtype)

    def todense(self) -> WeightArray:
        """Give the dense array."""
        return self.place(self.weights)

    def astype(self, dtype: Any) -> "Compressed":
        """Cast to a floating dtype; values that have scales keep theirs.

        Args:
          dtype: dtype of the dense array.

        Returns:
          The compressed array of that dtype.

        Raises:
          TypeError: the dtype is no floating dtype.
        """
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"compressed arrays have floating dtypes, not {np.dtype(dtype)}; "
                "formats.quantize stores integers with scales"
            )
        name = "values" if self.scales is None else "scales"
        changed = {name: getattr(self, name).astype(dtype)}
        return dataclasses.replace(cast(Any, self), **changed)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return (*self.stack_shape, *self.dense_shape)

    @property
    def dtype(self) -> Any:
        """Dtype of the dense array."""
        return self.values.dtype if self.scales is None else self.scales.dtype

    @property
    def ndim(self) -> int:
        """Rank of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the dense array."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of everything stored."""
        return sum(
            math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
            for leaf in vars(self).values()
            if hasattr(leaf, "dtype")
        )

    @property
    def dense_nbytes(self) -> int:
        """Bytes of the dense array."""
        return self.size * np.dtype(self.dtype).itemsize

    @property
    def ratio(self) -> float:
        """Bytes stored, as a fraction of those of the dense array."""
        return self.nbytes / max(1, self.dense_nbytes)

    def __repr__(self) -> str:
        """Show layout, dense shape and size."""
        name = type(self).__name__
        if not all(hasattr(self.values, a) for a in ("shape", "dtype")):
            fields = ", ".join(f"{k}={v!r}" for k, v in vars(self).items())
            return f"{name}({fields})"  # of shardings, paths and the like
        shape = ", ".join(map(str, self.shape))
        dtype = str(self.dtype)
        if self.scales is not None:
            dtype = f"{self.values.dtype} with scales in {dtype}"
        return (
            f"{name}({self.layout}, {dtype}[{shape}], {self.nbytes:,} bytes, "
            f"{self.ratio:.3g} of dense)"
        )


Kind = TypeVar("Kind", bound=type)


def register(kind: Kind) -> Kind:
    """Register a dataclass as a pytree, with `jax.export` too.

    Args:
      kind: a frozen dataclass; fields with the metadata ``static`` are numbers or
        tuples of numbers.

    Returns:
      The class.
    """
    jax.tree_util.register_dataclass(kind)
    jax.export.register_pytree_node_serialization(
        kind,
        serialized_name=f"nmjax.{kind.__name__}",
        serialize_auxdata=lambda aux: json.dumps(aux).encode(),
        deserialize_auxdata=lambda data: _as_tuples(json.loads(bytes(data))),
    )
    return kind


def _as_tuples(aux: Any) -> Any:
    """Make tuples of the lists that JSON gives."""
    return tuple(map(_as_tuples, aux)) if isinstance(aux, list) else aux


def check_concrete(name: str, *arrays: Any) -> None:
    """Raise TypeError if an array is traced.

    Args:
      name: the function, for the message.
      *arrays: arrays or None.

    Raises:
      TypeError: one is traced.
    """
    if any(isinstance(array, Tracer) for array in arrays):
        raise TypeError(
            f"{name} was called under a JAX transformation: whether weights fit the "
            "format has to be checked. Compress outside of jax.jit and pass the "
            "compressed arrays in"
        )


def check_shape_of_mask(weights: WeightArray, mask: MaskArray | None) -> MaskArray:
    """Give the mask, or that of the non-zeros; it must cover them.

    Args:
      weights: the dense array.
      mask: active weights, or None.

    Returns:
      A mask of the shape of `weights`.

    Raises:
      ValueError: shapes differ, or a weight outside of the mask is not zero.
    """
    nonzero = weights != 0
    if mask is None:
        return nonzero
    if mask.shape != weights.shape:
        raise ValueError(
            f"mask of shape {mask.shape} for weights of shape {weights.shape}"
        )
    if (place := first_place(nonzero & ~mask)) is not None:
        raise ValueError(
            f"the weight at {place} is {weights[place]} but not active in the mask; "
            "make params exactly sparse with nm.project(params, masks) first"
        )
    return mask


def first_place(flags: MaskArray) -> tuple[int, ...] | None:
    """Give the indices of the first True entry, or None."""
    if not bool(jnp.any(flags)):
        return None
    where = int(jnp.argmax(flags.ravel()))
    return tuple(int(i) for i in np.unravel_index(where, flags.shape))
