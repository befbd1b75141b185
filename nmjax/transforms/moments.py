"""Adam's moments as pure functions on trees, in float32 or wider.

Moments of bfloat16 params are not kept in bfloat16: with ``b2 = 0.999`` an average
in 8 bits of mantissa never moves.
"""

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike
from jaxtyping import PyTree

from nmjax.transforms.checks import Scalar
from nmjax.typing import Params


def widen(dtype: DTypeLike) -> DTypeLike:
    """Give the dtype to compute in: float32, or wider if the given one is.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import moments
      >>> moments.widen(jnp.bfloat16)
      dtype('float32')
    """
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits > 32 else jnp.dtype(jnp.float32)


def init_adam(params: Params) -> optax.ScaleByAdamState:
    """Make zero moments, float32 or wider.

    Args:
      params: tree of floating arrays.

    Returns:
      optax's own Adam state.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import moments
      >>> moments.init_adam({"w": jnp.ones(2, jnp.bfloat16)}).nu["w"].dtype
      dtype('float32')
    """

    def zeros(p):
        return jnp.zeros_like(p, dtype=widen(p.dtype))

    return optax.ScaleByAdamState(
        jnp.zeros([], jnp.int32),
        jax.tree.map(zeros, params),
        jax.tree.map(zeros, params),
    )


def moment(updates: PyTree, old: PyTree, decay: Scalar, order: int) -> PyTree:
    r"""Average the first or second power of updates.

    .. math:: m \leftarrow \beta m + (1 - \beta) g^{order}

    Args:
      updates: tree of floating arrays g.
      old: tree of averages m.
      decay: :math:`\beta`, scalar.
      order: 1 or 2.

    Returns:
      The new averages, in the dtypes of the old ones.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import moments
      >>> print(moments.moment(jnp.array([2.0]), jnp.array([0.0]), 0.5, 2))
      [2.]
    """

    def average(g, m):
        beta = _scalar(decay, m.dtype)
        return (1 - beta) * g.astype(m.dtype) ** order + beta * m

    return jax.tree.map(average, updates, old)


def unbias(averages: PyTree, decay: Scalar, count: jax.Array) -> PyTree:
    r"""Undo the pull of an average towards its zero start.

    .. math:: \hat m = m / (1 - \beta^t)

    Args:
      averages: tree of averages m.
      decay: :math:`\beta`, scalar.
      count: t, number of values averaged, at least 1.

    Returns:
      The corrected averages.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import moments
      >>> print(moments.unbias(jnp.array([2.0]), 0.5, jnp.array(1)))
      [4.]
    """

    def correct(m):
        return m / (1 - _scalar(decay, m.dtype) ** count.astype(m.dtype))

    return jax.tree.map(correct, averages)


def precondition(updates: PyTree, second: PyTree, eps: Scalar, like: PyTree) -> PyTree:
    r"""Divide updates by the root of a second moment.

    .. math:: u = r / (\sqrt{\hat v} + \epsilon)

    Args:
      updates: tree r, in the dtypes of the second moments.
      second: tree of second moments :math:`\hat v`.
      eps: :math:`\epsilon`, scalar.
      like: tree whose dtypes the result takes.

    Returns:
      The preconditioned updates.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import moments
      >>> one = jnp.array([1.0])
      >>> print(moments.precondition(one, 4 * one, 0.0, one))
      [0.5]
    """

    def divide(r, v, g):
        return (r / (jnp.sqrt(v) + _scalar(eps, v.dtype))).astype(g.dtype)

    return jax.tree.map(divide, updates, second, like)


def _scalar(value: Scalar, dtype: DTypeLike) -> Scalar:
    """Leave a Python number at full precision; cast an array."""
    if isinstance(value, int | float):
        return value
    return jnp.asarray(value).astype(dtype)
