"""Peers of matmul.py: scipy, jax.experimental.sparse and torch.

x and all activations have outputs first, so that no step transposes.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax.experimental import sparse as jax_sparse
from matmul_cases import Case, Form, Weights, chain_of, nbytes
from scipy import sparse as scipy_sparse


def of_library(case: Case, weights: Weights, x: jax.Array, name: str) -> Form:
    """Make the forms of scipy and of jax.experimental.sparse.

    Of scipy's two ways with CSR the faster one is taken; the note of the form names it.

    Args:
      case: the case.
      weights: its weights.
      x: inputs ``(batch, K)``.
      name: "scipy CSR", "scipy BSR", "BCOO" or "BCSR".

    Returns:
      The form, whose result has outputs first.

    Raises:
      ValueError: there is no such name.
    """
    columns = np.ascontiguousarray(np.asarray(x).T)
    columns = columns[:, 0] if x.shape[0] == 1 else columns
    units = case.units(x.shape[0])
    if name in ("BCOO", "BCSR"):
        arrays = arrays_of(case, weights, name)
        call = partial(flipped, jnp.asarray(columns), arrays)
        return Form(call, nbytes(arrays) + 4 * units, flipped=True)
    ways = {"scipy BSR": ["BSR of w.T"], "scipy CSR": ["CSR of w.T", "CSR of w"]}
    if name not in ways:
        raise ValueError(f"there is no form {name!r}")
    times = {}
    for way in ways[name]:
        call = partial(chain_of_scipy, columns, arrays_of(case, weights, way))
        times[min(timing.seconds(call) for _ in range(3))] = way, call
    way, call = times[min(times)]
    arrays = arrays_of(case, weights, way)
    stored = sum(a.data.nbytes + a.indices.nbytes + a.indptr.nbytes for a in arrays)
    return Form(call, stored + 4 * units, flipped=True, note=way)


@jax.jit
def flipped(x: jax.Array, weights: Sequence[Any]) -> jax.Array:
    """Run a chain of jax.experimental.sparse arrays ``(F, K)``."""
    return chain_of(lambda x, w: w @ x)(x, weights)


def chain_of_scipy(x: np.ndarray, weights: Sequence[Any]) -> np.ndarray:
    """Run a chain of scipy's arrays ``(F, K)``."""
    x = weights[0] @ x
    for w in weights[1:]:
        np.maximum(x, 0, out=x)
        x = w @ x
    return x


@lru_cache(6)
def arrays_of(case: Case, weights: Weights, way: str) -> list[Any]:
    """Make one array ``(F, K)`` per layer; layers of one shape have copies.

    Args:
      case: the case.
      weights: its weights.
      way: "BCOO", "BCSR", "BSR of w.T", "CSR of w.T" or "CSR of w", whose transpose
        is a CSC: every input adds to its outputs.

    Returns:
      Arrays of jax.experimental.sparse or scipy.
    """
    make: dict[str, Callable[[np.ndarray], Any]] = {
        "BCOO": lambda w: jax_sparse.BCOO.from_scipy_sparse(csr(w.T)),
        "BCSR": lambda w: jax_sparse.BCSR.from_scipy_sparse(csr(w.T)),
        "BSR of w.T": lambda w: scipy_sparse.bsr_array(w.T, blocksize=case.sides),
        "CSR of w.T": lambda w: csr(w.T),
        "CSR of w": lambda w: csr(w).T,
    }
    dense = dict(zip(case.shapes, weights.plain, strict=True))
    made = {shape: make[way](np.asarray(w)) for shape, w in dense.items()}
    if way in ("BCOO", "BCSR"):
        return [jax.tree.map(jnp.array, made[shape]) for shape in case.shapes]
    return [made[shape].copy() for shape in case.shapes]


def csr(w: np.ndarray) -> Any:
    """Give scipy's CSR."""
    return scipy_sparse.csr_array(w)


def of_torch(
    case: Case, weights: Weights, x: jax.Array, name: str, peer: timing.Peer | str
) -> Form | str:
    """Give a function of the peer, which makes and checks weights of its own.

    Args:
      case: the case.
      weights: its weights, of which only the sizes are used.
      x: inputs ``(batch, K)``.
      name: "torch dense", "torch CSR" or "torch int8".
      peer: matmul_torch.py, or why there is none.

    Returns:
      The form, or why there is none.
    """
    if isinstance(peer, str):
        return peer
    key = f"{case.layers}, {case.density:g}, {x.shape[0]}, {name}"
    if key not in peer.functions:
        return "torch was not asked for it"
    entries = sum(w.size for w in weights.plain)
    stored = {"torch dense": 4 * entries, "torch int8": entries}
    rows = 4 * sum(outputs + 1 for _, outputs in case.shapes)
    stored["torch CSR"] = round(case.density * entries) * 8 + rows
    touched = stored[name] + 4 * case.units(x.shape[0])
    note = "float32" if case.values != "float32" and name == "torch dense" else ""
    return Form(peer.functions[key], touched, note=note)
