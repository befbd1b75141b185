"""The order of scores that every mask of nmjax agrees on, and checks of arguments.

Masks compare scores as integers, not as floats. The order is total and the same on
every device: ``-inf < negative < 0 < positive < +inf < NaN``, ``-0.0`` equals ``0.0``
and every NaN equals every other. A NaN is therefore kept, and stays visible, instead
of being pruned silently.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import ArrayLike
from jaxtyping import Array, Integer, Shaped

__all__ = ["order_keys"]

_INTEGERS = {2: jnp.int16, 4: jnp.int32, 8: jnp.int64}


def order_keys(scores: Shaped[ArrayLike, "..."]) -> Integer[Array, "..."]:
    r"""Map scores to signed integers of the same order.

    With the bit pattern split into a sign and a magnitude ``mag``, the key is

    .. math:: \text{key} = \begin{cases} \text{mag}(\infty) + 1 & \text{NaN} \\
        \pm \text{mag} & \text{otherwise} \end{cases}

    Args:
      scores: Array of any real floating dtype. 8-bit floats are converted to float16
        first, which is exact.

    Returns:
      int16, int32 or int64 keys for 16, 32 and 64 bit floats, of the same shape.

    Raises:
      TypeError: If the dtype is not a real floating one.

    >>> import jax.numpy as jnp
    >>> from nmjax.masking.ordering import order_keys
    >>> keys = order_keys(jnp.array([jnp.nan, jnp.inf, 1.0, 0.0, -0.0, -1.0]))
    >>> bool((keys[:3] > keys[1:4]).all()), bool(keys[3] == keys[4])
    (True, True)
    """
    scores = as_scores(scores)
    if scores.dtype.itemsize == 1:
        scores = scores.astype(jnp.float16)
    integer = _INTEGERS[scores.dtype.itemsize]
    top = jnp.asarray(jnp.iinfo(integer).max, integer)
    infinity, below = np.asarray([np.inf, -np.inf], scores.dtype).view(integer)
    bits = lax.bitcast_convert_type(scores, integer)
    magnitude = bits & top
    positive = jnp.minimum(magnitude, infinity + 1)  # every NaN is infinity + 1
    # Read as a signed integer, -inf has the highest pattern of all negative floats;
    # those above it are NaNs with a sign.
    return jnp.where(bits <= below, -magnitude, positive)


def as_scores(scores: Shaped[ArrayLike, "..."]) -> Array:
    """Return scores as an array, or raise TypeError if they are not real floats."""
    scores = jnp.asarray(scores)
    if not jnp.issubdtype(scores.dtype, jnp.floating):
        raise TypeError(
            f"scores must have a real floating dtype, got {scores.dtype} of shape "
            f"{scores.shape}; convert them with scores.astype(jnp.float32)"
        )
    return scores


def sum_dtype(dtype: np.dtype) -> np.dtype:
    """Return the dtype that scores of dtype are added in: float32, or float64."""
    return np.dtype(np.float64 if dtype == np.float64 else np.float32)


def as_count(k, size: int, what: str) -> int | jax.Array:
    """Check that k is an integer from 0 to size; a traced k is only type checked."""
    if isinstance(k, bool | np.bool_):
        raise TypeError(f"k must be an integer, got the bool {k}")
    if isinstance(k, int | np.integer):
        if not 0 <= int(k) <= size:
            raise ValueError(f"k={int(k)} is not between 0 and {size}, the {what}")
        return int(k)
    dtype, shape = getattr(k, "dtype", None), getattr(k, "shape", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or shape != ():
        raise TypeError(
            "k must be an int or an integer scalar array, got "
            f"{type(k).__name__} of dtype {dtype} and shape {shape}"
        )
    if isinstance(k, np.ndarray):
        return as_count(k[()], size, what)
    return k


def check_n_of_m(n: int, m: int, largest: int = 64) -> None:
    """Raise unless n and m are integers with 1 <= n <= m <= largest."""
    for name, value in (("n", n), ("m", m)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name} must be an int, got {value!r}")
    if not 1 <= n <= m:
        raise ValueError(
            f"n={n} of m={m} is not possible: n counts the KEPT entries of every m, "
            "so 1 <= n <= m must hold"
        )
    if m > largest:
        raise ValueError(f"m={m} is larger than {largest}, the largest group")


def as_axis(axis: int, shape: Sequence[int], name: str = "axis") -> int:
    """Return axis counted from the front, or raise ValueError when out of range."""
    rank = len(shape)
    if not -rank <= axis < rank:
        raise ValueError(
            f"{name}={axis} is out of range for shape {tuple(shape)} of rank {rank}"
        )
    return axis % rank


def as_axes(axes: int | Sequence[int], shape: Sequence[int], name: str = "axes"):
    """Return axes counted from the front as a tuple; none may occur twice."""
    axes = (axes,) if isinstance(axes, int | np.integer) else tuple(axes)
    found = tuple(as_axis(int(axis), shape, name) for axis in axes)
    if len(set(found)) != len(found):
        raise ValueError(f"{name}={axes} names an axis of shape {tuple(shape)} twice")
    return found


def check_multiple(shape: Sequence[int], axis: int, m: int, name: str = "m") -> None:
    """Raise ValueError unless the axis divides into whole groups of m."""
    if shape[axis] % m:
        raise ValueError(
            f"axis {axis} of shape {tuple(shape)} has length {shape[axis]}, which is "
            f"not a multiple of {name}={m}; choose another axis or pattern, or keep "
            "this array dense"
        )


def count_shards(x: Array, axis: int) -> int:
    """Count the shards along an axis; known on an Explicit mesh only, else 1."""
    sharding = jax.typeof(x).sharding
    names = sharding.spec[axis] or ()
    names = names if isinstance(names, tuple) else (names,)
    return math.prod(sharding.mesh.shape[name] for name in names)


def explicit_sharding(x: Array) -> NamedSharding | None:
    """Give the sharding of an array on an Explicit mesh, None elsewhere.

    What is made from nothing, such as an index, is whole on every device otherwise.
    """
    sharding = jax.typeof(x).sharding
    return sharding if any(sharding.spec) else None


def split_axis(x: Array, axis: int, m: int) -> Array:
    """Split one axis in place into (groups, m): no shard of it has to move."""
    shape = x.shape
    return x.reshape(shape[:axis] + (shape[axis] // m, m) + shape[axis + 1 :])


def merge_axis(x: Array, axis: int) -> Array:
    """Merge axis with the one after it, the inverse of `split_axis`."""
    shape = x.shape
    merged = shape[axis] * shape[axis + 1]
    return x.reshape(shape[:axis] + (merged,) + shape[axis + 2 :])
