"""What users call: one matmul for dense and compressed weights."""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Num

from nmjax.formats import Compressed, FanInArray, NMArray, PreparedArray, prepared
from nmjax.kernels import native, reference
from nmjax.kernels.dispatch import compressed_matmul
from nmjax.kernels.settings import ACTIVATIONS, Epilogue, result_dtype


def matmul(
    x: Num[jax.Array, "... K"],
    w: Compressed | Num[jax.Array, "..."],
    *,
    bias: Num[jax.Array, "F"] | None = None,
    activation: str | None = None,
    preferred_element_type: Any = None,
    implementation: str | None = None,
) -> Num[jax.Array, "... F"]:
    r"""Multiply with a compressed or dense matrix.

    .. math:: y_{\ldots f} = \sigma \Bigl( \sum_k x_{\ldots k} w_{kf} + b_f \Bigr)

    Sums are added up in float32 or wider (int32 for int8), the result has x's dtype
    where no other is asked for. Kernels add the bias and apply the activation (native
    ones: relu) before they round the sums, which spares reading and writing them again.

    Derivatives of any order and mode reach x and the stored values: a compressed layer
    can be fine-tuned, and its zeros stay zero. The gradient is taken with the
    decompressed weights. Integer leaves of a compressed array have no gradient: take
    `jax.grad` of a function of its values, or with ``allow_int=True``.

    To multiply with a stack of layers, map over it with `jax.vmap` or `jax.lax.scan`.

    Under a mesh of Auto axes XLA partitions it. Values of an `NMArray` and rows of x
    may be sharded over outputs and batch without any collective. Under a mesh of
    Explicit axes the result is sharded like the rows of x and, where these are sharded
    over other axes, like the outputs of w; sums over a sharded K are made complete.

    Args:
      x: inputs, with any number of leading axes.
      w: a compressed array of dense shape ``(K, F)``, or a dense array of that shape,
        which is multiplied as `jax.numpy.matmul` does. Its dtype must be x's.
      bias: None, or what is added to the product, of the result's dtype.
      activation: None, ``"relu"``, ``"gelu"`` (in its tanh approximation) or
        ``"silu"``.
      preferred_element_type: dtype of the result. Default: that of x, and int32 for
        int8.
      implementation: ``"xla"`` computes in plain XLA operations, ``"native"`` with the
        native CPU kernels, ``"pallas"`` with a GPU kernel; a 2:4 array must have been
        prepared for it, see `nmjax.prepare`. Default: the fastest that `backends`
        names for the platform and that serves these arguments.

    Returns:
      The product.

    Raises:
      ValueError: w is not a matrix, x has another length K, or the implementation
        has no such name.
      TypeError: x and w are not floating or int8 arrays of the same dtype, or the
        bias does not have the result's.
      NotImplementedError: the implementation named cannot serve these arguments; with
        the reason.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> weights = jnp.array([[0.0, 3.0], [1.0, 0.0], [0.0, 4.0], [2.0, 0.0]])
      >>> small = nm.compress({"kernel": weights}, {"kernel": weights != 0})
      >>> small["kernel"]
      NMArray(1:2 along -2, float32[4, 2], 18 bytes, 0.562 of dense)
      >>> nm.matmul(jnp.array([1.0, 10.0, 100.0, 1000.0]), small["kernel"]).tolist()
      [2010.0, 403.0]
    """
    dtype = result_dtype(x, preferred_element_type)
    _check_operands(x, w, bias, dtype)
    _check_activation(activation)
    _check_implementation(implementation, x, w)
    epilogue = Epilogue(activation, None if dtype == x.dtype else dtype)
    if not isinstance(w, Compressed):
        return epilogue.finish(reference.multiply(x, w, dtype), bias)
    product = functools.partial(_multiply_rows, form=implementation, epilogue=epilogue)
    if (out_sharding := _explicit_sharding(x, w)) is None:
        return product(x, w, bias)
    partitioned: Any = jax.sharding.auto_axes(product, out_sharding=out_sharding)
    return partitioned(x, w, bias)


