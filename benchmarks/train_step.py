"""What does sparse training cost, step for step, beside dense training?

A stack of transformer MLP blocks (RMS norm, 768 -> 3072 -> 768, GELU, residual; 18.9 M
parameters in float32) takes Adam steps on 64, 512 and 2048 tokens:

- dense: the model as it is;
- ste: 2:4 forward with a straight-through gradient, masks recomputed at every step;
- srste: the same with the decay of pruned weights (coupled, before Adam);
- hybrid: the same with the preconditioner of AST in place of Adam;
- transposable: transposable 2:4 masks kept in the optimizer state and recomputed every
  40 steps. Steps with and without that are timed apart and weighed 1 : 39.

Steps of all rows alternate, and ratios are taken within one round, so that a change in
the machine's load meets all rows alike. ``CPU`` is the ratio of CPU seconds over all
threads; it is the steadier one on a machine that others use too.

The script starts itself again with an allocator that keeps its pages: see
`timing.keep_pages`.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --tokens 512 --repeats 40
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import timing

import nmjax as nm

REFRESH = 40
BAR = 1.08


@dataclasses.dataclass
class Row:
    """One way of training, compiled, with its arrays and times.

    Attributes:
      step: ``(params, state, x, y) -> (params, state, loss)``.
      params: dense parameters.
      state: optimizer state.
      count: value that the state's step counter gets before every step; None: as is.
      wall: seconds of each timed step.
      cpu: CPU seconds of each timed step, all threads.
    """

    step: Callable[..., Any]
    params: Any
    state: Any
    count: int | None = None
    wall: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def run(self, x: jax.Array, y: jax.Array, *, timed: bool = True) -> None:
        """Take one step."""
        if self.count is not None:
            first = self.state[0]._replace(count=jnp.array(self.count, jnp.int32))
            self.state = (first, *self.state[1:])
        jax.block_until_ready((self.params, self.state))
        wall, cpu = time.perf_counter(), time.process_time()
        out = self.step(self.params, self.state, x, y)
        jax.block_until_ready(out)
        if timed:
            self.wall.append(time.perf_counter() - wall)
            self.cpu.append(time.process_time() - cpu)
        self.params, self.state, _ = out


def init(key: jax.Array, blocks: int, width: int, hidden: int) -> dict[str, Any]:
    """Make the parameters of the stack."""
    params = {}
    for i, block in enumerate(jax.random.split(key, blocks)):
        up, down = jax.random.split(block)
        params[f"block_{i}"] = {
            "up": {"kernel": jax.random.normal(up, (width, hidden)) * width**-0.5},
            "down": {"kernel": jax.random.normal(down, (hidden, width)) * hidden**-0.5},
        }
    return params


def apply(params: dict[str, Any], x: jax.Array) -> jax.Array:
    """Run the stack."""
    for block in params.values():
        norm = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-6)
        x = x + jax.nn.gelu(norm @ block["up"]["kernel"]) @ block["down"]["kernel"]
    return x


def make_rows(params: dict[str, Any], x: jax.Array, y: jax.Array) -> dict[str, Row]:
    """Compile every way of training."""
    plan = nm.plan(params, nm.NM(2, 4))
    both = nm.plan(params, nm.TransposableNM(2, 4))
    adam = optax.adam(1e-3)

    def sparse(params, state):
        return nm.sparsify(params, plan)

    ways = {
        "dense": (adam, lambda params, state: params),
        "ste": (adam, sparse),
        "srste": (optax.chain(nm.srste(plan), adam), sparse),
        "hybrid": (
            optax.chain(
                nm.srste(plan, mode="hybrid"), optax.scale_by_learning_rate(1e-3)
            ),
            sparse,
        ),
        "transposable": (
            optax.chain(nm.srste(both, refresh=REFRESH), adam),
            lambda params, state: nm.sparsify(params, nm.masks(state)),
        ),
    }
    rows = {}
    for name, (tx, forward) in ways.items():
        own = jax.tree.map(jnp.copy, params)
        start = time.perf_counter()
        state = jax.jit(tx.init)(own)
        step = make_step(tx, forward).lower(own, state, x, y).compile()
        print(f"  {name:24s} compiled in {time.perf_counter() - start:5.1f} s")
        if name == "transposable":
            other = jax.tree.map(jnp.copy, (own, state))
            rows["transposable, refreshed"] = Row(step, *other, count=REFRESH - 1)
            rows["transposable, kept"] = Row(step, own, state, count=0)
        else:
            rows[name] = Row(step, own, state)
    return rows


def make_step(tx: Any, forward: Callable[..., Any]) -> Any:
    """Jit a training step that donates params and state."""

    def step(params, state, x, y):
        def loss_of(params):
            return ((apply(forward(params, state), x) - y) ** 2).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    return jax.jit(step, donate_argnums=(0, 1))


def measure(rows: dict[str, Row], x: jax.Array, y: jax.Array, repeats: int) -> None:
    """Time the rows in rounds, each round in another order."""
    names = list(rows)
    for name in names:
        rows[name].run(x, y, timed=False)
    for i in range(repeats):
        first = i % len(names)
        for name in names[first:] + names[:first]:
            rows[name].run(x, y)


def summary(rows: dict[str, Row]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Gather wall and CPU times, with the weighted transposable row."""
    times = {name: (np.array(r.wall), np.array(r.cpu)) for name, r in rows.items()}
    kept, new = times["transposable, kept"], times["transposable, refreshed"]
    mean = tuple(
        (k * (REFRESH - 1) + n) / REFRESH for k, n in zip(kept, new, strict=True)
    )
    times[f"transposable, mean of {REFRESH}"] = (mean[0], mean[1])
    return times


