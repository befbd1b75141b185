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
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir
from jaxtyping import Array

from nmjax.formats import Compressed, PreparedArray
from nmjax.kernels import choosing, reference
from nmjax.kernels.epilogues import Epilogue, result_dtype

matmul_p = Primitive("nmjax_matmul")
"""Operands x, the leaves of w and, if there is one, a bias; parameters `Settings`."""


class Settings(NamedTuple):
    """Static parameters of the primitive.

    Attributes:
      treedef: structure of w, which holds its format, dense shape and layout.
      form: the form asked for.
      epilogue: what happens to the sums.
    """

    treedef: Any
    form: str | None
    epilogue: Epilogue

    def split(self, operands: Any) -> tuple[Any, Any, Any]:
        """Give x, the leaves of w, and the bias or None."""
        x, *leaves = operands
        count = self.treedef.num_leaves
        return x, leaves[:count], leaves[count] if len(leaves) > count else None

    @property
    def linear(self) -> "Settings":
        """The same without an activation."""
        return self._replace(epilogue=self.epilogue._replace(activation=None))


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
    return matmul_p.bind(*_varying_alike(*operands), settings=settings)


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


def _depth(settings: Settings, leaves: Any) -> int:
    """Count the leading axes of a stack of matrices."""
    return settings.treedef.unflatten(leaves).ndim - 2


# Evaluation --------------------------------------------------------------------------


@jax.jit(static_argnames=("settings",))
def _compiled(*operands: Array, settings: Settings) -> Array:
    return matmul_p.bind(*operands, settings=settings)


matmul_p.def_impl(_compiled)


@matmul_p.def_abstract_eval
def _abstract(*operands: Any, settings: Settings) -> ShapedArray:
    x, leaves, _ = settings.split(operands)
    shape = (*x.shape[:-1], settings.treedef.unflatten(leaves).shape[-1])
    dtype = result_dtype(x, settings.epilogue.dtype)
    return x.update(shape=shape, dtype=dtype, weak_type=False)


# Lowering ----------------------------------------------------------------------------


_Product = Callable[[Array, Any, Array | None], Array]
"""Takes x ``(batch, K)``, a compressed ``(K, F)``, a bias; gives ``(batch, F)``."""


def lower_as(
    select: Callable[[Any, Settings], _Product], over: Callable[[Any], Any] = jax.vmap
) -> Callable[..., Any]:
    """Make a lowering rule of a product of matrices.

    Args:
      select: takes the lowering context and the settings, gives the product.
      over: maps a function over the leading axis of a stack.

    Returns:
      A rule for `jax.interpreters.mlir.register_lowering`.
    """

    def rule(ctx: Any, *operands: Any, settings: Settings) -> Any:
        product = select(ctx, settings)

        def function(*operands: Array) -> Array:
            def mapped(*operands: Array) -> Array:
                x, leaves, bias = settings.split(operands)
                return product(x, settings.treedef.unflatten(leaves), bias)

            for _ in range(_depth(settings, settings.split(operands)[1])):
                mapped = over(mapped)
            return mapped(*operands)

        return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)

    return rule


def anywhere(ctx: Any, settings: Settings) -> _Product:
    """Select the product for a platform without kernels: decompression.

    Args:
      ctx: context of a lowering rule.
      settings: what was asked for.

    Returns:
      The product.

    Raises:
      NotImplementedError: a kernel of another platform was asked for.
    """
    del ctx
    _refuse_kernels(settings.form, "native", "CPUs")
    _refuse_kernels(settings.form, "pallas", "NVIDIA GPUs")
    return functools.partial(_decompress, settings)


def _refuse_kernels(form: str | None, name: str, served: str) -> None:
    """Raise if kernels are asked for that are those of another platform."""
    if form == name:
        raise NotImplementedError(
            f"implementation={name!r} serves {served} only, and this program is "
            "lowered for another platform; use None or 'xla'"
        )


def _decompress(
    settings: Settings, x: Array, w: Compressed, bias: Array | None
) -> Array:
    """Decompress and multiply, as every platform can."""
    dtype = result_dtype(x, settings.epilogue.dtype)
    return settings.epilogue.finish(reference.by_decompression(x, w, dtype), bias)


def on_cpu(ctx: Any, settings: Settings) -> _Product:
    """Select the product for a CPU: what `choosing.choose` says.

    XLA cannot partition a native kernel over devices, and an exported program has to
    run where there is none: there the forms in XLA operations serve.

    Args:
      ctx: context of a lowering rule.
      settings: what was asked for.

    Returns:
      The product.

    Raises:
      NotImplementedError: a native kernel was asked for and cannot serve, or a Pallas
        kernel.
    """
    _refuse_kernels(settings.form, "pallas", "NVIDIA GPUs")
    obstacle = _obstacle(ctx.module_context, "the native library", "a native kernel")
    native_only = settings.form == "native"
    if native_only and obstacle:
        raise NotImplementedError(f"implementation='native': {obstacle}")
    with_native = settings.form is None and not obstacle

    def product(x: Array, w: Compressed, bias: Array | None) -> Array:
        if isinstance(w, PreparedArray):
            w = w.canonical
        if result_dtype(x, settings.epilogue.dtype) != x.dtype:
            return _decompress(settings, x, w, bias)
        chosen = (
            "native" if native_only else choosing.choose(x, w, with_native=with_native)
        )
        return settings.epilogue.finish(choosing.FORMS[chosen](x, w), bias)

    return product