def _multiply_rows(
    x: jax.Array, w: Compressed, bias: jax.Array | None, **settings: Any
) -> jax.Array:
    """Multiply all rows of the leading axes as one matrix."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = compressed_matmul(rows, w, bias=bias, **settings)
    return out.reshape(*x.shape[:-1], w.shape[-1])


class Backend(NamedTuple):
    """What serves a platform.

    Attributes:
      implementation: a value for the argument of `matmul`.
      reason: why this one.
    """

    implementation: str
    reason: str


def backends() -> dict[str, Backend]:
    """Tell which implementation of `matmul` serves which platform, and why.

    Returns:
      A `Backend` for each of ``"cpu"``, ``"gpu"`` and ``"tpu"``, whether or not the
      platform is there: programs can be exported to any of them.

    Example:
      >>> import nmjax as nm
      >>> backends = nm.backends()
      >>> backends["cpu"].implementation in ("native", "xla")
      True
      >>> backends["gpu"].implementation
      'pallas'
    """
    library = native.load()
    if library.problem:
        cpu = Backend("xla", library.problem)
    else:
        cpu = Backend(
            "native",
            f"{library.instructions} kernels where they were measured to be fastest, "
            "forms in XLA operations elsewhere",
        )
    return {
        "cpu": cpu,
        "gpu": Backend(
            "pallas",
            "kernels for 2:4 arrays that nm.prepare laid out for an NVIDIA GPU; others "
            "are decompressed and multiplied unless their kernels are asked for. Not "
            "yet measured on hardware",
        ),
        "tpu": Backend("xla", "there is no kernel; decompresses and multiplies"),
    }


def _check_implementation(implementation: str | None, x: Any, w: Any) -> None:
    if implementation not in (None, "xla", "native", "pallas"):
        raise ValueError(
            f"implementation={implementation!r} is not None, 'xla', 'native' or "
            "'pallas'"
        )
    if implementation == "pallas":
        reason = _unprepared(w)
        if reason:
            raise NotImplementedError(
                f"implementation='pallas': {reason}; use None or 'xla'"
            )
    if implementation == "native":
        dense = not isinstance(w, Compressed)
        reason = "w is a dense array" if dense else native.refusal(x, w)
        if reason:
            raise NotImplementedError(
                f"implementation='native': {reason}; use None or 'xla'"
            )


def _unprepared(w: Any) -> str:
    """Say why no Pallas kernel takes an array, on any GPU; empty where one may."""
    if not isinstance(w, Compressed):
        return "w is a dense array"
    if isinstance(w, NMArray):
        reason = prepared.refusal(w, prepared.TARGETS[0])
        return reason or (
            "the array is not laid out for a GPU: prepare it once, as in "
            "nm.prepare(params, 'sm90')"
        )
    return ""


def _check_activation(activation: str | None) -> None:
    if activation is not None and activation not in ACTIVATIONS:
        names = ", ".join(map(repr, ACTIVATIONS))
        raise ValueError(
            f"activation={activation!r} is not None, {names}; apply others to the "
            "result"
        )


def _check_operands(x: Any, w: Any, bias: Any, dtype: Any) -> None:
    for name, array in (("x", x), ("w", w)):
        floating = jax.numpy.issubdtype(array.dtype, jax.numpy.floating)
        if not floating and (array.dtype != "int8" or w.dtype != x.dtype):
            raise TypeError(
                f"{name} of shape {array.shape} has dtype {array.dtype}, but must be a "
                "floating array, or both int8"
            )
    floating = jax.numpy.issubdtype(x.dtype, jax.numpy.floating)
    if floating and not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise TypeError(
            f"preferred_element_type={dtype} for a product of {x.dtype}, but must be a "
            "floating dtype"
        )
    if len(w.shape) != 2:
        raise ValueError(
            f"w has shape {w.shape}, but must be a matrix (K, F): map over a stack of "
            "layers with jax.vmap(nm.matmul, in_axes=(None, 0)); other arrays have to "
            "be reshaped before they are compressed, or nm.decompress-ed"
        )
    if not x.ndim or x.shape[-1] != w.shape[0]:
        raise ValueError(
            f"x of shape {x.shape} does not end in the K={w.shape[0]} of w with shape "
            f"{w.shape}"
        )
    if x.dtype != w.dtype:
        raise TypeError(
            f"x is {x.dtype} and w {w.dtype}, but they must have the same dtype: use "
            f"x.astype({str(w.dtype)!r}), or make w of {x.dtype} weights"
        )
    if bias is not None and (bias.shape != (w.shape[1],) or bias.dtype != dtype):
        raise (ValueError if bias.dtype == dtype else TypeError)(
            f"bias is {bias.dtype} of shape {bias.shape}, but must be {dtype} of "
            f"shape ({w.shape[1]},), like the outputs of w"
        )


def _explicit_sharding(x: jax.Array, w: Compressed) -> NamedSharding | None:
    """Give the sharding of the result under a mesh of Explicit axes, or None."""
    shardings = [jax.typeof(array).sharding for array in (x, w.values)]
    mesh = next((s.mesh for s in shardings if not s.mesh.empty), None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return None
    rows, values = (sharding.spec for sharding in shardings)
    used = {name for entry in rows[:-1] for name in _names(entry)}
    last = values[0] if _stores_outputs(w) and len(values) else None
    if used & set(_names(last)):
        last = None
    return NamedSharding(mesh, PartitionSpec(*rows[:-1], last))


def _names(entry: Any) -> tuple[str, ...]:
    """Give the mesh axes of an entry of a PartitionSpec."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _stores_outputs(w: Compressed) -> bool:
    """Tell whether the first axis of the values counts the outputs."""
    if isinstance(w, NMArray | PreparedArray):
        return w.axis == -2
    return (
        isinstance(w, FanInArray)
        and w.neuron_axes == (-1,)
        and w.neurons.size == w.dense_shape[-1]
    )
