"""Floats of the single threads of a Pallas kernel, see `lanes`."""

import math
from typing import Any

import jax.numpy as jnp
from jax.experimental.mosaic.gpu import utils

# The dialects that kernels are written in; jax.extend has none of them.
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith
from jaxlib.mlir.dialects import math as functions

from nmjax.kernels.gpu.lanes import Int, instruction


def to_float(element: Any) -> Any:
    """Widen a float of 8 or 16 bits, or convert an int8, to float32."""
    f32 = ir.F32Type.get()
    kind = element.type
    if kind == f32:
        return element
    if isinstance(kind, ir.IntegerType):
        return arith.sitofp(f32, element)
    i8, i16 = (ir.IntegerType.get_signless(bits) for bits in (8, 16))
    i32 = ir.IntegerType.get_signless(32)
    if kind == ir.BF16Type.get():
        # The upper half of a float32.
        word = Int(arith.extui(i32, arith.bitcast(i16, element)))
        return arith.bitcast(f32, (word << 16).value)
    names = {ir.Float8E4M3FNType: "e4m3", ir.Float8E5M2Type: "e5m2"}
    name = next((n for t, n in names.items() if isinstance(kind, t)), None)
    if name is not None:
        # Float8 is converted in pairs, to float16, which has every float8.
        pair = arith.extui(i16, arith.bitcast(i8, element))
        text = f"cvt.rn.f16x2.{name}x2 $0, $1;"
        halves = instruction(i32, [pair], text, "=r,h")
        element = arith.bitcast(ir.F16Type.get(), arith.trunci(i16, halves))
    return arith.extf(f32, element)


def constant(value: int | float) -> Any:
    """Give a float32."""
    return arith.constant(ir.F32Type.get(), float(value))


def add(a: Any, b: Any) -> Any:
    """Add float32s."""
    return arith.addf(a, b)


def multiply(a: Any, b: Any) -> Any:
    """Multiply float32s."""
    return arith.mulf(a, b)


def multiply_add(a: Any, b: Any, c: Any) -> Any:
    """Compute a b + c in float32, rounded once."""
    return functions.fma(a, b, c)


def exchange(element: Any, distance: int) -> Any:
    """Swap a float32 with the thread whose number differs in this bit."""
    return utils.shfl_bfly(element, distance)


def finish(
    total: Any, scale: Any | None, bias: Any | None, activation: str | None, dtype: Any
) -> Any:
    """Turn a sum into a result, as `finishing.finish` does.

    Args:
      total: the sum, float32.
      scale: a factor, float32.
      bias: what is added, float32.
      activation: of `finishing.ACTIVATIONS`.
      dtype: dtype of the result.
    """
    x = total if scale is None else arith.mulf(total, scale)
    x = x if bias is None else arith.addf(x, bias)
    if activation == "relu":
        x = arith.maximumf(x, constant(0))
    elif activation is not None:
        inner = x
        if activation == "gelu":
            cube = arith.mulf(arith.mulf(x, x), x)
            inner = multiply_add(constant(0.044715), cube, x)
            inner = arith.mulf(constant(math.sqrt(8 / math.pi)), inner)
        # 1 / (1 + exp(-t)) by the instruction for powers of two.
        power = arith.mulf(inner, constant(-math.log2(math.e)))
        text = "ex2.approx.f32 $0, $1;"
        power = instruction(ir.F32Type.get(), [power], text, "=f,f")
        x = arith.divf(x, arith.addf(constant(1), power))
    kind = utils.dtype_to_ir_type(jnp.dtype(dtype))
    return x if kind == x.type else arith.truncf(kind, x)
