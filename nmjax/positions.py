"""Random positions, at which sparse layers store their weights from the start."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray, UInt

from nmjax.formats import Compressed
from nmjax.formats.fan_in import index_dtype
from nmjax.formats.packing import code_bits, pack_codes
from nmjax.masking.ordering import check_n_of_m


def random_inputs(
    key: PRNGKeyArray, inputs: int, outputs: int, fan_in: int
) -> UInt[Array, "outputs fan_in"]:
    """Draw different inputs for every output, all sets alike likely.

    Args:
      key: random key.
      inputs: number of inputs to draw from.
      outputs: number of outputs.
      fan_in: inputs of each output.

    Returns:
      Indices, ascending in a row, as `nmjax.formats.FanInArray` has them.

    Raises:
      ValueError: `fan_in` is not between 1 and `inputs`.

    Example:
      >>> import jax
      >>> from nmjax import positions
      >>> positions.random_inputs(jax.random.key(0), inputs=8, outputs=2, fan_in=3)
      Array([[2, 5, 6],
             [1, 3, 5]], dtype=uint8)
    """
    if not 1 <= fan_in <= inputs:
        raise ValueError(f"fan_in={fan_in} is not between 1 and the {inputs} inputs")
    return _draw(key, (outputs, inputs), fan_in).astype(index_dtype(inputs))


def random_codes(
    key: PRNGKeyArray, inputs: int, outputs: int, n: int, m: int
) -> UInt[Array, "outputs packed"]:
    """Draw n of every m inputs for every output, all choices alike likely.

    Args:
      key: random key.
      inputs: number of inputs, a multiple of m.
      outputs: number of outputs.
      n: inputs drawn of each group.
      m: length of a group.

    Returns:
      Packed positions, as `nmjax.formats.NMArray` has them.

    Raises:
      ValueError: `inputs` is not a multiple of m, or not 1 <= n <= m.

    Example:
      >>> import jax
      >>> from nmjax import positions
      >>> positions.random_codes(jax.random.key(0), inputs=8, outputs=3, n=2, m=4).shape
      (3, 1)
    """
    check_n_of_m(n, m)
    if inputs % m:
        raise ValueError(f"{inputs} inputs are not a multiple of m={m}")
    drawn = _draw(key, (outputs, inputs // m, m), n).astype(jnp.uint8)
    return pack_codes(drawn.reshape(outputs, -1), code_bits(m))


def _draw(key: PRNGKeyArray, shape: tuple[int, ...], count: int) -> Array:
    """Draw so many different positions along the last axis, ascending."""
    order = jnp.argsort(jax.random.uniform(key, shape), axis=-1)
    return jnp.sort(order[..., :count], axis=-1)


def check_trainable(kernel: Compressed, along_inputs: bool) -> None:
    """Raise unless a compressed array can be the kernel of a sparse layer.

    Args:
      kernel: a compressed array.
      along_inputs: whether its format stores one output after the other.

    Raises:
      ValueError: it is no matrix ``(inputs, outputs)``, or has quantized values.
    """
    if kernel.ndim != 2 or not along_inputs:
        raise ValueError(
            f"kernel {kernel!r} is no matrix (inputs, outputs) whose inputs, axis -2, "
            "are sparse"
        )
    if kernel.scales is not None:
        raise ValueError(f"kernel {kernel!r} has quantized values, which do not train")
