"""Checks of hyperparameters that may be numbers, schedules or traced arrays.

`optax.inject_hyperparams` hands arrays to a transform, traced ones under `jax.jit`.
A traced value cannot be checked; every other value is.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import numpy as np

from nmjax.paths import named_leaves
from nmjax.plans import Plan, check_plan
from nmjax.typing import Params

Scalar: TypeAlias = int | float | np.number | np.ndarray | jax.Array
"""A number or a scalar array, possibly traced."""

Schedule: TypeAlias = Callable[[Any], Any]
"""From step to scalar, as optax has them."""


def concrete(value: Any) -> float | None:
    """Read a scalar, if it is known now.

    Args:
      value: number, array, schedule or None.

    Returns:
      The number; None for a schedule, for None and for a traced array.

    Raises:
      TypeError: the value is none of these.
      ValueError: the value is an array that is no scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import checks
      >>> checks.concrete(jnp.array(2)), checks.concrete(lambda step: step)
      (2.0, None)
    """
    if value is None or callable(value):
        return None
    try:
        array = np.asarray(value)
    except jax.errors.TracerArrayConversionError:
        return None
    if array.dtype == object or array.dtype == bool or array.dtype.kind in "US":
        raise TypeError(f"expected a number, a schedule or a scalar array, got {value}")
    if array.shape != ():
        raise ValueError(f"expected a scalar, got an array of shape {array.shape}")
    return float(array)


def check_decay(decay: Any) -> None:
    """Raise unless a decay is >= 0, or not known yet."""
    value = concrete(decay)
    if decay is None or (value is not None and not value >= 0):
        raise ValueError(
            f"decay={decay!r} must be >= 0 (0 is the plain straight-through "
            "estimator), or a schedule from step to scalar"
        )


def check_fraction(name: str, value: Any) -> None:
    """Raise unless the decay of a moment is in [0, 1), or not known yet."""
    number = concrete(value)
    if number is not None and not 0 <= number < 1:
        raise ValueError(f"{name}={value!r} must be in [0, 1)")


def check_eps(eps: Any) -> None:
    """Raise unless the addend of a denominator is >= 0, or not known yet."""
    number = concrete(eps)
    if number is not None and not number >= 0:
        raise ValueError(f"eps={eps!r} must be >= 0")


def check_at_least(name: str, value: Any, least: int) -> None:
    """Raise unless a number of steps is an integer >= least, None or not known yet."""
    number = concrete(value)
    if number is not None and (number < least or number != int(number)):
        raise ValueError(f"{name}={value!r} must be an integer >= {least}")


def check_phase(start: Any, stop: Any) -> None:
    """Raise unless 0 <= start < stop, as far as they are given and known."""
    check_at_least("start", start, 0)
    check_at_least("stop", stop, 0)
    first, last = concrete(start), concrete(stop)
    if last is not None and (first or 0) >= last:
        raise ValueError(
            f"start={start!r} and stop={stop!r} leave no sparse phase: it is "
            "start <= step < stop"
        )


def check_is_plan(plan: Any) -> None:
    """Raise TypeError unless an argument is a plan."""
    if not isinstance(plan, Plan):
        raise TypeError(f"plan must be made by nm.plan, got {type(plan).__name__}")


def check_fit(plan: Plan, params: Params) -> None:
    """Raise unless the plan was made for these params.

    A tree without leaves passes: `optax.tree.map_params` calls `init` with one.
    """
    if jax.tree.leaves(params):
        check_plan(plan, named_leaves(params)[0])


def check_params(params: Params, name: str) -> Params:
    """Raise if `update` was called without params.

    Args:
      params: what `update` was given.
      name: the transform, for the message.

    Returns:
      The params.

    Raises:
      ValueError: params is None.

    Example:
      >>> from nmjax.transforms import checks
      >>> checks.check_params({"w": 1.0}, "nm.srste")
      {'w': 1.0}
    """
    if params is None:
        raise ValueError(
            f"{name} needs the params: call tx.update(grads, state, params)"
        )
    return params
