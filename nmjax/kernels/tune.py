r"""Tune: measure tiles of the 2:4 kernels on a GPU, and write the table they follow.

    python -m nmjax.kernels.tune --out tiles.json
    python -m nmjax.kernels.tune --shapes 4096x4096x16 8192x8192x8192 \
        --dtypes bfloat16 float8_e4m3fn --out nmjax/kernels/gpu/tiles.json

Shapes are outputs x inputs x rows of x. Entries of the file that were measured on the
same GPU are kept where no new ones take their place; those of another one are not.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from nmjax.kernels import trials
from nmjax.kernels.gpu import tiling
from nmjax.kernels.gpu.tiles import Tiles
from nmjax.kernels.trials import DTYPES, Product

ROWS = (8, 16, 64, 256, 1024, 4096)
WEIGHTS = ((4096, 14336), (14336, 4096), (4096, 4096), (4096, 11008), (11008, 4096))
SHAPES: tuple[tuple[int, int, int], ...] = (
    *((size, size, size) for size in (8192, 4096, 2048, 1024, 16384)),
    *((*weights, rows) for rows in ROWS for weights in WEIGHTS),
)
"""What is measured where nothing is asked for: squares, and layers of language models
as outputs, inputs and rows."""

MARGIN = 0.02
"""Tiles take the default's place only where they save more than this fraction."""


Measure = Callable[[Product, Sequence[Tiles]], Sequence[float | str]]
"""Takes a product and tiles; gives seconds for each of them, or why there are none."""


# Choosing ----------------------------------------------------------------------------


def choose(product: Product, measure: Measure) -> dict[str, Any] | str:
    """Choose the tiles of a product.

    Args:
      product: the product.
      measure: measures tiles.

    Returns:
      An entry of the table: ``kernel``, ``dtype``, ``features``, ``inputs``, ``rows``
      (the bucket), ``tiles``, ``us`` and ``default_us`` (their time and that of the
      default, microseconds) and ``measured``, the number of tiles that ran. Or a
      string: why none ran.

    Example:
      >>> from nmjax.kernels import trials, tune
      >>> product = trials.Product("bfloat16", 4096, 4096, 4096)
      >>> def measure(product, tiles):
      ...     return [3e-6, *[2e-6 for _ in tiles[1:]]]
      >>> entry = tune.choose(product, measure)
      >>> entry["us"], entry["default_us"]
      (2.0, 3.0)
    """
    tiles = product.candidates
    times = dict(enumerate(measure(product, tiles)))
    ran = {i: time for i, time in times.items() if not isinstance(time, str)}
    if not ran:
        reasons = [str(time) for time in times.values()]
        return reasons[0] if reasons else "there are no tiles for it"
    best = min(ran, key=lambda i: ran[i])
    if 0 in ran and ran[best] > (1 - MARGIN) * ran[0]:
        best = 0
    return {
        "kernel": product.kind,
        "dtype": product.values_dtype.name,
        "features": product.features,
        "inputs": product.inputs,
        "rows": tiling.bucket(product.rows),
        "tiles": dataclasses.asdict(tiles[best]),
        "us": _microseconds(ran[best]),
        "default_us": _microseconds(ran[0]) if 0 in ran else None,
        "measured": len(ran),
    }


def _microseconds(seconds: float) -> float:
    return float(f"{1e6 * seconds:.4g}")


