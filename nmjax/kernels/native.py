"""The native CPU kernels: a C++ library that XLA calls.

Built when nmjax is installed, where there is a C++ compiler (sources in `cpu/`). They
stand in for the XLA forms where these are slow: small batches.
"""

import ctypes
import functools
import importlib.machinery
import pathlib
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float

from nmjax.formats import BlockArray, Compressed, FanInArray, NMArray, WindowArray
from nmjax.formats.packing import code_bits

INSTRUCTIONS = ("avx512", "avx2", "portable")
ACTIVATIONS = (None, "relu")
"""Activations that the kernels apply; others are left to XLA."""

_FLOATS = ("float32", "bfloat16")


class Library(NamedTuple):
    """What was found when the library was loaded.

    Attributes:
      instructions: the best instructions of this processor that the kernels use:
        ``"avx512"``, ``"avx2"`` or ``"portable"``; empty without the library.
      problem: why there is no library; empty where there is one.
    """

    instructions: str
    problem: str


@functools.cache
def load() -> Library:
    """Load the library, once, and make its kernels known to XLA.

    Returns:
      What was found; a library that is missing or does not load is no error.

    Example:
      >>> from nmjax.kernels import native
      >>> bool(native.load().instructions) != bool(native.load().problem)
      True
    """
    folder = pathlib.Path(__file__).parent
    suffixes = importlib.machinery.EXTENSION_SUFFIXES
    paths = [folder / f"native_library{suffix}" for suffix in suffixes]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return Library(
            "",
            "the native library was not built: install nmjax again where there is a "
            "C++17 compiler (g++ or clang++)",
        )
    try:
        library = ctypes.CDLL(str(path))
        for name in ("fan_in", "windows", "grouped", "blocks"):
            capsule = jax.ffi.pycapsule(getattr(library, f"nmjax_{name}"))
            jax.ffi.register_ffi_target(f"nmjax_{name}", capsule, platform="cpu")
        library.nmjax_instructions.restype = ctypes.c_char_p
        return Library(library.nmjax_instructions().decode(), "")
    except (OSError, AttributeError, jax.errors.JaxRuntimeError) as error:
        return Library(
            "",
            f"the native library does not load, install nmjax again to build it for "
            f"this jax {jax.__version__}: {error}",
        )


def refusal(x: Any, w: Compressed) -> str:
    """Say why the native kernels do not serve a product; empty where they do.

    Args:
      x: inputs ``(batch, K)``, an array or its shape and dtype.
      w: compressed, of dense shape ``(K, F)``.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import native
      >>> w = formats.FanInArray.from_dense(jnp.eye(4))
      >>> native.refusal(jnp.ones((1, 4), jnp.float16), w)
      'the native kernels take float32 and bfloat16 inputs, not float16'
    """
    if isinstance(w, FanInArray | WindowArray) and w.neuron_axes != (-1,):
        kind = type(w).__name__
        return f"the native kernels want neurons in the columns of a {kind}"
    if isinstance(w, NMArray) and w.axis != -2:
        return "the native kernels want groups along the inputs of an NMArray"
    if isinstance(w, BlockArray) and w.axis != -2:
        return "the native kernels want outputs in the last axis of a BlockArray"
    if str(x.dtype) not in _FLOATS:
        return f"the native kernels take float32 and bfloat16 inputs, not {x.dtype}"
    stored = str(w.values.dtype)
    if stored not in (*_FLOATS, "int8"):
        return (
            f"the native kernels take float32, bfloat16 and int8 values: not {stored}"
        )
    return load().problem


def multiply(
    x: Float[Array, "batch K"],
    w: Compressed,
    *,
    bias: Float[Array, "F"] | None = None,
    activation: str | None = None,
    expand: bool = False,
    instructions: str = "",
) -> Float[Array, "batch F"]:
    """Multiply with the native kernel of a format.

    Args:
      x: inputs, float32 or bfloat16.
      w: a matrix that `refusal` has nothing against.
      bias: None, or what is added to the sums, of x's dtype.
      activation: one of `ACTIVATIONS`, applied to the sums before they are rounded.
      expand: whether dense weights are made for this product, some outputs at a time,
        in float32: faster for many rows and weights that are not sparse. An input that
        is infinite or NaN then reaches every output, as it does with dense weights.
      instructions: ``"avx512"``, ``"avx2"`` or ``"portable"``. Default: the best of
        this processor. Others than it has are an error when the product is computed.

    Returns:
      The product, summed in float32.

    Raises:
      NotImplementedError: what `refusal` says.
      ValueError: an activation that the kernels do not apply.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import native
      >>> w = formats.FanInArray.from_dense(jnp.array([[0.0, 2.0], [1.0, 0.0]]))
      >>> x = jnp.array([[3.0, 5.0]])
      >>> (x @ w.todense() if native.load().problem else native.multiply(x, w)).tolist()
      [[5.0, 6.0]]
    """
    if problem := refusal(x, w):
        raise NotImplementedError(problem)
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"activation={activation!r} is none of {ACTIVATIONS}: apply others to the "
            "result"
        )
    name, (values, scales, *places), options = _call_of(w)
    finish = {"has_bias": bias is not None, "relu": activation == "relu"}
    options |= finish | {"expand": expand}
    # There is no optional operand: without a bias the values stand in for it.
    operands = (x, values, scales, values if bias is None else bias, *places)
    shape = jax.typeof(x).update(shape=(x.shape[0], w.shape[-1]))
    call = jax.ffi.ffi_call(f"nmjax_{name}", shape, vmap_method="broadcast_all")
    return call(*operands, **options, instructions=instructions)


def _call_of(w: Any) -> tuple[str, tuple[Array, ...], dict[str, Any]]:
    """Give the name of a format's kernels, their operands and their options."""
    # Without scales the values stand in for them.
    scales = w.values if w.scales is None else w.scales
    options: dict[str, Any] = {"has_scales": w.scales is not None}
    if isinstance(w, FanInArray):
        return "fan_in", (w.values, scales, w.indices, w.neurons), options
    if isinstance(w, WindowArray):
        places = w.positions, w.starts, w.offsets, w.neurons
        return "windows", (w.values, scales, *places), options
    if isinstance(w, BlockArray):
        return "blocks", (w.values, scales, w.rows, w.columns), options
    sizes = {"n": w.n, "m": w.m, "bits": code_bits(w.m)}
    options |= {key: np.int64(size) for key, size in sizes.items()}
    return "grouped", (w.values, scales, w.codes), options
