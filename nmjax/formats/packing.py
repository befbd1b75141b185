"""Packing: small positions, several to a byte."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8


def code_bits(m: int) -> int:
    """Give the bits that a position in a group of m takes: 1, 2, 4 or 8.

    Args:
      m: length of a group, 1 to 256.

    Returns:
      The smallest of these that holds m - 1, so that codes never cross bytes.

    Raises:
      ValueError: m is outside 1 to 256.

    Example:
      >>> from nmjax.formats import packing
      >>> [packing.code_bits(m) for m in (2, 4, 8, 32)]
      [1, 2, 4, 8]
    """
    if not 1 <= m <= 256:
        raise ValueError(f"m={m} must be between 1 and 256 to be packed in bytes")
    return next(bits for bits in (1, 2, 4, 8) if m <= 1 << bits)


def pack_codes(codes: UInt8[Array, "... count"], bits: int) -> UInt8[Array, "... size"]:
    r"""Pack codes along the last axis, the first in the lowest bits of a byte.

    .. math:: b_j = \sum_{i < 8 / \text{bits}} c_{j \cdot 8/\text{bits} + i}
       \, 2^{i \cdot \text{bits}}

    Args:
      codes: integers below ``2 ** bits``.
      bits: 1, 2, 4 or 8.

    Returns:
      Bytes; where codes do not fill the last one, its high bits are 0.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.formats import packing
      >>> packing.pack_codes(jnp.array([1, 3, 0, 2, 1], jnp.uint8), 2).tolist()
      [141, 1]
    """
    per_byte = 8 // bits
    missing = -codes.shape[-1] % per_byte
    if missing:
        padding = [(0, 0)] * (codes.ndim - 1) + [(0, missing)]
        codes = jnp.pad(codes, padding)
    parts = codes.reshape(*codes.shape[:-1], -1, per_byte)
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    # Bits of different codes do not meet, so the sum is their union.
    return jnp.sum(parts << shifts, axis=-1, dtype=jnp.uint8)


def unpack_codes(
    packed: UInt8[Array, "... size"], bits: int, count: int
) -> UInt8[Array, "... count"]:
    """Undo `pack_codes`.

    Args:
      packed: bytes.
      bits: 1, 2, 4 or 8.
      count: number of codes along the last axis.

    Returns:
      The codes.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.formats import packing
      >>> packing.unpack_codes(jnp.array([141, 1], jnp.uint8), 2, 5).tolist()
      [1, 3, 0, 2, 1]
    """
    shifts = jnp.arange(0, 8, bits, dtype=jnp.uint8)
    parts = (packed[..., None] >> shifts) & jnp.uint8((1 << bits) - 1)
    return parts.reshape(*packed.shape[:-1], -1)[..., :count]
