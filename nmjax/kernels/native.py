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

from nmjax.formats import Compressed, FanInArray, NMArray
from nmjax.formats.packing import code_bits

INSTRUCTIONS = ("avx512", "avx2", "portable")
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
        for name in ("nmjax_fan_in", "nmjax_grouped"):
            capsule = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(name, capsule, platform="cpu")
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
      >>> w = formats.BlockArray.from_dense(jnp.eye(4), 2, 2)
      >>> native.refusal(jnp.ones((1, 4)), w)
      'there is no native kernel for BlockArray'
    """
    name = type(w).__name__
    if isinstance(w, FanInArray):
        if w.neuron_axes != (-1,):
            return "the native kernel wants neurons in the columns of a FanInArray"
    elif isinstance(w, NMArray):
        if w.axis != -2:
            return "the native kernel wants groups along the inputs of an NMArray"
    else:
        return f"there is no native kernel for {name}"
    if str(x.dtype) not in _FLOATS:
        return f"the native kernels take float32 and bfloat16 inputs, not {x.dtype}"
    stored = str(w.values.dtype)
    if stored not in (*_FLOATS, "int8"):
        return (
            f"the native kernels take float32, bfloat16 and int8 values: not {stored}"
        )
    return load().problem


def multiply(
    x: Float[Array, "batch K"], w: FanInArray | NMArray, instructions: str = ""
) -> Float[Array, "batch F"]:
    """Multiply with the native kernel of a format.

    Args:
      x: inputs, float32 or bfloat16.
      w: a matrix that `refusal` has nothing against.
      instructions: ``"avx512"``, ``"avx2"`` or ``"portable"``. Default: the best of
        this processor. Others than it has are an error when the product is computed.

    Returns:
      The product, summed in float32.

    Raises:
      NotImplementedError: what `refusal` says.

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
    shape = jax.typeof(x).update(shape=(x.shape[0], w.shape[-1]))
    # There is no optional operand: without scales the values stand in for them.
    scales = w.values if w.scales is None else w.scales
    operands: tuple[Any, ...]
    options: dict[str, Any] = {
        "has_scales": w.scales is not None,
        "instructions": instructions,
    }
    if isinstance(w, FanInArray):
        name, operands = "nmjax_fan_in", (w.values, scales, w.indices, w.neurons)
    else:
        name, operands = "nmjax_grouped", (w.values, scales, w.codes)
        sizes = {"n": w.n, "m": w.m, "bits": code_bits(w.m)}
        options |= {key: np.int64(size) for key, size in sizes.items()}
    call = jax.ffi.ffi_call(name, shape, vmap_method="broadcast_all")
    return call(x, *operands, **options)
