"""Partitioning: kernels in a program that XLA distributes over several GPUs.

XLA does not look into a kernel: left alone, it would gather all operands on every GPU.
Here it is told that outputs and rows are independent, and that sums over the inputs can
be completed by one reduction.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Num

from nmjax.formats import Compressed, PreparedArray
from nmjax.formats.prepared import MULTIPLE
from nmjax.kernels.gpu import products
from nmjax.kernels.settings import Epilogue, result_dtype


def refusal(w: Compressed, exported: bool) -> str:
    """Say why a kernel cannot be partitioned by XLA; empty where it can.

    Args:
      w: compressed, of dense shape ``(K, F)``.
      exported: whether the program is made for export.

    Returns:
      The reason, or an empty string.
    """
    if exported:
        return "an exported program cannot tell XLA how to partition a kernel"
    if not isinstance(w, PreparedArray):
        return (
            f"XLA cannot partition the kernel of {type(w).__name__}; call it under "
            "jax.shard_map over all axes of the mesh"
        )
    return ""


def multiply(
    x: Num[Array, "batch K"],
    w: Compressed,
    bias: Num[Array, "F"] | None,
    epilogue: Epilogue,
) -> Num[Array, "batch F"]:
    """Multiply with a Pallas kernel that XLA partitions over GPUs.

    Values and image may be sharded over outputs, x over rows: no collective is needed.
    Where x and the values are sharded alike over the inputs, one reduction in float32
    completes the sums.

    Args:
      x: inputs.
      w: a prepared array that neither `refusal` nor that of
        `nmjax.kernels.gpu.products` has anything against.
      bias: None, or of the result's dtype.
      epilogue: activation and dtype of the result.

    Returns:
      The product.
    """
    assert isinstance(w, PreparedArray)
    features, half = w.values.shape
    outputs = w.dense_shape[-1]
    x = products.pad(x, 2 * half, axis=1)
    vectors = [
        None if w.scales is None else w.scales[:, 0],
        None if bias is None else products.pad(bias, features, axis=0),
    ]
    present = [vector for vector in vectors if vector is not None]
    known = tuple(vector is not None for vector in vectors)
    call = _partitionable(w.target, known, epilogue)
    out = call(x, w.values, w.image, *present)
    return out if features == outputs else out[:, :outputs]


@functools.cache
def _partitionable(target: str, known: tuple[bool, bool], epilogue: Epilogue) -> Any:
    """Make the function of x, values, image and vectors over outputs."""

    def part_of(values: Array, image: Array, vectors: list[Array]) -> PreparedArray:
        scales = vectors[0][:, None] if known[0] else None
        shape = 2 * values.shape[1], values.shape[0]
        return PreparedArray(values, scales, image, target, -2, shape)

    def local(*operands: Array) -> Array:
        x, values, image, *vectors = operands
        bias = vectors.pop() if known[1] else None
        part = part_of(values, image, vectors)
        return products.multiply(x, part, bias, epilogue)

    def summed(axes: Any, *operands: Array) -> Array:
        """Complete the sums over the inputs before they are finished."""
        x, values, image, *vectors = operands
        wide = jnp.int32 if x.dtype == jnp.int8 else jnp.float32
        bias = vectors.pop().astype(wide) if known[1] else None
        part = part_of(values, image, vectors)
        sums = products.multiply(x, part, None, Epilogue(dtype=jnp.dtype(wide)))
        total = epilogue.finish(lax.psum(sums, axes), bias)
        return total.astype(result_dtype(x, epilogue.dtype))

    @custom_partitioning
    def product(*operands: Array) -> Array:
        return local(*operands)

    def partition(mesh: Any, operands: Any, result: Any) -> Any:
        del result
        x, values = (_spec(operand) for operand in operands[:2])
        sizes = {name: mesh.shape[name] for name in mesh.axis_names}
        rows, inputs, outputs = (
            x[0],
            values[1] if x[1] == values[1] else None,
            values[0],
        )
        if _share(outputs, rows) or _uneven(operands[1].shape[0], outputs, sizes):
            outputs = None
        if (
            _share(inputs, rows)
            or _share(inputs, outputs)
            or _uneven(2 * operands[1].shape[1], inputs, sizes)
        ):
            inputs = None
        specs = [P(rows, inputs), P(outputs, inputs), P(outputs, inputs, None)]
        specs += [P(outputs)] * sum(known)
        function = local if inputs is None else functools.partial(summed, inputs)
        return (
            mesh,
            function,
            NamedSharding(mesh, P(rows, outputs)),
            tuple(NamedSharding(mesh, spec) for spec in specs),
        )

    def infer(mesh: Any, operands: Any, result: Any) -> Any:
        del result
        rows, outputs = _spec(operands[0])[0], _spec(operands[1])[0]
        return NamedSharding(mesh, P(rows, None if _share(rows, outputs) else outputs))

    rule = "b k, f h, t s w" + ", f" * sum(known) + " -> b f"
    product.def_partition(partition, infer, sharding_rule=rule)
    return product


def _spec(operand: Any) -> tuple[Any, ...]:
    """Give the entries of an operand's sharding, one for each axis."""
    spec = tuple(operand.sharding.spec)
    return spec + (None,) * (len(operand.shape) - len(spec))


def _names(entry: Any) -> set[str]:
    if entry is None:
        return set()
    return set(entry) if isinstance(entry, tuple) else {entry}


def _share(one: Any, other: Any) -> bool:
    """Tell whether two entries of a sharding use the same mesh axis."""
    return bool(_names(one) & _names(other))


def _uneven(length: int, entry: Any, sizes: dict[str, int]) -> bool:
    """Tell whether parts of a length would not be what a kernel can take."""
    parts = 1
    for name in _names(entry):
        parts *= sizes[name]
    return length % (parts * MULTIPLE) != 0
