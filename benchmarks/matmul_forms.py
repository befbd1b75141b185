"""Ways to run the cases of matmul.py, as functions without arguments.

A way that this machine or this version does not have is a string instead: the reason.
Results are compared with that of dense weights before a form is given to be timed.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import matmul_peers
import numpy as np
import timing
from matmul_cases import Case, Form, Unavailable, Weights, chain_of, nbytes, short

import nmjax as nm
from nmjax.kernels import choosing

BASE = "dense float32"
"""The form that all ratios are taken to, whatever the dtype of the values is."""

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2, "int8": 1e-1}
"""Largest error of a result, as a fraction of the largest entry, that is let pass.
Sums of float32 differ in their order only; bfloat16 rounds between layers; kernels for
int8 values may round the inputs of every layer to int8 too."""

LARGEST_STEP = 2**28
"""Bytes that `by_blocks` may write for one layer; more takes seconds a call."""


# Ways to multiply --------------------------------------------------------------------


def masked(x: jax.Array, w: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Multiply with masked dense weights."""
    dense, mask = w
    return x @ jnp.where(mask, dense, 0)


PRODUCTS: dict[str, Callable[..., Any]] = {
    "dense": lambda x, w: x @ w,
    "masked dense": masked,
    "nmjax": nm.matmul,
    "xla": partial(nm.matmul, implementation="xla"),
    "native": partial(nm.matmul, implementation="native"),
    "prepared": nm.matmul,
    **choosing.FORMS,
}


@cache
def jitted(name: str) -> Any:
    """Jit a chain of products by name: one function, so that shapes compile once."""
    product, activated = PRODUCTS[name], None
    if name in ("nmjax", "xla", "native", "prepared"):
        activated = partial(product, activation="relu")
    return jax.jit(chain_of(product, activated))


def next_of(
    function: Callable[..., Any], x: jax.Array, arrays: Sequence[Any]
) -> Callable[[], Any]:
    """Give a function that multiplies with the next of some arrays at every call."""
    chains = itertools.cycle([[array] for array in arrays])
    return lambda: function(x, next(chains))


def forms_of(
    case: Case,
    weights: Weights,
    x: jax.Array,
    names: Sequence[str],
    torch: timing.Peer | str,
) -> dict[str, Form | str]:
    """Make ways to run a case; all but those of torch are checked against `BASE`.

    Args:
      case: the case.
      weights: its weights.
      x: inputs ``(batch, K)`` in float32.
      names: the ways wanted; `BASE` is always there.
      torch: the peer, or why there is none.

    Returns:
      A form for each name, or the reason why there is none.

    Raises:
      ArithmeticError: a result is wrong.
    """
    own = x.astype(case.inputs_dtype)

    def form_of(name: str, x: jax.Array, arrays: Sequence[Any]) -> Form:
        touched = nbytes(arrays) + case.units(x.shape[0]) * x.dtype.itemsize
        if not case.apart:
            return Form(partial(jitted(name), x, arrays), touched)
        return Form(next_of(jitted(name), x, arrays), touched // len(arrays))

    found: dict[str, Form | str] = {BASE: form_of("dense", x, weights.plain)}
    expected = np.asarray(
        jitted("dense")(x, weights.plain[: 1 if case.apart else None])
    )
    pairs = list(zip(weights.dense, weights.masks, strict=True))
    for name in names:
        if name == "dense" and own.dtype == x.dtype:
            continue  # it is the base
        if name.startswith("torch"):
            found[name] = matmul_peers.of_torch(case, weights, x, name, torch)
            continue
        try:
            if name in ("dense", "masked dense"):
                form = form_of(name, own, weights.dense if name == "dense" else pairs)
            elif name == "native, x float32":
                form = form_of("native", x, weights.small)
            elif name == "prepared":
                form = form_of(name, own, weights.prepared)
            elif name in PRODUCTS:
                _check_step(case, name, x.shape[0])
                form = form_of(name, own, weights.small)
            else:
                form = matmul_peers.of_library(case, weights, x, name)
            assert callable(form.call)
            result = form.call()
        except (NotImplementedError, Unavailable) as error:
            found[name] = short(error)
            continue
        except (TypeError, ValueError) as error:
            if not name.startswith(("native", *choosing.NATIVE)):
                raise
            found[name] = short(error)
            continue
        _check(f"{name} of {case.title}", case.values, result, expected, form.flipped)
        found[name] = form
    return found


def too_slow(form: Form, patience: float) -> str | None:
    """Say how long a call takes, if even the fastest of three exceeds the patience."""
    call = form.call
    if isinstance(call, timing.PeerFunction):
        call.seconds(1)  # makes the weights
    took = float("inf")
    for _ in range(3):
        if isinstance(call, timing.PeerFunction):
            took = min(took, call.seconds(1))
        else:
            took = min(took, timing.seconds(call))
        if took <= patience:
            return None
    return f"one call takes {took:.1f} s"


def _check_step(case: Case, name: str, batch: int) -> None:
    """Raise Unavailable where a form would write more than the memory is good for."""
    if name != "blocks":
        return
    outputs, inputs = case.sides
    blocks = max(k * f for k, f in case.shapes) * case.density / (outputs * inputs)
    step = blocks * batch * (outputs + inputs) * 4
    if step > LARGEST_STEP:
        raise Unavailable(f"would write {step / 2**20:,.0f} MiB for a layer")


def _check(
    what: str, values: str, result: Any, expected: np.ndarray, flipped: bool
) -> None:
    """Raise ArithmeticError if a result differs from that of the base."""
    found = np.asarray(result).astype(np.float32)
    found = found.reshape(expected.shape[::-1]).T if flipped else found
    error = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not error <= TOLERANCE[values]:
        raise ArithmeticError(
            f"{what} is wrong: it differs from {BASE} by {error:.2g} of the largest "
            f"entry, more than {TOLERANCE[values]:g}"
        )
