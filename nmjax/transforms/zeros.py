"""Zeros: which parts of an optimizer's state stay zero where its inputs are.

Most moments do: an average of zeros is zero. Some do not: adafactor adds a small
number to every squared gradient. To set all of them to zero after every step would
cost most optimizers a pass over their whole state, so the ones that need it are found
by reading the program of `inner.update` (its jaxpr), without running it.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import PyTree

EVERYWHERE = -1  # zero at all entries
Mark = int | None

_ONE = {"abs", "cbrt", "convert_element_type", "copy", "copy_p", "neg", "real"}
_ONE |= {"reduce_precision", "sign", "sqrt", "square", "stop_gradient", "tanh"}
_ONE |= {"optimization_barrier"}
_ALL = {"add", "add_any", "max", "min", "sub"}


def stay_zero(
    function: Callable[..., PyTree], inputs: Sequence[PyTree], marks: Sequence[Mark]
) -> list[Mark]:
    """Find the outputs that are zero wherever the inputs of their mark are zero.

    The analysis knows element-wise arithmetic with finite numbers; whatever it does
    not know counts as not zero.

    Args:
      function: a function that JAX can trace.
      inputs: its arguments, trees of arrays.
      marks: one per array of the inputs. Inputs with the same number have one shape
        and are zero at the same entries; None: not known to be zero anywhere.

    Returns:
      One mark per array that the function returns.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.transforms import zeros
      >>> average = lambda m, g: (0.9 * m + 0.1 * g, g**2 + 1e-30)
      >>> zeros.stay_zero(average, (jnp.ones(3), jnp.ones(3)), (0, 0))
      [0, None]
    """
    shapes = jax.eval_shape(lambda *trees: trees, *inputs)
    return _outputs(jax.make_jaxpr(function)(*shapes), marks)


def _outputs(closed: Any, marks: Sequence[Mark]) -> list[Mark]:
    """Follow marks through a program."""
    jaxpr = getattr(closed, "jaxpr", closed)
    known = dict(zip(jaxpr.invars, marks, strict=True))

    def read(atom: Any) -> Mark:
        if hasattr(atom, "val"):  # a literal
            return EVERYWHERE if np.ndim(atom.val) == 0 and atom.val == 0 else None
        return known.get(atom)

    for eqn in jaxpr.eqns:
        found = _follow(eqn, [read(atom) for atom in eqn.invars])
        known.update(zip(eqn.outvars, found, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _follow(eqn: Any, marks: list[Mark]) -> list[Mark]:
    """Mark the outputs of one operation."""
    name = eqn.primitive.name
    unknown: list[Mark] = [None] * len(eqn.outvars)
    if name in _ONE:
        return marks if len(marks) == len(unknown) else unknown
    if name in _ALL:
        return [_common(marks)]
    if name == "mul":
        return [next((mark for mark in marks if mark is not None), None)]
    if name == "div":
        return marks[:1]
    if name == "select_n":
        return [_common(marks[1:])]
    if name == "integer_pow" and eqn.params["y"] > 0:
        return marks
    if name == "broadcast_in_dim":
        return [EVERYWHERE if marks[0] == EVERYWHERE else None]
    if name == "cond":
        each = [_outputs(branch, marks[1:]) for branch in eqn.params["branches"]]
        return [_common(found) for found in zip(*each, strict=True)]
    inside = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
    if name in ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call"):
        return _outputs(inside, marks)
    return unknown


def _common(marks: Sequence[Mark]) -> Mark:
    """Give the mark that all have, where zeros everywhere fit any."""
    if None in marks:
        return None
    rest = set(marks) - {EVERYWHERE}
    return EVERYWHERE if not rest else rest.pop() if len(rest) == 1 else None
