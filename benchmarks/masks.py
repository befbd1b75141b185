"""How fast are masks beside a copy of the array, other forms and other libraries?

Every mask is timed beside a copy, a jitted comparison that reads the array once and
writes one boolean per entry: the limit of a mask. Beside the masks of nmjax stand the
forms one would write first (argsort twice; lax.top_k and scatter), NumPy, torch and
jaxpruner. torch and jaxpruner are measured where they are installed, torch in a process
of its own:

    python benchmarks/masks.py
    python benchmarks/masks.py --peer-python ~/torch/bin/python --json masks.json
    python benchmarks/masks.py --only top-k --quick

Scores are |x| of normal x in every row; "bar" is the ratio that a release must keep on
two cores. Ratios at --quick and --smoke sizes say little: those arrays fit in a cache.
"""

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import timing
from jax import lax

import nmjax as nm

PATTERNS = [(2, 4), (4, 8), (1, 4), (1, 16), (4, 16)]


def magnitude(x: jax.Array) -> jax.Array:
    """Return |x|, as `nmjax.saliency.magnitude` does."""
    return nm.saliency.magnitude(x)


def copy(x: jax.Array) -> jax.Array:
    """Read every entry once and write one boolean: the limit of a mask."""
    return x > jnp.asarray(0.5, x.dtype)


