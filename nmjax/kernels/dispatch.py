"""The primitive behind `nmjax.matmul`: what it means, and how platforms compute it.

One primitive, and not a function that asks for the platform, because an exported or
sharded program is lowered for platforms other than the one it is traced on. A faster
kernel for a platform is one more lowering rule: nothing above this file changes.

The primitive takes x ``(*stack, batch, K)`` and the arrays of a compressed matrix, each
with the leading axes ``stack``, and gives ``(*stack, batch, F)``. It is linear in x and
in the values (in their scales, where they have some), so its derivatives are products
of the same kind.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from nmjax.formats import BlockArray, Compressed, FanInArray
from nmjax.kernels import reference

matmul_p = Primitive("nmjax_matmul")
"""Operands x and the leaves of w; parameter: the tree structure of w, which holds its
format, dense shape and layout."""


def compressed_matmul(x: Array, w: Compressed) -> Array:
    """Multiply a matrix with a compressed one.

    Args:
      x: inputs ``(batch, K)``.
      w: compressed, of dense shape ``(K, F)`` and x's dtype.

    Returns:
      The product ``(batch, F)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import dispatch
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> dispatch.compressed_matmul(jnp.array([[3.0, 5.0]]), w).tolist()
      [[5.0, 6.0]]
    """
    leaves, treedef = jax.tree.flatten(w)
    return matmul_p.bind(*_varying_alike(x, *leaves), treedef=treedef)


def _varying_alike(*arrays: Array) -> tuple[Array, ...]:
    """Under shard_map, let all operands vary over the axes that any varies over."""
    axes = [jax.typeof(array).manual_axis_type.varying for array in arrays]
    every = frozenset().union(*axes)
    return tuple(
        lax.pcast(array, tuple(sorted(every - own)), to="varying")
        if every - own
        else array
        for array, own in zip(arrays, axes, strict=True)
    )


def _depth(treedef: Any, leaves: Any) -> int:
    """Count the leading axes of a stack of matrices."""
    return treedef.unflatten(leaves).ndim - 2


# Evaluation --------------------------------------------------------------------------


@jax.jit(static_argnames="treedef")
def _compiled(*operands: Array, treedef: Any) -> Array:
    return matmul_p.bind(*operands, treedef=treedef)


matmul_p.def_impl(_compiled)


@matmul_p.def_abstract_eval
def _abstract(x: Any, *leaves: Any, treedef: Any) -> ShapedArray:
    shape = (*x.shape[:-1], treedef.unflatten(leaves).shape[-1])
    return x.update(shape=shape, weak_type=False)


# Lowering ----------------------------------------------------------------------------


def lower_as(form: Callable[[Array, Any], Array]) -> Callable[..., Any]:
    """Make a lowering rule of a product of matrices.

    Args:
      form: takes x ``(batch, K)`` and a compressed ``(K, F)``, gives ``(batch, F)``.

    Returns:
      A rule for `jax.interpreters.mlir.register_lowering`; stacks are mapped over.
    """

    def function(x: Array, *leaves: Array, treedef: Any) -> Array:
        def mapped(x: Array, leaves: tuple[Array, ...]) -> Array:
            return form(x, treedef.unflatten(leaves))

        for _ in range(_depth(treedef, leaves)):
            mapped = jax.vmap(mapped)
        return mapped(x, leaves)

    return mlir.lower_fun(function, multiple_results=False)


def on_cpu(x: Array, w: Compressed) -> Array:
    """Multiply in the XLA form that is likely to be fastest on a CPU.

    The rules were read off times of float32 products of 3072 x 768 weights, of density
    0.01 to 0.5, for batches of 1 to 512, each form beside the other in one run.

    Args:
      x: inputs ``(batch, K)``.
      w: compressed, of dense shape ``(K, F)``.

    Returns:
      The product ``(batch, F)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import dispatch
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> dispatch.on_cpu(jnp.array([[3.0, 5.0]]), w).tolist()
      [[5.0, 6.0]]
    """
    batch, length = x.shape
    if not isinstance(batch, int):
        batch = 64  # symbolic, in an export: take it for a large one
    if isinstance(w, FanInArray) and w.neuron_axes == (-1,):
        # Gathering rows that are wider than a scalar but narrower than 32 is slow.
        most = 1 / 8 if 8 < batch < 32 else 1 / 3
        if w.fan_in <= most * length:
            return reference.by_slots(x, w)
    if isinstance(w, BlockArray) and w.axis == -2:
        *_, inputs, outputs = w.values.shape
        density = w.values.size / w.size
        if batch * density <= max(1.0, inputs * outputs / 10):
            return reference.by_blocks(x, w)
    return reference.by_decompression(x, w)


mlir.register_lowering(matmul_p, lower_as(reference.by_decompression))
mlir.register_lowering(matmul_p, lower_as(on_cpu), platform="cpu")


# Derivatives -------------------------------------------------------------------------


def _linear(treedef: Any, leaves: Any) -> int:
    """Give the leaf that the product is linear in: scales if there are, else values."""
    return 0 if treedef.unflatten(leaves).scales is None else 1


def _jvp(primals: Any, tangents: Any, *, treedef: Any) -> tuple[Any, Any]:
    """Differentiate: linear in x, and in the values or their scales."""
    x, *leaves = primals
    dx, *dleaves = tangents
    out = matmul_p.bind(x, *leaves, treedef=treedef)
    terms = []
    if not isinstance(dx, ad.Zero):
        terms.append(matmul_p.bind(dx, *leaves, treedef=treedef))
    which = _linear(treedef, leaves)
    if not isinstance(dleaves[which], ad.Zero):
        leaves[which] = dleaves[which]
        terms.append(matmul_p.bind(x, *leaves, treedef=treedef))
    if not terms:
        return out, ad.Zero.from_primal_value(out)
    return out, sum(terms[1:], terms[0])


def _transpose(cotangent: Any, x: Any, *leaves: Any, treedef: Any) -> list[Any]:
    """Give dx = dy w^T, or what x^T dy holds at the stored positions."""
    out: list[Any] = [None] * (1 + len(leaves))
    if ad.is_undefined_primal(x):
        if isinstance(cotangent, ad.Zero):
            out[0] = ad.Zero(x.aval)
        else:
            w = treedef.unflatten(leaves).todense()
            out[0] = reference.multiply(cotangent, w.mT)
        return out
    which = next(i for i, leaf in enumerate(leaves) if ad.is_undefined_primal(leaf))
    aval = leaves[which].aval
    if isinstance(cotangent, ad.Zero):
        out[1 + which] = ad.Zero(aval)
        return out
    others = [*leaves[:which], *leaves[which + 1 :]]
    zeros = jnp.zeros(aval.shape, aval.dtype)
    gradient = reference.multiply(x.mT, cotangent)
    zeros, gradient, *known = _varying_alike(zeros, gradient, *others)

    def dense(leaf: Array) -> Array:
        full = [*known[:which], leaf, *known[which:]]
        return treedef.unflatten(full).todense()

    # Decompression is linear: its transpose, anywhere, gathers the stored positions.
    _, gather = jax.vjp(dense, zeros)
    (out[1 + which],) = gather(gradient)
    return out


ad.primitive_jvps[matmul_p] = _jvp
ad.primitive_transposes[matmul_p] = _transpose


# Batching ----------------------------------------------------------------------------


def _batch(operands: Any, dims: Any, *, treedef: Any) -> tuple[Array, int]:
    """Fold a batch of x alone into its rows; stack everything otherwise."""
    x, *leaves = operands
    x_dim, *leaf_dims = dims
    if all(dim is None for dim in leaf_dims):
        x = jnp.moveaxis(x, x_dim, -3)
        *stack, count, rows, length = x.shape
        folded = x.reshape(*stack, count * rows, length)
        out = matmul_p.bind(folded, *leaves, treedef=treedef)
        return out.reshape(*stack, count, rows, out.shape[-1]), len(stack)
    size = next(
        operand.shape[dim]
        for operand, dim in zip(operands, dims, strict=True)
        if dim is not None
    )
    stacked = [
        jnp.broadcast_to(operand, (size, *operand.shape))
        if dim is None
        else jnp.moveaxis(operand, dim, 0)
        for operand, dim in zip(operands, dims, strict=True)
    ]
    return matmul_p.bind(*stacked, treedef=treedef), 0


batching.primitive_batchers[matmul_p] = _batch
