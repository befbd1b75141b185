"""Choosing: which form of a product is fastest on a CPU, by what was measured.

`cpu_forms.json` holds the times of every form relative to dense weights, for many
layouts, densities and batch sizes; ``benchmarks/matmul.py --section table`` writes it.
"""

import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Collection
from typing import Any

from jaxtyping import Array

from nmjax.formats import BlockArray, Compressed, FanInArray, NMArray, WindowArray
from nmjax.kernels import native, reference

FORMS: dict[str, Callable[..., Array]] = {
    "direct": native.multiply,
    "expand": functools.partial(native.multiply, expand=True),
    "slots": reference.by_slots,
    "blocks": reference.by_blocks,
    "decompress": reference.by_decompression,
}
"""Ways to multiply x ``(batch, K)`` with a compressed ``(K, F)``."""


NATIVE = ("direct", "expand")
"""Those that are kernels of the native library."""

XLA = ("slots", "blocks", "decompress")
"""Those in XLA operations; the last one serves everything."""


def refusal(form: str, x: Any, w: Compressed) -> str:
    """Say why a form does not serve a product; empty where it does.

    Args:
      form: a key of `FORMS`.
      x: inputs ``(batch, K)``, an array or its shape and dtype.
      w: compressed, of dense shape ``(K, F)``.

    Returns:
      The reason, or an empty string.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import choosing
      >>> w = formats.BlockArray.from_dense(jnp.eye(4), 2, 2)
      >>> choosing.refusal("slots", jnp.ones((1, 4)), w)
      'slots are those of a FanInArray with neurons in its columns'
    """
    if form in NATIVE:
        return native.refusal(x, w)
    if form == "slots" and not (isinstance(w, FanInArray) and w.neuron_axes == (-1,)):
        return "slots are those of a FanInArray with neurons in its columns"
    if form == "blocks" and not (isinstance(w, BlockArray) and w.axis == -2):
        return "blocks are those of a BlockArray whose last axis counts outputs"
    return ""


def choose(x: Any, w: Compressed, among: Collection[str] = (*XLA, *NATIVE)) -> str:
    """Choose the form that was fastest for the most similar product.

    Args:
      x: inputs ``(batch, K)``, an array or its shape and dtype.
      w: compressed, of dense shape ``(K, F)``.
      among: keys of `FORMS`, at least one of which serves the product.

    Returns:
      One of them.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import choosing
      >>> w = formats.FanInArray.from_dense(jnp.eye(4))
      >>> choosing.choose(jnp.ones((1, 4)), w) in choosing.FORMS
      True
    """
    served = _served(x, w, among)
    return min(served, key=lambda form: served[form])


def relative_time(x: Any, w: Compressed) -> float:
    """Give the time of the form that `choose` takes, relative to dense weights.

    Args:
      x: inputs ``(batch, K)``, an array or its shape and dtype.
      w: compressed, of dense shape ``(K, F)``.

    Returns:
      Its time as a fraction of that of the dense product of the same dtype; below 1 it
      is faster. Infinite for a layout that was not measured.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import choosing
      >>> w = formats.FanInArray.from_dense(jnp.eye(4))
      >>> choosing.relative_time(jnp.ones((1, 4)), w) > 0
      True
    """
    return min(_served(x, w, FORMS).values())


def _served(x: Any, w: Compressed, among: Collection[str]) -> dict[str, float]:
    """Give the relative times of the forms that serve a product."""
    measured = _measured(x, w)
    return {
        form: measured.get(form, math.inf) for form in among if not refusal(form, x, w)
    }


def _measured(x: Any, w: Compressed) -> dict[str, float]:
    """Find the entry of the table that is most similar to a product."""
    batch = x.shape[0] if isinstance(x.shape[0], int) else 64  # symbolic in an export
    layout, values = layout_of(w), str(w.values.dtype)
    density = max(1, _kept(w)) / max(1, w.size)
    found = {key[2:]: ratios for key, ratios in table().items() if key[:2] == layout}
    if not found:
        return {}
    # Another dtype of the same width behaves alike.
    alike = {"float16": "bfloat16", "float8_e4m3fn": "int8", "float8_e5m2": "int8"}
    wanted = alike.get(values, values)
    known = {key[0] for key in found}
    dtype = next(name for name in (wanted, "float32", *known) if name in known)

    def distance(key: tuple[str, float, int]) -> tuple[float, float]:
        _, measured, rows = key
        return abs(math.log(measured / density)), abs(math.log(rows / max(1, batch)))

    ratios = found[min((key for key in found if key[0] == dtype), key=distance)]
    if isinstance(w, NMArray) and layout[1] != f"{w.n}:{w.m}":
        # Expanding takes as long for any pattern; this kernel has its own for some.
        return {form: ratio for form, ratio in ratios.items() if form != "direct"}
    return ratios


def _kept(w: Compressed) -> int:
    """Count the stored weights, but not what fills up between them."""
    if isinstance(w, WindowArray):
        return math.prod(w.neurons.shape) * w.fan_in
    return w.values.size


def layout_of(w: Compressed) -> tuple[str, str]:
    """Name the format and the layout of an array, as the table does.

    Args:
      w: a compressed array.

    Returns:
      ``("FanIn", "")``, ``("NM", "2:4")`` or ``("Block", "16x1")`` (outputs x inputs):
      the most similar pattern or size that was measured.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import formats
      >>> from nmjax.kernels import choosing
      >>> choosing.layout_of(formats.NMArray.from_dense(jnp.zeros((16, 2)), 2, 16))
      ('NM', '1:8')
    """
    if isinstance(w, NMArray):
        patterns = {key[1] for key in table() if key[0] == "NM"}

        def unlike(pattern: str) -> tuple[float, float]:
            n, m = map(int, pattern.split(":"))
            return abs(math.log(n / m * w.m / w.n)), abs(math.log(m / w.m))

        return "NM", min(sorted(patterns), key=unlike, default="")
    if isinstance(w, WindowArray):
        return "Window", ""
    if not isinstance(w, BlockArray):
        return "FanIn", ""
    *_, inputs, outputs = w.values.shape
    sizes = {key[1] for key in table() if key[0] == "Block"}

    def distance(size: str) -> float:
        high, wide = map(int, size.split("x"))
        return abs(math.log(high / outputs)) + abs(math.log(wide / inputs))

    return "Block", min(sorted(sizes), key=distance, default="")


_Key = tuple[str, str, str, float, int]


@functools.cache
def table() -> dict[_Key, dict[str, float]]:
    """Read the table.

    Returns:
      From format, layout, dtype of the values, density and batch to the times of forms
      relative to dense weights.

    Example:
      >>> from nmjax.kernels import choosing
      >>> "direct" in choosing.table()["FanIn", "", "float32", 0.1, 1]
      True
    """
    text = importlib.resources.files("nmjax.kernels").joinpath("cpu_forms.json")
    rows = json.loads(text.read_text())["rows"]
    names = ("format", "layout", "values", "density", "batch")
    return {tuple(row[name] for name in names): row["ratios"] for row in rows}