def nm_by_argsort(x: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Keep n of m by the ranks that argsort of argsort gives."""
    groups = jnp.moveaxis(magnitude(x), axis, -1)
    split = groups.reshape(*groups.shape[:-1], -1, m)
    mask = jnp.argsort(jnp.argsort(-split)) < n
    return jnp.moveaxis(mask.reshape(groups.shape), -1, axis)


def nm_by_top_k(x: jax.Array, n: int, m: int, axis: int) -> jax.Array:
    """Keep n of m by lax.top_k and a comparison of positions."""
    groups = jnp.moveaxis(magnitude(x), axis, -1)
    _, kept = lax.top_k(groups.reshape(*groups.shape[:-1], -1, m), n)
    mask = (kept[..., None] == jnp.arange(m)).any(-2)
    return jnp.moveaxis(mask.reshape(groups.shape), -1, axis)


def nm_by_numpy(x: np.ndarray, n: int, m: int, axis: int) -> np.ndarray:
    """Keep n of m by NumPy's argpartition."""
    groups = np.moveaxis(np.abs(x), axis, -1)
    split = groups.reshape(-1, m)
    mask = np.zeros(split.shape, bool)
    kept = np.argpartition(split, m - n, axis=1)[:, m - n :]
    np.put_along_axis(mask, kept, True, axis=1)
    return np.moveaxis(mask.reshape(groups.shape), -1, axis)


def topk_by_top_k(x: jax.Array, k: int, axis: int | None) -> jax.Array:
    """Keep k by lax.top_k and scatter."""
    rows = magnitude(x).reshape(1, -1) if axis is None else magnitude(x)
    rows = jnp.moveaxis(rows, -1 if axis is None else axis, -1)
    _, kept = lax.top_k(rows, k)
    at = jnp.arange(rows.shape[0])[:, None], kept
    mask = jnp.zeros(rows.shape, bool).at[at].set(True)
    return mask.reshape(x.shape) if axis is None else jnp.moveaxis(mask, -1, axis)


def topk_by_argsort(x: jax.Array, k: int, axis: int | None) -> jax.Array:
    """Keep k by the ranks that argsort of argsort gives."""
    rows = magnitude(x).reshape(-1) if axis is None else magnitude(x)
    axis = 0 if axis is None else axis
    ranks = jnp.argsort(jnp.argsort(-rows, axis=axis), axis=axis)
    return (ranks < k).reshape(x.shape)


def topk_by_numpy(x: np.ndarray, k: int, axis: int | None) -> np.ndarray:
    """Keep what reaches NumPy's k-th highest score; ties are not broken."""
    scores = np.abs(x)
    size = scores.size if axis is None else scores.shape[axis]
    if axis is None:
        return scores >= np.partition(scores, size - k, axis=None)[size - k]
    parted = np.partition(scores, size - k, axis=axis)
    return scores >= np.take(parted, [size - k], axis=axis)


def jaxpruner_functions(x: jax.Array, k: int) -> dict[str, Callable[[], Any]]:
    """Return what jaxpruner has for these masks; nothing where it is not installed."""
    if importlib.util.find_spec("jaxpruner") is None:
        return {}
    calculator = importlib.import_module("jaxpruner.mask_calculator")
    types = importlib.import_module("jaxpruner.sparsity_types")
    scores = jnp.abs(x)
    groups = {
        f"2:4 axis {axis}": calculator.get_topk_fn(types.NByM(2, 4, axis=axis))
        for axis in (0, -1)
    }
    functions = {name: partial(f, scores, 0.0) for name, f in groups.items()}
    flat = jax.jit(calculator.get_topk_fn(types.Unstructured()))
    functions["top-k flat"] = partial(flat, scores, 1 - k / x.size)
    return functions


class Benchmark:
    """The settings of a run, its arrays and its results."""

    def __init__(self, options: argparse.Namespace):
        """Make the arrays and start the peers."""
        self.options = options
        self.size = {"full": 4096, "quick": 1024, "smoke": 64}[options.scale]
        self.values = np.random.default_rng(0).normal(size=(self.size, self.size))
        self.values = self.values.astype(np.float32)
        self.records: list[dict[str, Any]] = []
        self.peer = self.start_torch()
        self.torch = self.peer.functions if self.peer else {}
        x = jnp.asarray(self.values)
        self.jaxpruner = jaxpruner_functions(x, x.size // 10)
        if not self.jaxpruner:
            print("jaxpruner: not importable here, left out")

    def start_torch(self) -> timing.Peer | None:
        """Start torch in a process of its own, where there is one."""
        python = timing.python_with("torch", self.options.peer_python)
        if python is None:
            print("torch: not importable here, left out (--peer-python names another)")
            return None
        script = os.path.join(os.path.dirname(__file__), "masks_torch.py")
        arguments = [str(self.size), str(os.cpu_count())]
        peer = timing.Peer(script, arguments, python)
        print(f"torch: {peer.version}, in a process of its own")
        return peer

    def compare(
        self,
        title: str,
        x: jax.Array,
        functions: dict[str, Any],
        bars: dict[str, float] | None = None,
        against: tuple[str, str, float] | None = None,
    ) -> None:
        """Time functions beside a copy of x and print the table.

        Args:
          title: Title of the table.
          x: The array that a copy of is the base.
          functions: Functions of x (JAX), of nothing (others), or of a peer.
          bars: Highest ratio to the copy that a name must keep.
          against: (name, other, bar): highest ratio of name to other.
        """
        if self.options.only and self.options.only not in title:
            return
        ready = {"copy": partial(jax.jit(copy), x)} | functions
        rounds = self.options.rounds
        target = 0.02 if self.options.scale == "full" else 0.002
        results = timing.measure(ready, "copy", rounds, target)
        notes = {
            name: self.verdict(f"bar {bar}", results[name].ratio, bar)
            for name, bar in (bars or {}).items()
        }
        if against and against[1] in results:
            name, other, bar = against
            share = results[name].ms / results[other].ms
            notes[name] = self.verdict(f"{share:.2f} of {other}, bar {bar}", share, bar)
        print(timing.table(title, results, notes), flush=True)
        for name, result in results.items():
            record = {"table": title, "name": name, **vars(result)}
            self.records.append(record | {"note": notes.get(name, "")})

    def verdict(self, text: str, value: float, bar: float) -> str:
        """Say whether a bar is kept; bars are for arrays that fit in no cache."""
        if self.options.scale != "full":
            return ""
        return f"{text}: {'kept' if value <= bar else 'MISSED'}"

    def slow(self, functions: dict[str, Any]) -> dict[str, Any]:
        """Return functions that take seconds, unless they are left out."""
        return {} if self.options.no_slow else functions

    def groups(self) -> None:
        """Compare N:M masks on both axes, in float32 and bfloat16."""
        shape = f"{self.size}x{self.size}"
        for dtype, bar in ((jnp.float32, 1.6), (jnp.bfloat16, 2.4)):
            x = jnp.asarray(self.values, dtype)
            for axis in (0, -1):
                functions = {
                    f"{n}:{m}": mask_of(partial(nm.nm_mask, n=n, m=m, axis=axis), x)
                    for n, m in PATTERNS
                }
                title = f"N:M mask, {shape} {x.dtype}, axis {axis}"
                self.compare(title, x, functions, {"2:4": bar})
        x = jnp.asarray(self.values)
        for axis in (0, -1):
            functions = {"nmjax": mask_of(partial(nm.nm_mask, n=2, m=4, axis=axis), x)}
            functions |= self.slow(
                {
                    "argsort": jitted(partial(nm_by_argsort, n=2, m=4, axis=axis), x),
                    "lax.top_k": jitted(partial(nm_by_top_k, n=2, m=4, axis=axis), x),
                    "numpy": partial(nm_by_numpy, self.values, 2, 4, axis),
                }
            )
            functions |= self.peers(f"2:4 axis {axis}")
            self.compare(
                f"2:4 and its peers, {shape} float32, axis {axis}", x, functions
            )
        kernel = jax.random.normal(jax.random.key(0), (3, 3, 256, 256))
        functions = {
            f"{n}:{m}": mask_of(partial(nm.nm_mask, n=n, m=m), kernel)
            for n, m in PATTERNS
        }
        self.compare("N:M mask, convolution 3x3x256x256, axis -2", kernel, functions)

    def transposable(self) -> None:
        """Compare transposable masks."""
        x = jnp.asarray(self.values)
        functions: dict[str, Any] = {
            f"{n}:{m}": mask_of(partial(nm.transposable_nm_mask, n=n, m=m), x)
            for n, m in ((2, 4), (4, 8))
        }
        functions |= self.slow(self.peers("transposable 2:4"))
        title = f"transposable mask, {self.size}x{self.size} float32"
        self.compare(title, x, functions, {"2:4": 8.0})

    def topk(self) -> None:
        """Compare exact top-k masks, flat and along both axes."""
        shape = f"{self.size}x{self.size}"
        for axis in (None, 0, -1):
            x = jnp.asarray(self.values)
            k = (x.size if axis is None else self.size) // 10
            name = "flat" if axis is None else f"axis {axis}"
            functions: dict[str, Any] = {
                "nmjax": mask_of(partial(nm.topk_mask, k=k, axis=axis), x)
            }
            half = x.astype(jnp.bfloat16)
            functions["nmjax bf16"] = mask_of(
                partial(nm.topk_mask, k=k, axis=axis), half
            )
            functions |= self.slow(
                {
                    "argsort": jitted(partial(topk_by_argsort, k=k, axis=axis), x),
                    "lax.top_k": jitted(partial(topk_by_top_k, k=k, axis=axis), x),
                    "numpy": partial(topk_by_numpy, self.values, k, axis),
                }
            )
            functions |= self.peers(f"top-k {name}")
            if axis is None and "topk alone" in self.torch:
                functions["torch.topk alone"] = self.torch["topk alone"]
            against = ("nmjax", "torch.topk alone" if axis is None else "torch", 0.5)
            title = f"exact top-k of 10 %, {shape} float32, {name}"
            self.compare(title, x, functions, against=against)

    def peers(self, name: str) -> dict[str, Any]:
        """Return what other libraries have under a name."""
        peers = {"torch": self.torch, "jaxpruner": self.jaxpruner}
        return {peer: found[name] for peer, found in peers.items() if name in found}

    def trees(self) -> None:
        """Time the compilation and the run of the masks of 100 leaves in one jit."""
        title = "tree of 100 leaves (4 shapes), one jit"
        if self.options.only and self.options.only not in title:
            return
        scale = 1 if self.options.scale != "smoke" else 8
        shapes = [(256, 512), (512, 256), (256, 256), (512, 512)]
        leaves = 4 if self.options.scale == "smoke" else 100
        keys = jax.random.split(jax.random.key(0), leaves)
        tree = {
            f"layer {i}": jax.random.normal(
                key, tuple(size // scale for size in shapes[i % 4])
            )
            for i, key in enumerate(keys)
        }
        k = sum(leaf.size for leaf in tree.values()) // 10
        functions: dict[str, tuple[Callable[[Any], Any], float | None]] = {
            "2:4": (leaf_by_leaf(partial(nm.nm_mask, n=2, m=4)), 3.0),
            "4:16": (leaf_by_leaf(partial(nm.nm_mask, n=4, m=16)), 5.0),
            "transposable 2:4": (
                leaf_by_leaf(partial(nm.transposable_nm_mask, n=2, m=4)),
                None,
            ),
            "fan-in of 10": (leaf_by_leaf(partial(nm.fan_in_mask, k=10)), None),
            "global top-k": (lambda scores: nm.global_topk_mask(scores, k), None),
        }
        print(f"\n{title}\n{'':16}  trace s  compile s  run ms")
        for name, (function, bar) in functions.items():
            start = time.perf_counter()
            lowered = jax.jit(lambda t, f=function: f(jax.tree.map(magnitude, t)))
            lowered = lowered.lower(tree)
            traced = time.perf_counter()
            compiled = lowered.compile()
            done = time.perf_counter()
            run = min(timing.seconds(partial(compiled, tree)) for _ in range(5)) * 1e3
            trace, compile_ = traced - start, done - traced
            note = ""
            if bar is not None:
                note = self.verdict(f"bar {bar} s to compile", compile_, bar)
            print(
                f"{name:16}  {trace:7.2f}  {compile_:9.2f}  {run:6.2f}  {note}".rstrip()
            )
            record = {"table": title, "name": name, "trace_s": trace, "note": note}
            self.records.append(record | {"compile_s": compile_, "run_ms": run})


def jitted(function: Callable[..., Any], x: jax.Array) -> Callable[[], Any]:
    """Return a function of nothing that runs a jitted function of x."""
    return partial(jax.jit(function), x)


def mask_of(function: Callable[..., Any], x: jax.Array) -> Callable[[], Any]:
    """Return a function of nothing that computes the mask of |x|."""
    return jitted(lambda x: function(magnitude(x)), x)


def leaf_by_leaf(function: Callable[..., Any]) -> Callable[[Any], Any]:
    """Return a function of trees."""
    return lambda tree: jax.tree.map(function, tree)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    scale = parser.add_mutually_exclusive_group()
    for name, text in (("quick", "1024 x 1024"), ("smoke", "64 x 64, for tests")):
        scale.add_argument(
            f"--{name}", dest="scale", action="store_const", const=name, help=text
        )
    parser.add_argument("--only", metavar="WORD", help="tables whose title has WORD")
    parser.add_argument("--rounds", type=int, help="rounds of each table (default 9)")
    parser.add_argument("--no-slow", action="store_true", help="leave slow peers out")
    parser.add_argument("--peer-python", metavar="PATH", help="interpreter with torch")
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON")
    parser.set_defaults(scale="full")
    options = parser.parse_args()
    options.rounds = (
        options.rounds or {"full": 9, "quick": 5, "smoke": 2}[options.scale]
    )
    timing.keep_pages()
    machine = timing.describe()
    for name, value in machine.items():
        print(f"{name}: {value}")
    benchmark = Benchmark(options)
    benchmark.groups()
    benchmark.transposable()
    benchmark.topk()
    benchmark.trees()
    if benchmark.peer:
        benchmark.peer.close()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"machine": machine, "results": benchmark.records}, file, indent=1
            )


if __name__ == "__main__":
    main()
