"""The primitive behind `nmjax.matmul`: what it means, and how platforms compute it.

One primitive, and not a function that asks for the platform, because an exported or
sharded program is lowered for platforms other than the one it is traced on. A faster
kernel for a platform is one more lowering rule: nothing above this file changes.

The primitive takes x ``(*stack, batch, K)`` and the arrays of a compressed matrix, each
with the leading axes ``stack``, and gives ``(*stack, batch, F)``. It is linear in x and
in the values (in their scales, where they have some), so its derivatives are products
of the same kind.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from nmjax.formats import Compressed
from nmjax.kernels import choosing, native, reference

matmul_p = Primitive("nmjax_matmul")
"""Operands x and the leaves of w; parameters: the tree structure of w, which holds its
format, dense shape and layout, and the form asked for."""


def compressed_matmul(x: Array, w: Compressed, form: str | None = None) -> Array:
    """Multiply a matrix with a compressed one.

    Args:
      x: inputs ``(batch, K)``.
      w: compressed, of dense shape ``(K, F)`` and x's dtype.
      form: None chooses; ``"xla"`` chooses among the forms in XLA operations;
        ``"native"`` takes the native CPU kernel.

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
    return matmul_p.bind(*_varying_alike(x, *leaves), treedef=treedef, form=form)


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


@jax.jit(static_argnames=("treedef", "form"))
def _compiled(*operands: Array, treedef: Any, form: str | None) -> Array:
    return matmul_p.bind(*operands, treedef=treedef, form=form)


matmul_p.def_impl(_compiled)


@matmul_p.def_abstract_eval
def _abstract(x: Any, *leaves: Any, treedef: Any, form: str | None) -> ShapedArray:
    del form
    shape = (*x.shape[:-1], treedef.unflatten(leaves).shape[-1])
    return x.update(shape=shape, weak_type=False)


# Lowering ----------------------------------------------------------------------------


_Form = Callable[[Array, Any], Array]


def lower_as(select: Callable[[Any, str | None], _Form]) -> Callable[..., Any]:
    """Make a lowering rule of a product of matrices.

    Args:
      select: takes the lowering context and the form asked for, gives a function of x
        ``(batch, K)`` and a compressed ``(K, F)`` that returns ``(batch, F)``.

    Returns:
      A rule for `jax.interpreters.mlir.register_lowering`; stacks are mapped over.
    """

    def rule(ctx: Any, *operands: Any, treedef: Any, form: str | None) -> Any:
        product = select(ctx, form)

        def function(x: Array, *leaves: Array) -> Array:
            def mapped(x: Array, leaves: tuple[Array, ...]) -> Array:
                return product(x, treedef.unflatten(leaves))

            for _ in range(_depth(treedef, leaves)):
                mapped = jax.vmap(mapped)
            return mapped(x, leaves)

        return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)

    return rule


def anywhere(ctx: Any, form: str | None) -> _Form:
    """Select the form for a platform without kernels: decompression.

    Args:
      ctx: context of a lowering rule.
      form: what was asked for.

    Returns:
      The form.

    Raises:
      NotImplementedError: a native CPU kernel was asked for.
    """
    del ctx
    if form == "native":
        raise NotImplementedError(
            "implementation='native' serves CPUs only, and this program is lowered for "
            "another platform; use None or 'xla'"
        )
    return reference.by_decompression


def on_cpu(ctx: Any, form: str | None) -> _Form:
    """Select the form for a CPU: what `choosing.choose` says.

    XLA cannot partition a native kernel over devices, and an exported program has to
    run where there is none: there the forms in XLA operations serve.

    Args:
      ctx: context of a lowering rule.
      form: what was asked for.

    Returns:
      The form.

    Raises:
      NotImplementedError: a native kernel was asked for and cannot serve.
    """
    obstacle = _obstacle(ctx.module_context)
    if form == "native":
        if obstacle:
            raise NotImplementedError(f"implementation='native': {obstacle}")
        return native.multiply
    with_native = form is None and not obstacle

    def product(x: Array, w: Compressed) -> Array:
        chosen = choosing.choose(x, w, with_native=with_native)
        return choosing.FORMS[chosen](x, w)

    return product


def _obstacle(module: Any) -> str:
    """Say why a native kernel cannot be part of a module; empty where it can."""
    if module.lowering_parameters.for_export:
        return "an exported program has to run without the native library"
    context = module.axis_context
    manual = getattr(context, "manual_axes", None)
    if manual is not None:  # under shard_map
        automatic = set(context.mesh.axis_names) - set(manual)
        devices = math.prod(context.mesh.shape[name] for name in automatic)
    else:
        devices = getattr(context, "num_devices", None) or 1
    if devices > 1:
        return (
            f"XLA cannot partition a native kernel over {devices} devices; call it "
            "under jax.shard_map over all axes of the mesh"
        )
    return ""


mlir.register_lowering(matmul_p, lower_as(anywhere))
mlir.register_lowering(matmul_p, lower_as(on_cpu), platform="cpu")


# Derivatives -------------------------------------------------------------------------


def _linear(treedef: Any, leaves: Any) -> int:
    """Give the leaf that the product is linear in: scales if there are, else values."""
    return 0 if treedef.unflatten(leaves).scales is None else 1


def _jvp(
    primals: Any, tangents: Any, *, treedef: Any, form: str | None
) -> tuple[Any, Any]:
    """Differentiate: linear in x, and in the values or their scales."""
    x, *leaves = primals
    dx, *dleaves = tangents
    out = matmul_p.bind(x, *leaves, treedef=treedef, form=form)
    terms = []
    if not isinstance(dx, ad.Zero):
        terms.append(matmul_p.bind(dx, *leaves, treedef=treedef, form=form))
    which = _linear(treedef, leaves)
    if not isinstance(dleaves[which], ad.Zero):
        leaves[which] = dleaves[which]
        terms.append(matmul_p.bind(x, *leaves, treedef=treedef, form=form))
    if not terms:
        return out, ad.Zero(jax.typeof(out).to_tangent_aval())
    return out, sum(terms[1:], terms[0])


def _transpose(
    cotangent: Any, x: Any, *leaves: Any, treedef: Any, form: str | None
) -> list[Any]:
    """Give dx = dy w^T, or what x^T dy holds at the stored positions."""
    del form
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


def _batch(
    operands: Any, dims: Any, *, treedef: Any, form: str | None
) -> tuple[Array, int]:
    """Fold a batch of x alone into its rows; stack everything otherwise."""
    x, *leaves = operands
    x_dim, *leaf_dims = dims
    if all(dim is None for dim in leaf_dims):
        x = jnp.moveaxis(x, x_dim, -3)
        *stack, count, rows, length = x.shape
        folded = x.reshape(*stack, count * rows, length)
        out = matmul_p.bind(folded, *leaves, treedef=treedef, form=form)
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
    return matmul_p.bind(*stacked, treedef=treedef, form=form), 0


batching.primitive_batchers[matmul_p] = _batch
