"""Probe: what does the hardware make of the stored positions?

The product of the identity and 2:4 weights is the weights as they were decoded, every
entry from one multiplication by 1. Where they are not the weights that were stored, the
places that differ, and known mistakes that would give the same, say what is wrong.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.gpu import operands
from benchmarks.gpu.workers import Json, Report, Task
from nmjax.formats import images
from nmjax.kernels import trials
from nmjax.kernels.gpu import tiling

IMAGES = ("shared words", "a word each")
"""Two instructions on 16-bit values share a word; or each has its own."""


SMOKE = (
    "hopper bfloat16, shared words",
    "hopper_decode int8, shared words",
    "hopper_weight_only int8-weights, a word each",
)
"""What a dry run probes."""


def tasks(smoke: bool) -> list[Task]:
    """List the tasks: every kernel, dtype and image."""
    size, found = 256, []
    for dtype in trials.DTYPES:
        own = "hopper_weight_only" if dtype == "int8-weights" else None
        for kernel in [own] if own else ["hopper", "hopper_decode"]:
            wide = dtype in ("bfloat16", "float16", "int8-weights")
            for image in IMAGES if wide else IMAGES[:1]:
                name = f"{kernel} {dtype}, {image}"
                settings = {"kernel": kernel, "dtype": dtype, "size": size}
                found.append(Task("probe", name, settings | {"image": image}, 6))
    if smoke:
        found = [task for task in found if task.name in SMOKE]
        for task in found:
            task.settings["size"] = 128
    found.sort(key=lambda task: task.settings["dtype"] != "bfloat16")
    return found


def run(settings: Json, report: Report) -> None:
    """Probe one kernel."""
    size, kernel = settings["size"], settings["kernel"]
    rows = tiling.FEW_ROWS if kernel == "hopper_decode" else size
    product = trials.Product(settings["dtype"], size, size, rows, kernel)
    small, _ = trials.draw(jax.random.key(0), product)
    ready = unscale(trials.prepare(small))
    if settings["image"] == IMAGES[1]:
        ready = dataclasses.replace(ready, image=images.broadcast(ready.image))
    # Results of 16 bits hold every value exactly.
    wide = product.inputs_dtype.itemsize == 2
    out = product.inputs_dtype if wide else jnp.dtype("bfloat16")
    multiply = jax.jit(operands.by_kernel(product, out_dtype=out))
    identity = jnp.eye(size, dtype=jnp.float32).astype(product.inputs_dtype)
    parts = [multiply(ready, identity[i : i + rows]) for i in range(0, size, rows)]
    got = np.concatenate([np.asarray(part.astype(jnp.float32)) for part in parts])
    found = diagnose(
        got.T,
        np.asarray(small.values.astype(out).astype(jnp.float32)),
        np.asarray(small.positions),
        product.inputs_dtype.itemsize,
    )
    report(**operands.fields(product), image=settings["image"], **found)


def unscale(ready: Any) -> Any:
    """Set scales to 1, so that results are the stored values."""
    if ready.scales is None:
        return ready
    return dataclasses.replace(ready, scales=jnp.ones_like(ready.scales))


# What is wrong -----------------------------------------------------------------------


def place(values: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Put kept values ``(F, K / 2)`` to their positions: ``(F, K)``."""
    features, kept = values.shape
    dense = np.zeros((features, kept // 2, 4), values.dtype)
    groups = positions.reshape(features, -1, 2).astype(np.int64)
    for i in (1, 0):
        own = values.reshape(features, -1, 2)[..., i : i + 1]
        np.put_along_axis(dense, groups[..., i : i + 1], own, axis=-1)
    return dense.reshape(features, 2 * kept)


def diagnose(
    got: np.ndarray, values: np.ndarray, positions: np.ndarray, bytes_per_value: int
) -> Json:
    """Compare what was decoded with what was stored.

    Args:
      got: decoded weights, ``(F, K)``.
      values: stored values, ``(F, K / 2)``.
      positions: their positions in groups of four, ``(F, K / 2)``.
      bytes_per_value: 2 or 1, of the inputs: it decides which thread has which word.

    Returns:
      The entries of a row, see the documentation of the package.
    """
    want = place(values, positions)
    wrong = np.argwhere(~(got == want))  # NaN is wrong too
    if not len(wrong):
        return {"verdict": "EXACT"}
    first = wrong[0]
    group = 4 * (first[1] // 4)
    rows, columns = wrong.T % 64
    lanes = 4 * (rows % 8)
    if bytes_per_value == 2:
        lanes = lanes + columns // 16
    else:
        lanes = lanes + 2 * (columns // 32) + rows % 16 // 8
    return {
        "verdict": "WRONG",
        "mismatches": len(wrong),
        "entries": int(got.size),
        "first": first.tolist(),
        "got": got[first[0], group : group + 4].tolist(),
        "want": want[first[0], group : group + 4].tolist(),
        "outputs_mod_64": sorted(set(rows.tolist())),
        "inputs_mod_64": sorted(set(columns.tolist())),
        "lanes": sorted(set(lanes.tolist())),
        "reads_as": [
            text
            for text, mistake in mistakes(bytes_per_value).items()
            if np.array_equal(got, place(*mistake(values, positions)))
        ],
    }


Mistake = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def mistakes(bytes_per_value: int) -> dict[str, Mistake]:
    """List what could go wrong, as functions of values and positions."""

    def move(step: int, order: list[int], axis: int) -> Mistake:
        """Read blocks of `step` positions of an axis in another order."""

        def mistake(values: np.ndarray, positions: np.ndarray) -> Any:
            moved = np.moveaxis(positions, axis, 0)
            blocks = moved.reshape(-1, len(order), step, *moved.shape[1:])
            blocks = blocks[:, order].reshape(moved.shape)
            return values, np.moveaxis(blocks, 0, axis)

        return mistake

    def all_at(index: int) -> Mistake:
        return lambda values, positions: (values, np.full_like(positions, index))

    def swap_pairs(values: np.ndarray, positions: np.ndarray) -> Any:
        pairs = positions.reshape(len(positions), -1, 2)[..., ::-1]
        return values, pairs.reshape(positions.shape)

    found: dict[str, Mistake] = {
        "the two positions of a group are swapped": swap_pairs,
        "outputs r and r + 8 are swapped": move(8, [1, 0], 0),
        "all outputs of 16 have the positions of the first 8": move(8, [0, 0], 0),
        "outputs r and r + 16 are swapped (warps)": move(16, [1, 0], 0),
        "outputs r and r + 64 are swapped (warpgroups)": move(64, [1, 0], 0),
        "all positions are 0": all_at(0),
    }
    halves = 16 if bytes_per_value == 2 else 32  # inputs of the words of one thread
    name = f"each {halves} inputs are swapped with the next {halves}"
    found[name] = move(halves // 2, [1, 0], 1)
    name = f"each {2 * halves} inputs have the positions of their first {halves}"
    found[name] = move(halves // 2, [0, 0], 1)
    if bytes_per_value == 2:
        found["the selectors are swapped"] = move(16, [1, 0], 1)
        found["selector 1 reads what selector 0 reads"] = move(16, [0, 0], 1)
        found["selector 0 reads what selector 1 reads"] = move(16, [1, 1], 1)
    else:
        found["each 64 inputs are swapped with the next 64"] = move(32, [1, 0], 1)
    return found


def line(row: Json) -> str:
    """Say in a line what a row found."""
    if row["verdict"] == "EXACT":
        return "EXACT"
    share = f"{row['mismatches']} of {row['entries']} wrong"
    first = f"first at {row['first']}: got {row['got']}, want {row['want']}"
    known = f"; reads as: {', '.join(row['reads_as'])}" if row["reads_as"] else ""
    return f"WRONG: {share}, {first}, lanes {row['lanes']}{known}"
