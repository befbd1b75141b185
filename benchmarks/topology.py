"""What does it cost to drop and grow, beside other forms and in a training step?

Three tables, and the bars that a release must keep:

- one update of a 4096 x 4096 leaf: `nm.rigl_update`, `nm.set_update` and
  `nm.srigl_update` beside the same rules by lax.top_k and by argsort, by NumPy, and
  beside jaxpruner where it is installed; RigL at least 10 times faster than argsort;
- a tree of 100 leaves: the time to compile ``tx.update`` of Adam inside `nm.rigl` and
  `nm.srigl`, at most 20 s;
- a training step on a stack of MLP blocks: dense, without and with a change of
  topology, and the mean of a change every 100 steps, at most 3 % more than dense;
  "alone" is the step of a training that jits two (``topology=False``), which has no
  condition; and the memory of the step, at most 1.3 times that of the dense one.

    python benchmarks/topology.py --json benchmarks/results/topology_cpu.json
    python benchmarks/topology.py --only step --tokens 512 2048
"""

import argparse
import importlib
import importlib.util
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing
import train_step
from jax import lax

import nmjax as nm

DELTA_T = 100
DENSITY = 0.1
DROP = 0.3
SIZES = {
    "full": {"side": 4096, "leaves": 100, "blocks": 2},
    "smoke": {"side": 64, "leaves": 2, "blocks": 1},
}


def rigl_by(choose: Callable[[jax.Array, Any], jax.Array], w, mask, g, kept: int):
    """Update a mask as RigL does, with another way to choose the k largest."""
    active = int(DENSITY * w.size)
    stay = choose(jnp.where(mask, jnp.abs(w), -1.0), kept)
    return stay | choose(jnp.where(stay, -1.0, jnp.abs(g)), active - kept)


def largest_by_argsort(scores: jax.Array, k: int) -> jax.Array:
    """Choose the k largest by the ranks that argsort of argsort gives."""
    flat = scores.reshape(-1)
    return (jnp.argsort(jnp.argsort(-flat)) < k).reshape(scores.shape)


def largest_by_top_k(scores: jax.Array, k: int) -> jax.Array:
    """Choose the k largest by lax.top_k and scatter."""
    _, kept = lax.top_k(scores.reshape(-1), k)
    mask = jnp.zeros(scores.size, bool).at[kept].set(True)
    return mask.reshape(scores.shape)


def rigl_by_numpy(w: np.ndarray, mask: np.ndarray, g: np.ndarray, kept: int):
    """Update a mask as RigL does by NumPy's partition; ties are not broken."""

    def largest(scores, k):
        size = scores.size
        return scores >= np.partition(scores, size - k, axis=None)[size - k]

    stay = largest(np.where(mask, np.abs(w), -1.0), kept)
    grown = int(DENSITY * w.size) - kept
    return stay | largest(np.where(stay, -1.0, np.abs(g)), grown)


def jaxpruner_rigl(w, mask, g) -> dict[str, Callable[[], Any]]:
    """Return jaxpruner's RigL update; nothing where it is not installed."""
    if importlib.util.find_spec("jaxpruner") is None:
        print("jaxpruner: not importable here, left out")
        return {}
    trainers = importlib.import_module("jaxpruner.algorithms.sparse_trainers")
    # The rule of one leaf alone: what is around it calls what JAX has since removed.
    rule = jax.jit(partial(trainers.RigL()._update_masks, drop_fraction=DROP))
    old = mask.astype(jnp.uint8)
    return {"jaxpruner rigl": lambda: rule(old, jnp.abs(w), jnp.abs(g))}


