"""Tiles of the kernels of Hopper: their sizes, and which a product can take."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

PROCESSORS = 132
"""Streaming multiprocessors of an H100 SXM and an H200."""

SHARED_BYTES = 232448
"""Shared memory of a block on Hopper."""

GROUPS = 2
"""Warpgroups of a block that compute."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Sizes of a kernel on Hopper.

    Attributes:
      features: outputs of a warpgroup, 64 or 128; two of a block compute.
      rows: rows of x, a multiple of 8 up to 256, or up to 192 where `features` is 128.
      inputs: inputs of a step.
      stages: steps that are in shared memory at once.
      splits: parts that the inputs are cut into, to give work to more blocks.
      panel: tiles along the rows that are computed one after the other before the next
        outputs, so that weights and x are found in the L2 cache again.
      cluster: blocks, 1, 2 or 4, that share the rows of x that one of them loads.
      overlap: whether the instructions of a step start before those of the last one
        have ended.
      together: whether both warpgroups of a block have the same outputs, and each of
        them half of the inputs of a step.
    """

    features: int = 64
    rows: int = 256
    inputs: int = 64
    stages: int = 4
    splits: int = 1
    panel: int = 8
    cluster: int = 1
    overlap: bool = False
    together: bool = False

    @property
    def block(self) -> int:
        """Outputs of a block."""
        return self.features if self.together else GROUPS * self.features

    def piece(self, out_dtype: Any) -> int:
        """Give the rows of a tile that are stored at once, up to 8 KB of a warpgroup.

        Args:
          out_dtype: dtype of what is stored.

        Returns:
          The largest multiple of 8 that divides the rows.

        Example:
          >>> import jax.numpy as jnp
          >>> from nmjax.kernels.gpu.tiles import Tiles
          >>> Tiles(rows=160).piece(jnp.bfloat16)
          40
        """
        most = 8192 // self.features // jnp.dtype(out_dtype).itemsize
        return max(size for size in range(8, most + 1, 8) if self.rows % size == 0)

    def shared_bytes(
        self, values_dtype: Any, x_dtype: Any, out_dtype: Any, word_inputs: int = 64
    ) -> int:
        """Count the shared memory that a block takes.

        Args:
          values_dtype: dtype of the values.
          x_dtype: dtype of the inputs.
          out_dtype: dtype of what is stored.
          word_inputs: inputs that a word of the image describes, 64 or 32.

        Returns:
          Bytes.

        Example:
          >>> import jax.numpy as jnp
          >>> from nmjax.kernels.gpu.tiles import Tiles
          >>> Tiles().shared_bytes(*[jnp.bfloat16] * 3)
          200768
        """
        weight, number, result = (
            jnp.dtype(dtype).itemsize for dtype in (values_dtype, x_dtype, out_dtype)
        )
        block = self.block
        values = block * self.inputs // 2 * weight
        image = self.inputs // word_inputs * 8 * block
        x = self.rows * self.inputs * number
        rows = self.piece(out_dtype)
        out = min(2, self.rows // rows) * rows * block * result
        barriers = 2 * 8
        if self.together:  # sums of one warpgroup, and their barriers
            out += self.rows * self.features * 4 + barriers
        return self.stages * (values + image + x + barriers) + out

    def refusal(
        self,
        values_dtype: Any,
        x_dtype: Any,
        out_dtype: Any,
        features: int,
        inputs: int,
        word_inputs: int = 64,
    ) -> str:
        """Say why a kernel cannot take tiles; empty where it can.

        Args:
          values_dtype: dtype of the values.
          x_dtype: dtype of the inputs.
          out_dtype: dtype of what is stored.
          features: outputs of the product.
          inputs: its inputs.
          word_inputs: inputs that a word of the image describes, 64 or 32.

        Returns:
          The reason, or an empty string.

        Example:
          >>> import jax.numpy as jnp
          >>> from nmjax.kernels.gpu.tiles import Tiles
          >>> wide = Tiles(features=128, rows=128)
          >>> wide.refusal(*[jnp.bfloat16] * 3, 384, 256)
          '256 outputs of 1 blocks do not divide the 384 of the product'
        """
        if self.features not in (64, 128):
            return f"features={self.features} must be 64 or 128"
        upcast = jnp.dtype(values_dtype) != jnp.dtype(x_dtype)
        # Rows whose sums fit into registers, beside values where these are widened.
        most = 256 if self.features == 64 else 128 if upcast else 192
        # Instructions on int8 take 8, 16, 24, 32, 48, 64 rows, and so on.
        step = 16 if jnp.dtype(x_dtype).itemsize == 1 and self.rows > 32 else 8
        if not 8 <= self.rows <= most or self.rows % step:
            return f"rows={self.rows} must be a multiple of {step} up to {most}"
        if self.cluster not in (1, 2, 4) or self.rows % (8 * self.cluster):
            return f"cluster={self.cluster} must be 1, 2 or 4 and divide rows / 8"
        if features % (self.block * self.cluster):
            return (
                f"{self.block} outputs of {self.cluster} blocks do not divide the "
                f"{features} of the product"
            )
        if self.together and (self.inputs < 128 or self.rows > 128):
            return "together=True takes inputs=128 or more, and up to 128 rows"
        if self.inputs not in (64, 128, 256, 512) or inputs % self.inputs:
            return (
                f"inputs={self.inputs} must be 64, 128, 256 or 512 and divide {inputs}"
            )
        if not 1 <= self.splits <= inputs // self.inputs:
            return f"splits={self.splits} must be 1 to {inputs // self.inputs}"
        if self.stages < 1 + self.overlap:
            return f"stages={self.stages} must be at least {1 + self.overlap}"
        if self.overlap and (upcast or self.together):
            return "overlap=True takes values of the dtype of x, and together=False"
        taken = self.shared_bytes(values_dtype, x_dtype, out_dtype, word_inputs)
        if taken > SHARED_BYTES:
            return f"they take {taken} bytes of the {SHARED_BYTES} of shared memory"
        return ""


def count_processors() -> int:
    """Count the streaming multiprocessors of the GPU that JAX runs on.

    Returns:
      Their number; that of an H100 SXM where there is no GPU.

    Example:
      >>> from nmjax.kernels.gpu import tiles
      >>> tiles.count_processors() > 0
      True
    """
    device: Any = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else PROCESSORS
