"""Schedules: how much to drop, and how dense to be, at a step.

All are functions of a traced step, built on jnp, to be given to the transforms.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

Scalar = float | int | Float[Array, ""]
Schedule = Callable[[Int[Array, ""] | int], Float[Array, ""]]


def constant_drop(alpha: Scalar) -> Schedule:
    """Drop the same fraction at every change of topology.

    Args:
      alpha: drop fraction in [0, 1].

    Returns:
      A schedule from step to drop fraction.

    Raises:
      ValueError: `alpha` is outside [0, 1].

    Example:
      >>> from nmjax import schedules
      >>> float(schedules.constant_drop(0.5)(7))
      0.5
    """
    _check_alpha(alpha)
    return lambda step: jnp.asarray(alpha).astype(jnp.float32)


def cosine_drop(alpha: Scalar, stop: int) -> Schedule:
    r"""Let the drop fraction fall along half a cosine.

    .. math:: f(t) = \frac{\alpha}{2} \left(1 + \cos\frac{\pi t}{T}\right)

    Args:
      alpha: drop fraction at step 0, in [0, 1].
      stop: T, the step at which it reaches 0.

    Returns:
      A schedule from step to drop fraction.

    Raises:
      ValueError: `alpha` is outside [0, 1], or `stop` is below 1.

    Example:
      >>> from nmjax import schedules
      >>> drop = schedules.cosine_drop(0.5, 100)
      >>> [round(float(drop(step)), 3) for step in (0, 50, 100)]
      [0.5, 0.25, 0.0]

    Reference:
      Evci et al., 2020, arXiv 1911.11134, section 3.
    """
    _check_alpha(alpha)
    _check_stop(stop)
    return lambda step: alpha / 2 * (1 + jnp.cos(jnp.pi * _progress(step, stop)))


def linear_drop(alpha: Scalar, stop: int) -> Schedule:
    r"""Let the drop fraction fall linearly: ``alpha * (1 - t / T)``.

    Args:
      alpha: drop fraction at step 0, in [0, 1].
      stop: T, the step at which it reaches 0.

    Returns:
      A schedule from step to drop fraction.

    Raises:
      ValueError: `alpha` is outside [0, 1], or `stop` is below 1.

    Example:
      >>> from nmjax import schedules
      >>> float(schedules.linear_drop(0.5, 100)(50))
      0.25
    """
    return inverse_power_drop(alpha, stop, 1.0)


def inverse_power_drop(alpha: Scalar, stop: int, power: float | int = 3) -> Schedule:
    r"""Let the drop fraction fall as a power of the steps left.

    .. math:: f(t) = \alpha \left(1 - \frac{t}{T}\right)^{k}

    Args:
      alpha: drop fraction at step 0, in [0, 1].
      stop: T, the step at which it reaches 0.
      power: k > 0; 1 is linear.

    Returns:
      A schedule from step to drop fraction.

    Raises:
      ValueError: `alpha` is outside [0, 1], `stop` is below 1 or `power` not positive.

    Example:
      >>> from nmjax import schedules
      >>> float(schedules.inverse_power_drop(0.5, 100)(50))
      0.0625

    Reference:
      Evci et al., 2020, arXiv 1911.11134, appendix.
    """
    _check_alpha(alpha)
    _check_stop(stop)
    if not power > 0:
        raise ValueError(f"power={power!r} must be > 0")
    return lambda step: alpha * (1 - _progress(step, stop)) ** power


def _progress(step: Int[Array, ""] | int, stop: int) -> Float[Array, ""]:
    """Give the share of steps done, in [0, 1]."""
    return jnp.clip(jnp.asarray(step, jnp.float32) / stop, 0.0, 1.0)


def _check_alpha(alpha: Scalar) -> None:
    if isinstance(alpha, int | float) and not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha!r} is a drop fraction and must be in [0, 1]")


def _check_stop(stop: int) -> None:
    if not stop >= 1:
        raise ValueError(f"stop={stop!r} must be a step >= 1")
