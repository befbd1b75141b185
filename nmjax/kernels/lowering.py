"""Lowering: how each platform computes a product with compressed weights.

The rules of the primitive in `nmjax.kernels.dispatch`. Each selects a function of
matrices from the context of the program and from what was asked for.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax.interpreters import mlir
from jaxtyping import Array

from nmjax.formats import Compressed, PreparedArray
from nmjax.kernels import choosing, native, reference
from nmjax.kernels.settings import Settings, result_dtype

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

            for _ in range(_depth(settings, operands)):
                mapped = over(mapped)
            return mapped(*operands)

        return mlir.lower_fun(function, multiple_results=False)(ctx, *operands)

    return rule


def _depth(settings: Settings, operands: Any) -> int:
    """Count the leading axes of a stack of matrices."""
    _, leaves, _ = settings.split(operands)
    return settings.treedef.unflatten(leaves).ndim - 2


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
    """Select the product for a CPU: what `choosing.choose` says, of what may serve.

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
    obstacle = _obstacle(ctx.module_context)
    native_only = settings.form == "native"
    if native_only and obstacle:
        raise NotImplementedError(f"implementation='native': {obstacle}")
    among = choosing.NATIVE
    if not native_only:
        among = choosing.XLA if settings.form or obstacle else (*choosing.XLA, *among)

    def product(x: Array, w: Compressed, bias: Array | None) -> Array:
        if isinstance(w, PreparedArray):
            w = w.canonical
        epilogue = settings.epilogue
        if result_dtype(x, epilogue.dtype) != x.dtype:
            return _decompress(settings, x, w, bias)
        form = choosing.choose(x, w, among)
        multiply, activation = choosing.FORMS[form], epilogue.activation
        if form in choosing.NATIVE and activation in native.ACTIVATIONS:
            return multiply(x, w, bias=bias, activation=activation)
        if form == "slots":
            column = None if bias is None else bias[:, None]
            return multiply(x, w, lambda sums: epilogue.finish(sums, column))
        return epilogue.finish(multiply(x, w), bias)

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


def on_cuda(ctx: Any, *operands: Any, settings: Settings) -> Any:
    """Lower a product for an NVIDIA GPU; a rule as `lower_as` makes them."""
    # A kernel looks at the platforms of the module, of which this is one.
    module = ctx.module_context.replace(platforms=("cuda",))
    rule = lower_as(on_gpu, over=_one_by_one)
    return rule(ctx.replace(module_context=module), *operands, settings=settings)


def _one_by_one(function: Callable[..., Array]) -> Callable[..., Array]:
    """Map a function over the leading axis of its arguments, one after the other."""

    def mapped(*arguments: Array) -> Array:
        return lax.map(lambda parts: function(*parts), arguments)

    return mapped


def _obstacle(module: Any) -> str:
    """Say why a native kernel cannot be part of a module; empty where it can."""
    if module.lowering_parameters.for_export:
        return "an exported program has to run without the native library"
    if (devices := _partitioned(module)) > 1:
        return (
            f"XLA cannot partition a native kernel over {devices} devices; call it "
            "under jax.shard_map over all axes of the mesh"
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
