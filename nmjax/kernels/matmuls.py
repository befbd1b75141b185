"""What users call: one matmul for dense and compressed weights."""

import functools
import math
from typing import Any, NamedTuple

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Float

from nmjax.formats import Compressed, FanInArray, NMArray
from nmjax.kernels import native, reference
from nmjax.kernels.dispatch import compressed_matmul
from nmjax.typing import FloatArray


def matmul(
    x: Float[jax.Array, "... K"],
    w: Compressed | FloatArray,
    *,
    bias: Float[jax.Array, "F"] | None = None,
    implementation: str | None = None,
) -> Float[jax.Array, "... F"]:
    r"""Multiply with a compressed or dense matrix.

    .. math:: y_{\ldots f} = \sum_k x_{\ldots k} w_{kf} + b_f

    Sums are added up in float32 or wider, the result has x's dtype.

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
      bias: None, or what is added to the product, of x's dtype.
      implementation: ``"xla"`` computes in plain XLA operations, ``"native"`` with the
        native CPU kernels, ``"pallas"`` with a GPU kernel. Default: the fastest that
        `backends` names for the platform and that serves these arguments.

    Returns:
      The product, of x's dtype.

    Raises:
      ValueError: w is not a matrix, x has another length K, or the implementation
        has no such name.
      TypeError: x, w and bias are not floating arrays of the same dtype.
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
    _check_operands(x, w, bias)
    _check_implementation(implementation, x, w)
    if not isinstance(w, Compressed):
        out = reference.multiply(x, w)
    elif (out_sharding := _explicit_sharding(x, w)) is None:
        out = _multiply_rows(x, w, implementation)
    else:
        product = functools.partial(_multiply_rows, implementation=implementation)
        partitioned: Any = jax.sharding.auto_axes(product, out_sharding=out_sharding)
        out = partitioned(x, w)
    return out if bias is None else out + bias


def _multiply_rows(
    x: jax.Array, w: Compressed, implementation: str | None
) -> jax.Array:
    """Multiply all rows of the leading axes as one matrix."""
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    out = compressed_matmul(rows, w, implementation)
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
      'xla'
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
            "xla", "there are no Pallas kernels yet; decompresses and multiplies"
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
        raise NotImplementedError(
            f"implementation='pallas': there is no Pallas kernel for "
            f"{type(w).__name__} yet; use None or 'xla'"
        )
    if implementation == "native":
        dense = not isinstance(w, Compressed)
        reason = "w is a dense array" if dense else native.refusal(x, w)
        if reason:
            raise NotImplementedError(
                f"implementation='native': {reason}; use None or 'xla'"
            )


def _check_operands(x: Any, w: Any, bias: Any) -> None:
    given = {"x": x, "w": w} | ({} if bias is None else {"bias": bias})
    for name, array in given.items():
        if not jax.numpy.issubdtype(array.dtype, jax.numpy.floating):
            raise TypeError(
                f"{name} of shape {array.shape} has dtype {array.dtype}, but must be a "
                "floating array"
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

    if bias is not None and (bias.shape != (w.shape[1],) or bias.dtype != x.dtype):
        raise (ValueError if bias.dtype == x.dtype else TypeError)(
            f"bias is {bias.dtype} of shape {bias.shape}, but must be {x.dtype} of "
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
    if isinstance(w, NMArray):
        return w.axis == -2
    return (
        isinstance(w, FanInArray)
        and w.neuron_axes == (-1,)
        and w.neurons.size == w.dense_shape[-1]
    )
