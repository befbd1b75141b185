"""Products with compressed weights in plain XLA operations.

Each function takes x ``(batch, K)`` and weights of dense shape ``(K, F)`` of the same
dtype, adds up in float32 (float64 for float64) and returns ``(batch, F)`` in that
dtype. `by_decompression` is the definition; the others compute the same sums in another
order.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from nmjax.formats import BlockArray, Compressed, FanInArray, NMArray
from nmjax.masking.ordering import sum_dtype

_SLOTS = 12
"""Slots that `by_slots` adds in a step: of 4 to 24 the fastest with AVX-512."""


def by_decompression(
    x: Num[Array, "batch K"], w: Compressed, dtype: Any = None
) -> Num[Array, "batch F"]:
    """Decompress the weights and multiply.

    Args:
      x: inputs.
      w: any compressed matrix.
      dtype: dtype of the product; default that of x.

    Returns:
      The product. Integers are added up in int32.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import reference
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> reference.by_decompression(jnp.array([[3.0, 5.0]]), w).tolist()
      [[5.0, 6.0]]
    """
    transposed = w.transposed
    if isinstance(w, NMArray) and w.axis == -2 and transposed is not None:
        # As stored, outputs first: XLA would spend longer on turning it than on it all.
        return _multiply_transposed(x, transposed.todense(), dtype)
    return multiply(x, w.todense(), dtype)


def by_slots(
    x: Float[Array, "batch K"],
    w: FanInArray,
    finish: Callable[[Array], Array] = lambda product: product,
) -> Float[Array, "batch F"]:
    r"""Add up one stored input of every neuron after the other.

    .. math:: y_{bf} = \sum_{j < k} v_{fj} \, x_{b, i_{fj}}

    Reads no dense weights. The inputs are transposed first, so that every step gathers
    whole rows, one for each neuron.

    Args:
      x: inputs.
      w: a matrix whose neurons are its columns.
      finish: what is done to the product before it is transposed to what is returned,
        of shape ``(F, batch)`` here. XLA fuses a transposition with what follows it,
        and then reads memory in an order that takes five times as long.

    Returns:
      The product; zeros for ablated neurons.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import reference
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [0.0, 0.0]]))
      >>> reference.by_slots(jnp.array([[3.0, 5.0]]), w).tolist()
      [[0.0, 6.0]]

    Reference:
      Condensed layers: Lasby, Golubeva, Evci, Nica and Ioannou, "Dynamic Sparse
      Training with Structured Sparsity", 2024, arXiv 2305.02299.
    """
    batch, outputs = x.shape[0], w.dense_shape[-1]
    total = _sum_slots(x.T.astype(sum_dtype(x.dtype)), w).astype(x.dtype)
    if w.neurons.size < outputs:
        total = (
            jnp.zeros((outputs, batch), x.dtype)
            .at[w.neurons]
            .set(
                total,
                mode="promise_in_bounds",
                unique_indices=True,
                indices_are_sorted=True,
            )
        )
    return finish(total).T


def _sum_slots(rows: Array, w: FanInArray) -> Array:
    """Multiply rows (K, batch) with weights; gives (neurons, batch)."""
    values, indices = w.weights, w.indices
    total = jnp.broadcast_to(_zeros_of(rows), (values.shape[0], rows.shape[1]))
    start = 0
    for steps, each in _loops(w.fan_in):

        def step(i: Array, total: Array, start: int = start, each: int = each) -> Array:
            first = start + each * i
            weights = lax.dynamic_slice_in_dim(values, first, each, axis=1)
            places = lax.dynamic_slice_in_dim(indices, first, each, axis=1)
            for j in range(each):
                # Indices were checked when the array was made.
                gathered = rows.at[places[:, j]].get(mode="promise_in_bounds")
                total += weights[:, j, None].astype(rows.dtype) * gathered
            return total

        total = lax.fori_loop(0, steps, step, total)
        start += steps * each
    return total


def _loops(slots: int) -> list[tuple[int, int]]:
    """Divide slots among loops: pairs of how many steps there are and slots in each.

    A step adds several slots, or it would do little else than read and write sums. XLA
    fuses a single step, which is no loop, with the transposition of the inputs or of
    the result, and reads memory in an order that is slow. So there are one or two loops
    of at least two steps, and of all such those with the fewest steps.
    """
    choices = []
    for each in range(_SLOTS, 0, -1):
        most = slots // each
        for steps in range(most, max(1, most - _SLOTS), -1):
            left = slots - steps * each
            if left == 0:
                choices.append([(steps, each)])
            elif left > 1:
                sizes = (n for n in range(_SLOTS, 0, -1) if left % n == 0 and left > n)
                rest = next(sizes)
                choices.append([(steps, each), (left // rest, rest)])
    return min(
        choices,
        key=lambda loops: sum(steps for steps, _ in loops),
        default=[(1, slots)],
    )


def _zeros_of(rows: Array) -> Array:
    """Give zeros (batch), of which XLA has to think that they depend on the rows.

    A constant would be shared by layers and copied for each, or sums of all layers made
    before the first one is computed, and be in no cache when they are needed.
    """
    return (jnp.isnan(rows[0]) & jnp.isinf(rows[0])).astype(rows.dtype)


def by_blocks(x: Float[Array, "batch K"], w: BlockArray) -> Float[Array, "batch F"]:
    """Multiply each stored block with its inputs, and add up those of an output.

    Reads no dense weights.

    Args:
      x: inputs.
      w: a matrix of blocks.

    Returns:
      The product.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import reference
      >>> weights = jnp.array([[0.0, 0.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0]])
      >>> w = formats.BlockArray.from_dense(weights, outputs=2, inputs=1)
      >>> reference.by_blocks(jnp.array([[3.0, 5.0]]), w).tolist()
      [[0.0, 0.0, 3.0, 6.0]]
    """
    _, inputs, outputs = w.values.shape
    (batch, length), width = x.shape, w.dense_shape[-1]
    pieces = x.reshape(batch, length // inputs, inputs).transpose(1, 0, 2)
    gathered = pieces.at[w.rows].get(mode="promise_in_bounds")
    products = jnp.einsum(
        "nbi,nio->nbo", gathered, w.weights, preferred_element_type=sum_dtype(x.dtype)
    )
    total = jax.ops.segment_sum(
        products,
        w.columns,
        num_segments=width // outputs,
        indices_are_sorted=True,
        mode="promise_in_bounds",
    )
    return total.transpose(1, 0, 2).reshape(batch, width).astype(x.dtype)


def _multiply_transposed(x: Array, w: Array, dtype: Any) -> Array:
    """Multiply (batch, K) with the transpose of (F, K)."""
    sums = lax.dot_general(
        x, w, (((1,), (1,)), ((), ())), preferred_element_type=_sum_dtype(x.dtype)
    )
    return sums.astype(x.dtype if dtype is None else dtype)


def multiply(x: Array, w: Array, dtype: Any = None) -> Array:
    """Multiply dense matrices or stacks; add up in float32 or wider, or in int32.

    Args:
      x: inputs ``(..., batch, K)``.
      w: weights ``(..., K, F)`` of the same dtype.
      dtype: dtype of the product; default that of x.

    Returns:
      The product ``(..., batch, F)``.
    """
    sums = jnp.matmul(x, w, preferred_element_type=_sum_dtype(x.dtype))
    return sums.astype(x.dtype if dtype is None else dtype)


def _sum_dtype(dtype: Any) -> Any:
    return jnp.int32 if jnp.issubdtype(dtype, jnp.integer) else sum_dtype(dtype)
