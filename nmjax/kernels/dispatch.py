"""The primitive behind `nmjax.matmul`: what it means, and how platforms compute it.

One primitive, and not a function that asks for the platform, because an exported or
sharded program is lowered for platforms other than the one it is traced on. A faster
kernel for a platform is one more lowering rule: nothing above this file changes.

The primitive takes x ``(*stack, batch, K)`` and the arrays of a compressed matrix, each
with the leading axes ``stack``, and gives ``(*stack, batch, F)``. But for a bias and an
activation at its end, it is linear in x and in the values (in their scales, where they
have some), so its derivatives are products of the same kind.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.dispatch import prim_requires_devices_during_lowering
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from nmjax.formats import Compressed, PreparedArray
from nmjax.kernels import lowering, reference
from nmjax.kernels.settings import Epilogue, Settings, result_dtype

matmul_p = Primitive("nmjax_matmul")
"""Operands x, the leaves of w and, if there is one, a bias; parameters `Settings`."""

prepared_matmul_p = Primitive("nmjax_prepared_matmul")
"""The same for a `PreparedArray`, whose kernels XLA can partition over GPUs."""

# To tell XLA how, JAX has to know the devices, and there is no public way to ask for
# them. Other products shall not: they would not lower for an AbstractMesh.
prim_requires_devices_during_lowering.add(prepared_matmul_p)


def compressed_matmul(
    x: Array,
    w: Compressed,
    *,
    bias: Array | None = None,
    form: str | None = None,
    epilogue: Epilogue = Epilogue(),  # noqa: B008 - immutable
) -> Array:
    """Multiply a matrix with a compressed one.

    Args:
      x: inputs ``(batch, K)``.
      w: compressed, of dense shape ``(K, F)`` and x's dtype.
      bias: None, or ``(F,)`` of the result's dtype.
      form: None chooses; ``"xla"`` chooses among the forms in XLA operations;
        ``"native"`` takes the native CPU kernel, ``"pallas"`` the GPU kernel.
      epilogue: activation and dtype of the result.

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
    operands = (x, *leaves) if bias is None else (x, *leaves, bias)
    settings = Settings(treedef, form, epilogue)
    return _bind(settings, *_varying_alike(*operands))


def _bind(settings: Settings, *operands: Array) -> Array:
    """Apply the primitive of the format."""
    kind, _ = settings.treedef.node_data()
    prepared = issubclass(kind, PreparedArray)
    primitive = prepared_matmul_p if prepared else matmul_p
    return primitive.bind(*operands, settings=settings)


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


# Evaluation --------------------------------------------------------------------------


@jax.jit(static_argnames=("settings",))
def _compiled(*operands: Array, settings: Settings) -> Array:
    return _bind(settings, *operands)


def _abstract(*operands: Any, settings: Settings) -> ShapedArray:
    x, leaves, _ = settings.split(operands)
    shape = (*x.shape[:-1], settings.treedef.unflatten(leaves).shape[-1])
    dtype = result_dtype(x, settings.epilogue.dtype)
    return x.update(shape=shape, dtype=dtype, weak_type=False)


# Derivatives -------------------------------------------------------------------------


def _linear(settings: Settings, leaves: Any) -> int:
    """Give the leaf that the product is linear in: scales if there are, else values."""
    return 0 if settings.treedef.unflatten(leaves).scales is None else 1


def _jvp(primals: Any, tangents: Any, *, settings: Settings) -> tuple[Any, Any]:
    """Differentiate: linear in x, and in the values or their scales."""
    x, leaves, bias = settings.split(primals)
    dx, dleaves, dbias = settings.split(tangents)
    bind = functools.partial(_bind, settings.linear)
    sums = bind(x, *leaves)
    terms = []
    if not isinstance(dx, ad.Zero):
        terms.append(bind(dx, *leaves))
    which = _linear(settings, leaves)
    if not isinstance(dleaves[which], ad.Zero):
        terms.append(bind(x, *leaves[:which], dleaves[which], *leaves[which + 1 :]))
    dsums = sum(terms[1:], terms[0]) if terms else jnp.zeros_like(sums)
    if bias is None and settings.epilogue.activation is None:
        return sums, dsums if terms else ad.Zero(jax.typeof(sums).to_tangent_aval())
    finish = functools.partial(_finish, settings.epilogue)
    if bias is None:
        return jax.jvp(lambda sums: finish(sums, None), (sums,), (dsums,))
    return jax.jvp(finish, (sums, bias), (dsums, ad.instantiate_zeros(dbias)))


def _finish(epilogue: Epilogue, sums: Array, bias: Array | None) -> Array:
    """Finish stacks of products with stacks of biases."""
    return epilogue.finish(sums, None if bias is None else bias[..., None, :])


def _transpose(cotangent: Any, x: Any, *leaves: Any, settings: Settings) -> list[Any]:
    """Give dx = dy w^T, or what x^T dy holds at the stored positions."""
    out: list[Any] = [None] * (1 + len(leaves))
    unflatten = settings.treedef.unflatten
    if ad.is_undefined_primal(x):
        if isinstance(cotangent, ad.Zero):
            out[0] = ad.Zero(x.aval)
        else:
            w = unflatten(leaves).todense()
            out[0] = reference.multiply(cotangent.astype(w.dtype), w.mT)
        return out
    which = next(i for i, leaf in enumerate(leaves) if ad.is_undefined_primal(leaf))
    aval = leaves[which].aval
    if isinstance(cotangent, ad.Zero):
        out[1 + which] = ad.Zero(aval)
        return out
    others = [*leaves[:which], *leaves[which + 1 :]]
    zeros = jnp.zeros(aval.shape, aval.dtype)
    gradient = reference.multiply(x.mT, cotangent.astype(x.dtype))
    zeros, gradient, *known = _varying_alike(zeros, gradient, *others)

    def dense(leaf: Array) -> Array:
        full = [*known[:which], leaf, *known[which:]]
        return unflatten(full).todense()

    # Decompression is linear: its transpose, anywhere, gathers the stored positions.
    _, gather = jax.vjp(dense, zeros)
    (out[1 + which],) = gather(gradient)
    return out


# Batching ----------------------------------------------------------------------------


def _batch(operands: Any, dims: Any, *, settings: Settings) -> tuple[Array, int]:
    """Fold a batch of x alone into its rows; stack everything otherwise."""
    x, *others = operands
    x_dim, *other_dims = dims
    if all(dim is None for dim in other_dims):
        x = jnp.moveaxis(x, x_dim, -3)
        *stack, count, rows, length = x.shape
        folded = x.reshape(*stack, count * rows, length)
        out = _bind(settings, folded, *others)
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
    return _bind(settings, *stacked), 0


# Rules -------------------------------------------------------------------------------

for _primitive in (matmul_p, prepared_matmul_p):
    _primitive.def_impl(_compiled)
    _primitive.def_abstract_eval(_abstract)
    mlir.register_lowering(_primitive, lowering.lower_as(lowering.anywhere))
    mlir.register_lowering(
        _primitive, lowering.lower_as(lowering.on_cpu), platform="cpu"
    )
    mlir.register_lowering(_primitive, lowering.on_cuda, platform="cuda")
    ad.primitive_jvps[_primitive] = _jvp
    ad.primitive_transposes[_primitive] = _transpose
    batching.primitive_batchers[_primitive] = _batch