def tune(
    products: Sequence[Product],
    measure: Measure,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[dict[str, Any]]:
    """Choose the tiles of several products.

    Args:
      products: the products; of those that share an entry of the table, the first one
        is measured.
      measure: measures tiles.
      progress: is told how many products are done, of how many, and about the last
        one.

    Returns:
      The entries of products for which tiles ran.

    Example:
      >>> from nmjax.kernels import trials, tune
      >>> product = trials.Product("bfloat16", 4096, 4096, 1)
      >>> tune.tune([product], lambda product, tiles: ["no GPU"] * len(tiles))
      []
    """
    chosen: dict[tuple[Any, ...], Product] = {}
    for product in products:
        chosen.setdefault(_key(product), product)
    entries = []
    for done, product in enumerate(chosen.values()):
        name = f"{product.kind} {product.dtype} {_shape(product)}"
        progress(done, len(chosen), name)
        entry = choose(product, measure)
        if isinstance(entry, str):
            progress(done + 1, len(chosen), f"{name}: {entry}")
            continue
        entries.append(entry)
        progress(done + 1, len(chosen), f"{name}: {entry['us']} us")
    return entries


def _key(product: Product) -> tuple[Any, ...]:
    bucket = tiling.bucket(product.rows)
    return product.kind, product.dtype, product.features, product.inputs, bucket


def _shape(product: Product) -> str:
    return f"{product.features}x{product.inputs}x{product.rows}"


# The table ---------------------------------------------------------------------------


def describe() -> dict[str, Any]:
    """Describe the device and the versions, as the head of the table has them."""
    versions = {"jax": jax.__version__, "jaxlib": importlib.metadata.version("jaxlib")}
    return {
        "device": jax.devices()[0].device_kind,
        "versions": versions,
        "date": datetime.date.today().isoformat(),
    }


def merge(
    old: Mapping[str, Any], head: Mapping[str, Any], entries: Iterable[Mapping]
) -> dict[str, Any]:
    """Put new entries into a table.

    Args:
      old: the table, ``device``, ``versions``, ``date`` and ``entries``.
      head: what `describe` gave.
      entries: new entries.

    Returns:
      The new table. Entries of another device are left out.

    Example:
      >>> from nmjax.kernels import tune
      >>> old = {"device": "H100", "entries": []}
      >>> tune.merge(old, {"device": "H200", "date": "2026-01-31"}, [])
      {'device': 'H200', 'date': '2026-01-31', 'entries': []}
    """
    kept = old.get("entries", []) if old.get("device") == head["device"] else []
    names = ("kernel", "dtype", "features", "inputs", "rows")
    found = {tuple(e[n] for n in names): dict(e) for e in (*kept, *entries)}
    return {**head, "entries": [found[key] for key in sorted(found)]}


def to_json(table: Mapping[str, Any]) -> str:
    """Format a table, a line for each entry.

    Args:
      table: what `merge` gave.

    Returns:
      The text of the file.

    Example:
      >>> from nmjax.kernels import tune
      >>> print(tune.to_json({"device": "H100", "entries": [{"rows": 8}]}), end="")
      {
       "device": "H100",
       "entries": [
        {"rows": 8}
       ]
      }
    """
    head = {key: value for key, value in table.items() if key != "entries"}
    lines = ",\n".join(f"  {json.dumps(entry)}" for entry in table["entries"])
    body = f"[\n{lines}\n ]" if lines else "[]"
    return f'{json.dumps(head, indent=1)[:-2]},\n "entries": {body}\n}}\n'


def write(path: Path, table: Mapping[str, Any]) -> None:
    """Write a table.

    Args:
      path: the file.
      table: what `merge` gave.
    """
    beside = path.with_name(path.name + ".part")
    beside.write_text(to_json(table))
    os.replace(beside, path)  # at once: a run that is killed leaves the old one


def read(path: Path) -> dict[str, Any]:
    """Read a table; an empty one where there is no file.

    Args:
      path: the file.

    Returns:
      The table.
    """
    return json.loads(path.read_text()) if path.exists() else {"entries": []}


# The command -------------------------------------------------------------------------


def show_progress(done: int, total: int, text: str) -> None:
    """Draw a bar, in place on a terminal, else a line for each product.

    Args:
      done: products that are done.
      total: all of them.
      text: what is measured.
    """
    width = 24
    full = width * done // max(1, total)
    bar = f"[{'#' * full}{'.' * (width - full)}] {done}/{total} {text}"
    end = "\r" if sys.stderr.isatty() and done < total else "\n"
    print(f"{bar[:118]:118}" if end == "\r" else bar, end=end, file=sys.stderr)


def obstacle() -> str:
    """Say why nothing can be measured here; empty where it can."""
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform == "gpu" and capability.startswith("9."):
        return ""
    return (
        "tiles are measured on a GPU of the Hopper generation (H100, H200), but JAX "
        f"runs on {device.platform} ({device.device_kind}); nothing was written"
    )


def parse_shape(text: str) -> tuple[int, int, int]:
    """Read outputs x inputs x rows.

    Args:
      text: as in ``"4096x14336x16"``.

    Returns:
      The three numbers.

    Raises:
      argparse.ArgumentTypeError: it is nothing of the kind, or outputs or inputs are
        no multiple of 128.
    """
    try:
        features, inputs, rows = map(int, text.split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not outputs x inputs x rows, as in 4096x14336x16"
        ) from None
    if features % 128 or inputs % 128 or min(features, inputs, rows) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r}: outputs and inputs must be multiples of 128, which nm.prepare "
            "fills them up to, and rows at least 1"
        )
    return features, inputs, rows


def main(argv: Sequence[str] | None = None, measure: Measure | None = None) -> int:
    """Run the command.

    Args:
      argv: the command line.
      measure: measures tiles. Default: `nmjax.kernels.trials.measure`.

    Returns:
      The exit status: 2 where nothing can be measured.
    """
    parser = argparse.ArgumentParser(
        prog="python -m nmjax.kernels.tune",
        description="measure tiles of the 2:4 kernels and write the table they follow",
    )
    parser.add_argument(
        "--shapes", nargs="+", type=parse_shape, metavar="FxKxROWS",
        help="outputs x inputs x rows (squares and layers of language models)",
    )  # fmt: skip
    parser.add_argument(
        "--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"], metavar="DTYPE",
        help=f"of {', '.join(DTYPES)} (bfloat16)",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    options = parser.parse_args(argv)
    if measure is None:
        if reason := obstacle():
            print(reason, file=sys.stderr)
            return 2
        measure = trials.measure
    head = describe()
    for dtype in options.dtypes:  # written after each: a run that is stopped gave some
        products = [Product(dtype, f, k, r) for f, k, r in options.shapes or SHAPES]
        entries = tune(products, measure, show_progress)
        write(options.out, merge(read(options.out), head, entries))
        print(f"{dtype}: {len(entries)} of {len(products)} shapes in {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
