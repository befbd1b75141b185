"""Images: positions of 2:4 values in the order in which tensor cores read them.

A sparse tensor core takes the two positions of every group of four from registers:
each thread of a warpgroup holds one 32-bit word of them. An image has these words in
the order of the threads, so that a kernel loads them as they are.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt8

FEATURES, INPUTS, THREADS = 64, 64, 128
"""Outputs and inputs that the words of the 128 threads of a warpgroup describe."""


def encode(
    codes: UInt8[Array, "*stack F packed"], bytes_per_value: int
) -> Int32[Array, "*stack tiles steps 128"]:
    r"""Order positions for the instructions ``wgmma.sp`` and ``mma.sp``.

    With 16-bit values, thread :math:`t` of quad :math:`q = \lfloor t / 4 \rfloor \bmod
    8` in warp :math:`p = \lfloor t / 32 \rfloor` has the positions of inputs
    :math:`16 (t \bmod 4)` to :math:`16 (t \bmod 4) + 15`, in its low half those of
    output :math:`16 p + q`, in its high half those of output :math:`16 p + q + 8`. An
    instruction takes 32 inputs: the first one reads threads 0 and 1 of a quad (selector
    0), the second one threads 2 and 3 (selector 1).

    With 8-bit values it has those of the 32 inputs from :math:`32 (\lfloor t / 2 \rfloor
    \bmod 2)` of output :math:`16 p + q + 8 (t \bmod 2)`; an instruction takes 64.

    Args:
      codes: positions as an `NMArray` packs them, four to a byte: ``(F, K / 8)``. F and
        K must be multiples of 64.
      bytes_per_value: 2 or 1.

    Returns:
      The image, ``(F / 64, K / 64, 128)``.

    Raises:
      ValueError: F or K is no multiple of 64.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.formats import images
      >>> codes = jnp.zeros((64, 8), jnp.uint8).at[8, 0].set(0b1110_0100)
      >>> image = images.encode(codes, 2)
      >>> image.shape, hex(int(image[0, 0, 0]))
      ((1, 1, 128), '0xe40000')

    Reference:
      Parallel Thread Execution ISA, "Asynchronous warpgroup level matrix
      multiply-accumulate with sparse A": fragments of the metadata.
    """
    *stack, features, packed = codes.shape
    if features % FEATURES or packed % (INPUTS // 8):
        raise ValueError(
            f"codes of shape {codes.shape} describe {features} outputs and "
            f"{8 * packed} inputs, but an image needs multiples of {FEATURES} of both"
        )
    tiles, steps = features // FEATURES, 8 * packed // INPUTS
    split = codes.reshape(*stack, tiles, 4, 2, 8, steps, 8)
    # Axes: tile, warp, high, quad, step, byte.
    if bytes_per_value == 2:
        split = split.reshape(*split.shape[:-1], 4, 2)  # thread of the quad, byte
        order = ("tile", "step", "warp", "quad", "thread", "high", "byte")
        axes = ("tile", "warp", "high", "quad", "step", "thread", "byte")
    else:
        split = split.reshape(*split.shape[:-1], 2, 4)  # half of the inputs, byte
        order = ("tile", "step", "warp", "quad", "half", "high", "byte")
        axes = ("tile", "warp", "high", "quad", "step", "half", "byte")
    depth = len(stack)
    ordered = split.transpose(
        *range(depth), *(depth + axes.index(name) for name in order)
    )
    shape = (*stack, tiles, steps, THREADS, 4)
    return lax.bitcast_convert_type(ordered.reshape(shape), jnp.int32)


def decode(
    image: Int32[Array, "*stack tiles steps 128"], bytes_per_value: int
) -> UInt8[Array, "*stack F packed"]:
    """Undo `encode`.

    Args:
      image: what `encode` gave, ``(F / 64, K / 64, 128)``.
      bytes_per_value: 2 or 1.

    Returns:
      The positions, packed four to a byte: ``(F, K / 8)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.formats import images
      >>> codes = jnp.arange(64 * 8, dtype=jnp.uint8).reshape(64, 8)
      >>> bool((images.decode(images.encode(codes, 1), 1) == codes).all())
      True
    """
    *stack, tiles, steps, _ = image.shape
    octets = lax.bitcast_convert_type(image, jnp.uint8)
    depth = len(stack)
    if bytes_per_value == 2:
        # Axes: tile, step, warp, quad, thread, high, byte.
        split = octets.reshape(*stack, tiles, steps, 4, 8, 4, 2, 2)
        order = (0, 2, 5, 3, 1, 4, 6)
    else:
        # Axes: tile, step, warp, quad, half, high, byte.
        split = octets.reshape(*stack, tiles, steps, 4, 8, 2, 2, 4)
        order = (0, 2, 5, 3, 1, 4, 6)
    ordered = split.transpose(*range(depth), *(depth + axis for axis in order))
    return ordered.reshape(*stack, tiles * FEATURES, steps * INPUTS // 8)
