"""Prepared arrays: 2:4 weights in the layout that a GPU's sparse tensor cores take."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from nmjax.formats import images, windows
from nmjax.formats.checks import Compressed, register
from nmjax.formats.fan_in import FanInArray
from nmjax.formats.grouped import NMArray
from nmjax.formats.windows import WindowArray
from nmjax.typing import Params, WeightArray

TARGETS = ("sm80", "sm90", "sm100")
"""GPUs whose tensor cores take 2:4 weights: Ampere, Hopper, Blackwell."""

MULTIPLE = 128
"""Outputs and inputs are filled up with zeros to a multiple of this, once."""

CPU = "cpu"
"""The other target: constant fan-in weights for a CPU with AVX-512."""

DTYPES = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8")
"""Dtypes of weights that they multiply; quantized values are cast to theirs first."""


@register
@dataclasses.dataclass(frozen=True, repr=False)
class PreparedArray(Compressed):
    """A 2:4 array whose positions stand in the order of a GPU's registers.

    Made from an `NMArray` by `nmjax.prepare`, once; `canonical` gives it back. It is
    for running, not for keeping: what is saved should be the `NMArray`, which is
    smaller and the same for every GPU.

    Attributes:
      values: kept values, ``(F', K' / 2)``: those of the `NMArray`, with zeros up to
        multiples of 128.
      scales: None, or a factor of each output of quantized values, ``(F', 1)``.
      image: positions as `nmjax.formats.images` orders them, int32
        ``(F' / 64, K' / 64, 128)``, or for sm100 ``(F' / 128, K' / 128, 128, 4)``.
      target: the GPU, of `TARGETS`.
      axis: as in `NMArray`.
      dense_shape: as in `NMArray`.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import formats
      >>> weights = jnp.tile(jnp.array([0.0, 3.0, 0.0, 4.0], jnp.bfloat16), 16)[:, None]
      >>> small = formats.NMArray.from_dense(weights, 2, 4)
      >>> ready = nm.prepare({"kernel": small}, "sm90")["kernel"]
      >>> ready
      PreparedArray(2:4 along -2 for sm90, bfloat16[64, 1], 18,432 bytes, 144 of dense)
      >>> bool((ready.todense() == weights).all())
      True
    """

    values: Any
    scales: Any
    image: Any
    target: str = dataclasses.field(metadata={"static": True})
    axis: int = dataclasses.field(metadata={"static": True})
    dense_shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def from_canonical(cls, small: NMArray, target: str) -> "PreparedArray":
        """Prepare a 2:4 array.

        Args:
          small: a 2:4 array whose values have 8 or 16 bits.
          target: the GPU, of `TARGETS`.

        Returns:
          The same weights.

        Raises:
          ValueError: `refusal` gives a reason.
        """
        if reason := refusal(small, target):
            raise ValueError(f"{small!r} cannot be prepared for {target}: {reason}")
        *_, outputs, kept = small.values.shape
        more_outputs, more = -outputs % MULTIPLE, -2 * kept % MULTIPLE
        values = _fill(small.values, more_outputs, more // 2)
        # Positions 0 and 1 for the zeros: they must be distinct.
        codes = _fill(small.codes[..., : -(-kept // 4)], more_outputs, 0)
        codes = _with_distinct(codes, outputs, kept, values.shape[-1])
        scales = small.scales
        if scales is not None:
            scales = _fill(scales, more_outputs, 0)
        # Quantized values are multiplied after they were cast to the weights' dtype.
        encode = images.encode_blackwell if target == "sm100" else images.encode
        image = encode(codes, jnp.dtype(small.dtype).itemsize)
        return cls(values, scales, image, target, small.axis, small.dense_shape)

    @property
    def canonical(self) -> NMArray:
        """The `NMArray` that it was made from, bit for bit."""
        outputs, kept = self._stored_shape
        blackwell = self.target == "sm100"
        decode = images.decode_blackwell if blackwell else images.decode
        codes = decode(self.image, jnp.dtype(self.dtype).itemsize)
        codes = codes[..., :outputs, : -(-kept // 4)]
        if kept % 4:  # the high bits of a byte that is not full are 0
            last = (codes[..., -1:] & jnp.uint8((1 << 2 * (kept % 4)) - 1)).astype(
                jnp.uint8
            )
            codes = jnp.concatenate([codes[..., :-1], last], axis=-1)
        scales = self.scales
        return NMArray(
            self.values[..., :outputs, :kept],
            None if scales is None else scales[..., :outputs, :],
            codes,
            2,
            4,
            self.axis,
            self.dense_shape,
        )

    @property
    def _stored_shape(self) -> tuple[int, int]:
        """Numbers of outputs, and of values of one, without what was filled up."""
        rank, shape = len(self.dense_shape), self.dense_shape
        split = rank - 1 if self.axis == -1 else rank + self.axis + 1
        first, last = math.prod(shape[:split]), math.prod(shape[split:])
        return (first, last // 2) if self.axis == -1 else (last, first // 2)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Lengths of the leading axes that count the layers of a stack."""
        return self.values.shape[:-2]

    @property
    def layout(self) -> str:
        """What is stored, in words."""
        return f"2:4 along {self.axis} for {self.target}"

    @property
    def matrix(self) -> "PreparedArray | None":
        """The same array as a matrix, if groups do not run along its last axis."""
        if self.axis == -1:
            return None
        outputs, kept = self._stored_shape
        return dataclasses.replace(self, axis=-2, dense_shape=(2 * kept, outputs))

    @property
    def transposed(self) -> "PreparedArray | None":
        """The transpose of a matrix; None for other ranks."""
        if len(self.dense_shape) != 2:
            return None
        shape = self.dense_shape[::-1]
        return dataclasses.replace(self, axis=-3 - self.axis, dense_shape=shape)

    def place(self, values: WeightArray) -> WeightArray:
        """Put values like `values` to where these stand in the dense array."""
        outputs, kept = self._stored_shape
        return self.canonical.place(values[..., :outputs, :kept])


def _fill(array: jax.Array, rows: int, columns: int) -> jax.Array:
    """Add rows and columns of zeros behind a matrix or a stack of them."""
    if not rows and not columns:
        return array
    return jnp.pad(array, [(0, 0)] * (array.ndim - 2) + [(0, rows), (0, columns)])


def _with_distinct(codes: Any, outputs: int, kept: int, total: int) -> jax.Array:
    """Give groups of zeros the positions 0 and 1.

    Args:
      codes: packed positions, filled up with rows of zeros behind `outputs`.
      outputs: rows that hold positions.
      kept: positions that a row holds; even.
      total: positions that it shall hold; a multiple of 4.

    Returns:
      The positions, ``(..., total / 4)``.
    """
    pair = jnp.uint8(0b0100)
    filler = pair | pair << 4
    rows = jnp.arange(codes.shape[-2])[:, None] < outputs
    if kept % 4:
        last = codes[..., -1:] | pair << 4
        codes = jnp.concatenate([codes[..., :-1], last], axis=-1)
    codes = _fill(codes, 0, total // 4 - codes.shape[-1])
    known = rows & (jnp.arange(codes.shape[-1]) < -(-kept // 4))
    return jnp.where(known, codes, filler)


def refusal(small: Compressed, target: str) -> str:
    """Say why an array cannot be prepared; empty where it can.

    Args:
      small: a compressed array.
      target: a GPU, of `TARGETS`, or ``"cpu"``.

    Returns:
      The reason, or an empty string.

    Raises:
      ValueError: there is no such target.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.formats import prepared
      >>> small = formats.NMArray.from_dense(jnp.zeros((4, 2)), 2, 4)
      >>> prepared.refusal(small, "sm90")
      'sparse tensor cores take bfloat16, float16, float8_..., int8, not float32: ...
    """
    _check_target(target)
    if target == CPU:
        return windows.refusal(small)
    if not isinstance(small, NMArray):
        return f"{type(small).__name__} has no layout for sparse tensor cores"
    if (small.n, small.m) != (2, 4):
        return f"sparse tensor cores take 2:4, not {small.n}:{small.m}"
    if str(small.dtype) not in DTYPES:
        return (
            f"sparse tensor cores take {', '.join(DTYPES)}, not {small.dtype}: cast "
            "with small.astype(jnp.bfloat16), or compress bfloat16 params"
        )
    return ""


def _check_target(target: str) -> None:
    if target not in (*TARGETS, CPU):
        raise ValueError(f"target={target!r} is none of {', '.join((*TARGETS, CPU))}")


def prepare(params: Params, target: str | None = None) -> Params:
    """Lay out the leaves of params for the hardware that shall multiply them.

    Do this once, after loading: `nmjax.matmul`, `nmjax.linen.apply` and `nmjax.nnx`
    take the result as they take compressed params. Save what `nmjax.compress` gave;
    ``canonical`` of a prepared leaf gives it back.

    - For a GPU, 2:4 leaves of 8- or 16-bit values become
      `nmjax.formats.PreparedArray`, which its sparse tensor cores take. Elsewhere
      positions are put back in order at every call.
    - For a CPU with AVX-512, constant fan-in leaves become
      `nmjax.formats.WindowArray`, which is faster for up to 4 rows, about as fast for
      8 and slower for more. Without AVX-512 it is slower for any number.

    Other leaves stay as they are; `nmjax.formats.prepared.refusal` says why.

    Args:
      params: a tree with compressed arrays, from `nmjax.compress`.
      target: ``"sm90"`` (Hopper), or, experimental, ``"sm80"`` (Ampere) or ``"sm100"``
        (Blackwell), or ``"cpu"``. Default: the GPU that JAX runs on.

    Returns:
      The tree with prepared leaves.

    Raises:
      ValueError: there is no such target.
      RuntimeError: no target is given and JAX does not run on such a GPU.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> weights = jnp.tile(jnp.array([0.0, 3.0, 0.0, 4.0], jnp.bfloat16), 2)[:, None]
      >>> small = nm.compress({"kernel": weights}, {"kernel": weights != 0})
      >>> ready = nm.prepare(small, "sm90")["kernel"]
      >>> nm.matmul(jnp.ones(8, jnp.bfloat16), ready).tolist()
      [14.0]
    """
    chosen = _present() if target is None else target
    _check_target(chosen)

    def ready(leaf: Any) -> Any:
        if not isinstance(leaf, Compressed) or refusal(leaf, chosen):
            return leaf
        if isinstance(leaf, FanInArray):
            return WindowArray.from_canonical(leaf)
        assert isinstance(leaf, NMArray)
        return PreparedArray.from_canonical(leaf, chosen)

    return jax.tree.map(ready, params, is_leaf=lambda x: isinstance(x, Compressed))


def _present() -> str:
    """Name the GPU that JAX runs on."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    known = {"8": "sm80", "9": "sm90", "10": "sm100"}
    major = capability.split(".")[0]
    if device.platform != "gpu" or major not in known:
        raise RuntimeError(
            f"JAX runs on {device.device_kind}, which has no sparse tensor cores that "
            "nmjax knows; name what to prepare for, as in prepare(params, 'sm90') or "
            "prepare(params, 'cpu')"
        )
    return known[major]