class Benchmark:
    """The settings of a run, and its results."""

    def __init__(self, options: argparse.Namespace):
        """Take the settings."""
        self.options = options
        self.full = options.scale == "full"
        self.size = SIZES[options.scale]
        self.records: list[dict[str, Any]] = []

    def verdict(self, text: str, value: float, bar: float) -> str:
        """Say whether a bar is kept; bars are for the full size."""
        if not self.full:
            return ""
        return f"{text}: {'kept' if value <= bar else 'MISSED'}"

    def leaf(self) -> None:
        """Time one update of one leaf, beside a copy of the leaf."""
        side = self.size["side"]
        keys = jax.random.split(jax.random.key(0), 2)
        w, g = (jax.random.normal(key, (side, side)) for key in keys)
        fan_in = int(DENSITY * side)
        masks = {
            "flat": nm.topk_mask(jnp.abs(w), int(DENSITY * w.size)),
            "fan-in": nm.fan_in_mask(jnp.abs(w), fan_in),
            "2:4": nm.nm_mask(jnp.abs(w), 2, 4),
        }
        drop = jnp.float32(DROP)  # traced, as in training
        active = int(DENSITY * w.size)
        kept = active - int(nm.topology.drop_count(jnp.array(active), DROP))

        def two_four(w, mask, g, f):
            stay, _ = nm.topology.keep_largest(w, mask, f)
            choose = partial(nm.nm_mask, n=2, m=4)
            return nm.topology.regrow(stay, jnp.abs(g), choose)

        def srigl(gamma):
            return lambda w, mask, g, f: nm.srigl_update(
                w,
                mask,
                g,
                budget=fan_in * side,
                drop_fraction=f,
                gamma_sal=gamma,
            )

        own = {
            "rigl": (lambda w, m, g, f: nm.rigl_update(w, m, g, drop_fraction=f), 0),
            "set": (
                lambda w, m, g, f: nm.set_update(
                    jax.random.key(1), w, m, drop_fraction=f
                ),
                0,
            ),
            "srigl, gamma 0.3": (srigl(0.3), 1),
            "srigl, no ablation": (srigl(None), 1),
            "rigl 2:4": (two_four, 2),
        }
        functions: dict[str, Any] = {"copy": partial(jax.jit(lambda w: w + 1.0), w)}
        sparse = [jnp.where(mask, w, 0.0) for mask in masks.values()]
        for name, (update, which) in own.items():
            mask = list(masks.values())[which]
            functions[name] = partial(jax.jit(update), sparse[which], mask, g, drop)
        arrays = sparse[0], masks["flat"], g
        for name, choose in (
            ("rigl by argsort", largest_by_argsort),
            ("rigl by lax.top_k", largest_by_top_k),
        ):
            by = partial(rigl_by, choose, kept=kept)
            functions[name] = partial(jax.jit(by), *arrays)
            assert (functions[name]() == functions["rigl"]()).all(), name
        by = partial(rigl_by_numpy, *(np.asarray(a) for a in arrays), kept=kept)
        functions["rigl by numpy"] = by
        functions |= jaxpruner_rigl(*arrays)
        results = timing.measure(functions, "copy", self.options.rounds)
        faster = {
            name: result.ms / results["rigl"].ms
            for name, result in results.items()
            if name not in own and name != "copy"
        }
        notes = {name: f"{by:.1f} x rigl" for name, by in faster.items()}
        by = faster["rigl by argsort"]
        note = self.verdict(f"{by:.1f} x faster than argsort, bar 10", -by, -10)
        notes["rigl"] = note
        title = f"one update, {side}x{side} float32, density {DENSITY}"
        print(timing.table(title, results, notes), flush=True)
        for name, result in results.items():
            record = {"table": title, "name": name, **vars(result)}
            self.records.append(record | {"note": notes.get(name, "")})

    def tree(self) -> None:
        """Time the compilation and the run of an update of 100 leaves."""
        scale = 1 if self.full else 8
        shapes = [(256, 512), (512, 256), (256, 256), (512, 512)]
        shapes = [(rows // scale, columns // scale) for rows, columns in shapes]
        keys = jax.random.split(jax.random.key(0), self.size["leaves"])
        params = {
            f"layer_{i}": {"kernel": jax.random.normal(key, shapes[i % 4])}
            for i, key in enumerate(keys)
        }
        title = f"tree of {len(params)} leaves (4 shapes), update of Adam inside"
        print(f"\n{title}\n{'':12}  trace s  compile s  keep ms  change ms")
        for name, (tx, plan) in methods(params).items():
            held = nm.project(params, plan) if plan else params
            state = tx.init(held)
            start = time.perf_counter()
            lowered = jax.jit(tx.update).lower(held, state, held)
            traced = time.perf_counter()
            compiled = lowered.compile()
            trace, compile_ = traced - start, time.perf_counter() - traced
            runs = [
                min(
                    timing.seconds(partial(compiled, held, at(state, count), held))
                    for _ in range(5)
                )
                for count in (0, DELTA_T - 1)
            ]
            note = self.verdict("bar 20 s to compile", compile_, 20.0) if plan else ""
            print(
                f"{name:12}  {trace:7.2f}  {compile_:9.2f}  {1e3 * runs[0]:7.2f}  "
                f"{1e3 * runs[1]:9.2f}  {note}".rstrip(),
                flush=True,
            )
            record = {"table": title, "name": name, "trace_s": trace, "note": note}
            times = {"keep_ms": 1e3 * runs[0], "change_ms": 1e3 * runs[1]}
            self.records.append(record | {"compile_s": compile_} | times)

    def step(self) -> None:
        """Time training steps, and tell their memory."""
        side = self.size["side"]
        params = train_step.init(jax.random.key(0), self.size["blocks"], side, side)
        for tokens in self.options.tokens:
            keys = jax.random.split(jax.random.key(tokens))
            x, y = (jax.random.normal(key, (tokens, side)) for key in keys)
            self.steps(params, x, y)

    def steps(self, params: Any, x: jax.Array, y: jax.Array) -> None:
        """Time the steps of one batch size."""
        title = f"step on {x.shape[0]} tokens, kernels of {side_of(params)}"
        print(f"\n{title}\n{'':14}  MiB (peak)  of dense")
        rows: dict[str, train_step.Row] = {}
        peaks: dict[str, float] = {}
        for name, (tx, plan) in methods(params).items():
            own = jax.tree.map(jnp.copy, nm.project(params, plan) if plan else params)
            state = tx.init(own)
            step = train_step.make_step(tx, lambda params, state: params)
            compiled = step.lower(own, state, x, y).compile()
            peaks[name] = peak_bytes(compiled) / 2**20
            share = peaks[name] / peaks["dense"]
            note = self.verdict("bar 1.3", share, 1.3) if plan else ""
            print(f"{name:14}  {peaks[name]:10.1f}  {share:8.3f}  {note}".rstrip())
            record = {"table": title, "name": name, "peak_mib": peaks[name]}
            self.records.append(record | {"peak_of_dense": share, "note": note})
            if plan is None:
                rows[name] = train_step.Row(compiled, own, state)
                continue
            other, third = (jax.tree.map(jnp.copy, (own, state)) for _ in range(2))
            rows[f"{name}, kept"] = Row(compiled, own, state, count=0)
            rows[f"{name}, changed"] = Row(compiled, *other, count=DELTA_T - 1)
            # The step that a training takes which jits two: one without a condition.
            never = tx._replace(update=partial(tx.update, topology=False))
            alone = train_step.make_step(never, lambda params, state: params)
            alone = alone.lower(*third, x, y).compile()
            rows[f"{name}, kept, alone"] = Row(alone, *third, count=0)
        train_step.measure(rows, x, y, self.options.repeats)
        times = {name: (np.array(r.wall), np.array(r.cpu)) for name, r in rows.items()}
        for name in peaks:
            if name == "dense":
                continue
            for kind in ("", ", alone"):
                kept, changed = times[f"{name}, kept{kind}"], times[f"{name}, changed"]
                wall, cpu = (
                    (k * (DELTA_T - 1) + c) / DELTA_T
                    for k, c in zip(kept, changed, strict=True)
                )
                times[f"{name}, mean of {DELTA_T}{kind}"] = wall, cpu
        wall_dense, cpu_dense = times["dense"]
        print(f"{'':26}  {'ms':>8}  {'ratio':>6}  {'quartiles':>13}  {'CPU':>6}")
        for name, (wall, cpu) in times.items():
            low, middle, high = np.quantile(wall / wall_dense, [0.25, 0.5, 0.75])
            cpu_ratio = float(np.median(cpu / cpu_dense))
            note = ""
            if "mean" in name:
                note = self.verdict("bar 1.03", middle, 1.03)
            spread = f"{low:.3f}-{high:.3f}"
            print(
                f"{name:26}  {1e3 * np.median(wall):8.1f}  {middle:6.3f}  "
                f"{spread:>13}  {cpu_ratio:6.3f}  {note}".rstrip(),
                flush=True,
            )
            record = {"table": title, "name": name, "ms": 1e3 * float(np.median(wall))}
            record |= {"ratio": float(middle), "low": float(low), "high": float(high)}
            self.records.append(record | {"cpu_ratio": cpu_ratio, "note": note})


class Row(train_step.Row):
    """A row whose transform is the whole optimizer, not the first of a chain."""

    def run(self, x: jax.Array, y: jax.Array, *, timed: bool = True) -> None:
        """Take one step from the row's count."""
        assert self.count is not None
        self.state = at(self.state, self.count)
        count, self.count = self.count, None
        super().run(x, y, timed=timed)
        self.count = count


def methods(params: Any) -> dict[str, tuple[Any, Any]]:
    """Make optimizers with their plans; None: dense."""
    adam = optax.adam(1e-3)
    flat, fan_in = (
        nm.plan(params, pattern, density=nm.uniform(DENSITY))
        for pattern in (nm.Unstructured(), nm.FanIn())
    )
    total = 100 * DELTA_T
    return {
        "dense": (adam, None),
        "rigl": (nm.rigl(adam, flat, total_steps=total, delta_t=DELTA_T), flat),
        "srigl": (nm.srigl(adam, fan_in, total_steps=total, delta_t=DELTA_T), fan_in),
    }


def at(state: Any, count: int) -> Any:
    """Set the step counter of a transform that holds masks."""
    if not hasattr(state, "masks"):
        return state
    return state._replace(count=jnp.array(count, jnp.int32))


def side_of(params: Any) -> str:
    """Name the shape of the kernels."""
    return "x".join(str(n) for n in jax.tree.leaves(params)[0].shape)


def peak_bytes(compiled: Any) -> int:
    """Give what a compiled step holds at once, its arguments included."""
    sizes = compiled.memory_analysis()
    held = sizes.argument_size_in_bytes + sizes.temp_size_in_bytes
    return held + sizes.output_size_in_bytes - sizes.alias_size_in_bytes


def main(argv: Sequence[str] | None = None) -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["leaf", "tree", "step"], help="one table")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--rounds", type=int, default=9, help="of the first table")
    parser.add_argument("--repeats", type=int, default=15, help="of the steps")
    parser.add_argument("--json", metavar="FILE", help="write all results as JSON")
    parser.add_argument("--smoke", action="store_true", help="tiny, for the tests")
    options = parser.parse_args(argv)
    options.scale = "smoke" if options.smoke else "full"
    if options.smoke:
        options.rounds, options.repeats, options.tokens = 2, 2, [8]
    else:
        timing.keep_pages()
    machine = timing.describe()
    for name, value in machine.items():
        print(f"{name}: {value}")
    benchmark = Benchmark(options)
    for name in ("leaf", "tree", "step"):
        if options.only in (None, name):
            getattr(benchmark, name)()
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"machine": machine, "results": benchmark.records}, file, indent=1
            )


if __name__ == "__main__":
    main()