def report(tokens: int, rows: dict[str, Row]) -> float:
    """Print the table of one batch size; give the wall ratio of SR-STE."""
    times = summary(rows)
    dense_wall, dense_cpu = times["dense"]
    print(f"\n{tokens} tokens, {len(dense_wall)} rounds")
    print(f"  {'':26s} {'ms':>8s} {'ratio':>6s}  {'quartiles':13s} {'CPU':>6s}")
    for name, (wall, cpu) in times.items():
        ratio = wall / dense_wall
        low, middle, high = np.quantile(ratio, [0.25, 0.5, 0.75])
        spread = f"{low:.3f}-{high:.3f}"
        print(
            f"  {name:26s} {1e3 * np.median(wall):8.1f} {middle:6.3f}  {spread:13s} "
            f"{np.median(cpu / dense_cpu):6.3f}"
        )
    return float(np.median(times["srste"][0] / dense_wall))


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description="the cost of a sparse training step")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64, 512, 2048])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--smoke", action="store_true", help="tiny, for the tests")
    arguments = parser.parse_args(argv)
    blocks, width, hidden = (1, 16, 32) if arguments.smoke else (4, 768, 3072)
    if arguments.smoke:
        arguments.tokens, arguments.repeats = [8], 2
    else:
        timing.keep_pages()
    for name, value in timing.describe().items():
        print(f"{name}: {value}")
    params = init(jax.random.key(0), blocks, width, hidden)
    print(f"{sum(p.size for p in jax.tree.leaves(params)):,} parameters")

    for tokens in arguments.tokens:
        keys = jax.random.split(jax.random.key(tokens))
        x, y = (jax.random.normal(key, (tokens, width)) for key in keys)
        rows = make_rows(params, x, y)
        measure(rows, x, y, arguments.repeats)
        ratio = report(tokens, rows)
        if tokens >= 512:
            verdict = "met" if ratio <= BAR else "missed"
            print(f"  bar: srste at most {BAR} x dense from 512 tokens on: {verdict}")


if __name__ == "__main__":
    main()