def on_gpu(ctx: Any, settings: Settings) -> _Product:
    """Select the product for an NVIDIA GPU.

    Prepared 2:4 arrays are multiplied by their Pallas kernel wherever it serves. Those
    of the other formats have to be asked for: whether they are faster than dense was
    not measured yet.

    Args:
      ctx: context of a lowering rule.
      settings: what was asked for.

    Returns:
      The product.

    Raises:
      NotImplementedError: a Pallas kernel was asked for and cannot serve, or a native
        one.
    """
    _refuse_kernels(settings.form, "native", "CPUs")
    module = ctx.module_context
    devices = _partitioned(module)

    def product(x: Array, w: Compressed, bias: Array | None) -> Array:
        asked = settings.form == "pallas"
        if not asked and not (settings.form is None and isinstance(w, PreparedArray)):
            return _decompress(settings, x, w, bias)
        # Only where a kernel may be taken: importing Mosaic GPU takes its time.
        from nmjax.kernels.gpu import partitioning, products

        reason = products.refusal(x, w, settings.epilogue)
        multiply = products.multiply
        if devices > 1 and not reason:
            exported = module.lowering_parameters.for_export
            reason = partitioning.refusal(w, exported)
            multiply = partitioning.multiply
        if not reason:
            return multiply(x, w, bias, settings.epilogue)
        if asked:
            raise NotImplementedError(f"implementation='pallas': {reason}")
        return _decompress(settings, x, w, bias)

    return product


def _on_cuda(ctx: Any, *operands: Any, settings: Settings) -> Any:
    # A kernel looks at the platforms of the module, of which this is one.
    module = ctx.module_context.replace(platforms=("cuda",))
    rule = lower_as(on_gpu, over=_one_by_one)
    return rule(ctx.replace(module_context=module), *operands, settings=settings)


def _one_by_one(function: Callable[..., Array]) -> Callable[..., Array]:
    """Map a function over the leading axis of its arguments, one after the other."""

    def mapped(*arguments: Array) -> Array:
        return lax.map(lambda parts: function(*parts), arguments)

    return mapped


def _obstacle(module: Any, library: str, kernel: str) -> str:
    """Say why a native kernel cannot be part of a module; empty where it can."""
    if module.lowering_parameters.for_export:
        return f"an exported program has to run without {library}"
    if (devices := _partitioned(module)) > 1:
        return (
            f"XLA cannot partition {kernel} over {devices} devices; call it under "
            "jax.shard_map over all axes of the mesh"
        )
    return ""


def _partitioned(module: Any) -> int:
    """Give the number of devices over which XLA partitions a module."""
    context = module.axis_context
    manual = getattr(context, "manual_axes", None)
    if manual is not None:  # under shard_map
        automatic = set(context.mesh.axis_names) - set(manual)
        return math.prod(context.mesh.shape[name] for name in automatic)
    return getattr(context, "num_devices", None) or 1


mlir.register_lowering(matmul_p, lower_as(anywhere))
mlir.register_lowering(matmul_p, lower_as(on_cpu), platform="cpu")
mlir.register_lowering(matmul_p, _on_cuda, platform="cuda")


# Derivatives -------------------------------------------------------------------------


def _linear(settings: Settings, leaves: Any) -> int:
    """Give the leaf that the product is linear in: scales if there are, else values."""
    return 0 if settings.treedef.unflatten(leaves).scales is None else 1


def _jvp(primals: Any, tangents: Any, *, settings: Settings) -> tuple[Any, Any]:
    """Differentiate: linear in x, and in the values or their scales."""
    x, leaves, bias = settings.split(primals)
    dx, dleaves, dbias = settings.split(tangents)
    bind = functools.partial(matmul_p.bind, settings=settings.linear)
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


ad.primitive_jvps[matmul_p] = _jvp
ad.primitive_transposes[matmul_p] = _transpose


# Batching ----------------------------------------------------------------------------


def _batch(operands: Any, dims: Any, *, settings: Settings) -> tuple[Array, int]:
    """Fold a batch of x alone into its rows; stack everything otherwise."""
    x, *others = operands
    x_dim, *other_dims = dims
    if all(dim is None for dim in other_dims):
        x = jnp.moveaxis(x, x_dim, -3)
        *stack, count, rows, length = x.shape
        folded = x.reshape(*stack, count * rows, length)
        out = matmul_p.bind(folded, *others, settings=settings)
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
    return matmul_p.bind(*stacked, settings=settings), 0


batching.primitive_batchers[matmul_p] = _batch
