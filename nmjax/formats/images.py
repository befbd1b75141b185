"""Images: positions of 2:4 values in the order in which tensor cores read them.

A sparse tensor core takes the two positions of every group of four from registers:
each thread of a warpgroup holds one 32-bit word of them. An image has these words in
the order of the threads, so that a kernel loads them as they are (`encode`, `decode`).

Blackwell takes them from its tensor memory, to which they are copied from shared memory
128 outputs and 128 inputs at a time (`encode_blackwell`, `decode_blackwell`).
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int32, UInt8

FEATURES, INPUTS, THREADS = 64, 64, 128
"""Outputs and inputs that the words of the 128 threads of a warpgroup describe."""

BLOCK = 128
"""Outputs, and inputs, that are copied to Blackwell's tensor memory at a time."""


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

    With 8-bit values it has those of the 32 inputs from :math:`32 (\lfloor t / 2
    \rfloor \bmod 2)` of output :math:`16 p + q + 8 (t \bmod 2)`; an instruction takes
    64.

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


def encode_blackwell(
    codes: UInt8[Array, "*stack F packed"], bytes_per_value: int
) -> Int32[Array, "*stack tiles steps 128 4"]:
    r"""Order positions for Blackwell's instruction ``tcgen05.mma.sp``.

    Each row of 16 bytes goes to one lane of tensor memory. With 8-bit values, lane
    :math:`r` has the positions of 128 inputs of output :math:`r`. With 16-bit values,
    byte :math:`b` of lane :math:`r` has those of the 8 inputs from

    .. math:: 32 \lfloor b / 4 \rfloor
       + 16 \left(\lfloor r / 8 \rfloor \bmod 2\right) + 8 (b \bmod 2)

    of output :math:`16 \lfloor r / 16 \rfloor + (r \bmod 8) + 8 (\lfloor b / 2 \rfloor
    \bmod 2)`.

    Args:
      codes: positions as an `NMArray` packs them, four to a byte: ``(F, K / 8)``. F and
        K must be multiples of 128.
      bytes_per_value: 2 or 1.

    Returns:
      The image, ``(F / 128, K / 128, 128, 4)``.

    Raises:
      ValueError: F or K is no multiple of 128.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.formats import images
      >>> codes = jnp.zeros((128, 16), jnp.uint8).at[8, 0].set(0b1110_0100)
      >>> image = images.encode_blackwell(codes, 2)
      >>> image.shape, hex(int(image[0, 0, 0, 0]))
      ((1, 1, 128, 4), '0xe40000')

    Reference:
      Parallel Thread Execution ISA, "Tensorcore 5th generation instructions": sparse
      matrices.
    """
    *stack, features, packed = codes.shape
    if features % BLOCK or packed % (BLOCK // 8):
        raise ValueError(
            f"codes of shape {codes.shape} describe {features} outputs and "
            f"{8 * packed} inputs, but an image for Blackwell needs multiples of "
            f"{BLOCK} of both"
        )
    tiles, steps = features // BLOCK, 8 * packed // BLOCK
    depth = len(stack)
    if bytes_per_value == 2:
        # Axes: tile, rows by 16, by 8, row, step, inputs by 32, by 16, byte.
        split = codes.reshape(*stack, tiles, 8, 2, 8, steps, 4, 2, 2)
        order = (0, 4, 1, 6, 3, 5, 2, 7)
    else:
        split = codes.reshape(*stack, tiles, BLOCK, steps, BLOCK // 8)
        order = (0, 2, 1, 3)
    ordered = split.transpose(*range(depth), *(depth + axis for axis in order))
    shape = (*stack, tiles, steps, BLOCK, 4, 4)
    return lax.bitcast_convert_type(ordered.reshape(shape), jnp.int32)


def decode_blackwell(
    image: Int32[Array, "*stack tiles steps 128 4"], bytes_per_value: int
) -> UInt8[Array, "*stack F packed"]:
    """Undo `encode_blackwell`.

    Args:
      image: what `encode_blackwell` gave, ``(F / 128, K / 128, 128, 4)``.
      bytes_per_value: 2 or 1.

    Returns:
      The positions, packed four to a byte: ``(F, K / 8)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.formats import images
      >>> codes = jnp.arange(128 * 16).reshape(128, 16).astype(jnp.uint8)
      >>> image = images.encode_blackwell(codes, 2)
      >>> bool((images.decode_blackwell(image, 2) == codes).all())
      True
    """
    *stack, tiles, steps, _, _ = image.shape
    octets = lax.bitcast_convert_type(image, jnp.uint8)
    depth = len(stack)
    if bytes_per_value == 2:
        # Axes: tile, step, rows by 16, inputs by 16, row, inputs by 32, rows by 8, byte
        split = octets.reshape(*stack, tiles, steps, 8, 2, 8, 4, 2, 2)
        order = (0, 2, 6, 4, 1, 5, 3, 7)
    else:
        split = octets.reshape(*stack, tiles, steps, BLOCK, BLOCK // 8)
        order = (0, 2, 1, 3)
    ordered = split.transpose(*range(depth), *(depth + axis for axis in order))
    return ordered.reshape(*stack, tiles * BLOCK, steps * BLOCK // 8)


def broadcast(
    image: Int32[Array, "*stack tiles steps 128"],
) -> Int32[Array, "*stack tiles instructions 128"]:
    """Give every instruction on 16-bit values words of its own.

    In the image that `encode` makes, two instructions share a word and select the
    threads that it is read from. Here threads 0 and 1 of a quad have the positions of
    every instruction, and threads 2 and 3 the same again, so that the selector is
    always 0. It is twice as large.

    Args:
      image: what `encode` gave for values of 2 bytes, ``(F / 64, K / 64, 128)``.

    Returns:
      The image, ``(F / 64, K / 32, 128)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.formats import images
      >>> image = jnp.arange(128, dtype=jnp.int32)[None, None]
      >>> images.broadcast(image)[0, :, :8].tolist()
      [[0, 1, 0, 1, 4, 5, 4, 5], [2, 3, 2, 3, 6, 7, 6, 7]]
    """
    *stack, tiles, steps, _ = image.shape
    split = image.reshape(*stack, tiles, steps, THREADS // 4, 2, 1, 2)
    # Axes: quad, instruction, copy, thread.
    split = jnp.moveaxis(split, -3, -4)
    copies = jnp.broadcast_to(split, (*split.shape[:-2], 2, 2))
    return copies.reshape(*stack, tiles, 2 * steps, THREADS)


def pair(
    image: Int32[Array, "*stack tiles instructions 128"],
) -> Int32[Array, "*stack tiles steps 128"]:
    """Undo `broadcast`.

    Args:
      image: what `broadcast` gave, ``(F / 64, K / 32, 128)``.

    Returns:
      The image that `encode` makes, ``(F / 64, K / 64, 128)``.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax.formats import images
      >>> image = jnp.arange(128, dtype=jnp.int32)[None, None]
      >>> bool((images.pair(images.broadcast(image)) == image).all())
      True
    """
    *stack, tiles, instructions, _ = image.shape
    split = image.reshape(*stack, tiles, instructions // 2, 2, THREADS // 4, 4)
    split = jnp.moveaxis(split[..., :2], -2, -3)
    return split.reshape(*stack, tiles, instructions // 2, THREADS)
