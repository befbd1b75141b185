"""Train small models sparse, compress them, and compare with their dense weights.

A convolutional network and a vision transformer on scikit-learn's digits and an
encoder-decoder transformer on made-up dates, in flax linen and in flax nnx. The models
(`linen_models.py`, `nnx_models.py`, `translation.py`) know nothing of sparsity. Every
one is trained with 2:4 weights (SR-STE) and with a constant fan-in of a tenth of the
inputs (SRigL); the first and the last layer stay dense. Then

- the params are compressed and saved through orbax, with the dense ones beside them,
- they are read back, and both must give the same answers: all classes and all greedily
  decoded tokens equal, and logits that differ by at most 1e-4 of the largest,
- both are timed in alternation with batches of several sizes.

    python examples/compress.py                      # all of it
    python examples/compress.py --model vit --library linen --method srste
    python examples/compress.py --data-dir data --model vit

``--data-dir`` has CIFAR-10 for the classifiers (see `cifar10.py`) and Multi30k for the
translator (see `translation.py`). `serve.py` serves what this leaves in ``--out``.

A time is that of a whole answer: the forward pass of a batch, or greedy decoding, which
runs the decoder over all places in every step. Ratios are compressed to dense, so
above 1 the compressed weights are SLOWER. Small models answer in less than a
millisecond: measure yours (``--width``). ``--resume`` measures finished runs again.

Result, seed 0: accuracy in % on digits and BLEU on dates, and bytes of all params.
Compressed weights gave the same answer to every test input; logits differed by less
than 1e-6 of the largest.

================= =============== =============== ================
model             dense           2:4, SR-STE     fan-in of a tenth
================= =============== =============== ================
cnn, linen / nnx  98.15 / 99.44   98.70 / 99.07   96.67 / 96.30
vit               95.56 / 95.37   95.00 / 93.52   89.26 / 89.26
translator        100 / 100       100 / 100       100 / 100
cnn, kB           150             82              26
vit, kB           408             224             66
translator, kB    2,007           1,147           415
================= =============== =============== ================

Images or decoded tokens per second in linen, and how many times as long compressed
weights take as dense ones (nnx: the same within 0.2, but for the cnn with a fan-in of
a tenth, 1.1 for one image, and the translator, 1.5 and 0.9 for one sentence). Such
small layers gain from few weights and large batches only; SLOWER is above 1:

============ ===== ======= ============== ====================
model        batch dense   2:4, SR-STE    fan-in of a tenth
============ ===== ======= ============== ====================
cnn          1     14,914  10,666, 1.40   9,066, 1.60
cnn          64    142,465 121,370, 1.18  133,452, 1.07
vit          1     8,113   4,063, 2.03    6,850, 1.12
vit          64    46,451  39,385, 1.20   60,583, 0.72
translator   1     8,149   7,302, 1.12    11,324, 0.73
translator   8     10,160  10,900, 0.94   18,463, 0.54
translator   64    13,416  11,113, 1.21   19,179, 0.70
============ ===== ======= ============== ====================

On disk it is another matter: orbax zips what it writes. A dense checkpoint of 2:4
weights, half of them zeros, is about as small as the compressed one (vit: 280 and
264 kB, 413 without zeros), and one of SRigL's is smaller (104 and 127 kB; each array of
a compressed leaf has its own overhead). What stays small is what is loaded: bytes in
memory are those of the table. ``--dtype int8`` halves the files too (vit, 2:4: 81 kB in
memory, 136 on disk) and is not exact: 99.6 to 100 % of the answers are the same.

Time: 3.5 minutes for all of one library, of which 21 to 28 seconds a training of the
translator; 2 cores of an AMD EPYC, jax 0.10.2.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import checkpoints
import clients
import common
import jax
import numpy as np
import optax
from client_data import SIZES, Job, Work, load_work, make_recipe
from clients import Client, Variables
from recipes import Recipe

import nmjax as nm
from nmjax import formats

TOLERANCE = 1e-4  # of logits, as a fraction of the largest

# Training ---------------------------------------------------------------------------


def make_step(client: Client, recipe: Recipe) -> common.Step:
    """Return the jitted step: ``(state, (batch, key)) -> (state, metrics)``."""

    def loss_fn(params: Any, state: Any, batch: Any, key: jax.Array) -> Any:
        used = recipe.forward(params, state["opt"])
        return client.loss(Variables(used, state["rest"]), batch, key)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any, batch_and_key: Any) -> tuple[Any, dict[str, jax.Array]]:
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, rest), grads = grad_fn(state["params"], state, *batch_and_key)
        updates, opt = recipe.optimizer.update(grads, state["opt"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        return {"params": params, "rest": rest, "opt": opt}, {"loss": loss}

    return step


class Finished(NamedTuple):
    """A trained network: exactly sparse, and compressed unless it is dense."""

    dense: Variables
    compressed: Variables | None
    plan: nm.Plan
    history: common.History


def train(
    job: Job, work: Work, client: Client, options: argparse.Namespace
) -> Finished:
    """Train one network, or finish training it, and compress it."""
    shapes, _ = jax.eval_shape(client.network.init, jax.random.key(0))
    steps = work.epochs * work.per_epoch
    recipe = make_recipe(job.method, shapes, client.dense, steps, options)

    @jax.jit
    def start(key: jax.Array) -> Any:
        params, rest = client.network.init(key)
        params = recipe.start(jax.random.fold_in(key, 2), params)
        return {"params": params, "rest": rest, "opt": recipe.optimizer.init(params)}

    names = ("decay", "delta_t", "gamma_sal", "log_every")
    chosen = {name: getattr(options, name) for name in names}
    state, history = common.train(
        make_step(client, recipe),
        start(common.key_for(job.seed, 0)),
        work.batches(job.seed),
        steps=steps,
        run_dir=options.out / job.name,
        config={**job._asdict(), **client.facts, **chosen, "epochs": work.epochs},
        save_every=options.save_every,
        log_every=options.log_every,
        resume=options.resume,
        label=job.name,
    )
    params = jax.jit(recipe.finish)(state["params"], state["opt"])
    dense, compressed = Variables(params, state["rest"]), None
    if job.method != "dense":
        masks = recipe.masks(state["opt"])
        small = nm.compress(params, recipe.plan, masks=masks, dtype=options.dtype)
        compressed = Variables(small, state["rest"])
    return Finished(dense, compressed, recipe.plan, history)


# Dense beside compressed ------------------------------------------------------------


def interleaved(
    functions: Mapping[str, Callable[[], Any]], rounds: int, target: float = 0.02
) -> dict[str, list[float]]:
    """Time functions in turns, so that a change in the machine's load meets them all.

    Args:
      functions: What to time, by name; called before, to compile and to warm up.
      rounds: Times to measure each.
      target: Seconds of a measurement: fast functions are called more than once in it.

    Returns:
      Mean seconds of a call, one for every round, by name.
    """

    def measure(name: str, calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            jax.block_until_ready(functions[name]())
        return (time.perf_counter() - started) / calls

    for name in functions:
        measure(name, 1)
    calls = {name: max(1, round(target / measure(name, 2))) for name in functions}
    turns = [
        {name: measure(name, calls[name]) for name in functions} for _ in range(rounds)
    ]
    return {name: [turn[name] for turn in turns] for name in functions}


def compare_times(
    client: Client,
    answer: Callable[..., jax.Array],
    dense: Variables,
    compressed: Variables,
    items: Sequence[Any],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """Time dense and compressed weights; return a row for every size of batches."""
    rows = []
    for batch in options.batches:
        some = [items[index % len(items)] for index in range(batch)]
        inputs = jax.numpy.asarray(client.inputs(some, batch))
        functions = {
            "dense": functools.partial(answer, dense, inputs),
            "compressed": functools.partial(answer, compressed, inputs),
        }
        seconds = interleaved(functions, options.rounds)
        units = client.count(np.asarray(functions["compressed"]()))
        both = zip(seconds["compressed"], seconds["dense"], strict=True)
        ratios = [slow / fast for slow, fast in both]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        row: dict[str, Any] = {"batch": batch, "unit": client.unit}
        for name, times in seconds.items():
            row[f"{name} per s"] = units / statistics.median(times)
        rows.append(row | {"ratio": middle, "low": low, "high": high})
    return rows


class Agreement(NamedTuple):
    """How compressed weights answer beside dense ones.

    Attributes:
      equal: Part of the inputs with the same answer, all tokens of it.
      difference: Largest difference of logits, as a fraction of the largest logit.
    """

    equal: float
    difference: float


def agreement(
    client: Client,
    answer: Callable[..., jax.Array],
    dense: Variables,
    compressed: Variables,
    items: Sequence[Any],
) -> Agreement:
    """Answer the same items with both weights.

    Args:
      client: The client.
      answer: Its jitted answer.
      dense: Dense variables.
      compressed: Compressed variables.
      items: What to answer.

    Returns:
      How far they agree.
    """
    inputs = client.inputs(items, len(items))
    first, second = (np.asarray(answer(v, inputs)) for v in (dense, compressed))
    equal = (first == second).reshape(len(items), -1).all(1)
    logits = jax.jit(client.logits)
    first, second = (np.asarray(logits(v, inputs)) for v in (dense, compressed))
    difference = np.abs(first - second).max() / np.abs(first).max()
    return Agreement(float(equal.mean()), float(difference))


def check(found: Agreement) -> None:
    """Raise ValueError unless answers are equal and logits within `TOLERANCE`."""
    if found.equal < 1.0:
        raise ValueError(
            f"compressed weights answer otherwise to {1 - found.equal:.1%} of the "
            "inputs"
        )
    if not found.difference <= TOLERANCE:
        raise ValueError(
            f"logits of compressed weights differ by {found.difference:.2e} of the "
            f"largest logit, more than {TOLERANCE:.0e}"
        )


def report(
    job: Job,
    work: Work,
    client: Client,
    run: Finished,
    options: argparse.Namespace,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Save a network, read it back, and measure it.

    Returns:
      A row about the network and rows of timings.
    """
    folder = options.out / job.name / "model"
    clients.save(folder, client, run.dense, run.compressed, work.items[:64])
    client, _ = clients.load(folder)
    dense = clients.load_variables(folder / "dense", client)
    answer = jax.jit(client.answer)
    inputs = client.inputs(work.items, len(work.items))
    answers = client.outputs(np.asarray(answer(dense, inputs)))
    row: dict[str, Any] = {
        **job._asdict(),
        work.metric: work.score(answers),
        "dense bytes": formats.sizes(dense.params)[-1]["bytes"],
        "dense on disk": checkpoints.size(folder / "dense"),
        "train s": run.history["seconds"][-1] if run.history["seconds"] else 0.0,
    }
    if run.compressed is None:
        return row, []
    compressed = clients.load_variables(folder / "compressed", client)
    row["density"] = common.nonzero_fraction(run.dense.params, run.plan)
    found = agreement(client, answer, dense, compressed, work.items)
    if options.dtype is None:  # integers are not exact
        check(found)
    row["equal answers %"] = 100 * found.equal
    row["difference"] = found.difference
    row["bytes"] = formats.sizes(compressed.params)[-1]["bytes"]
    row["on disk"] = checkpoints.size(folder / "compressed")
    times = compare_times(client, answer, dense, compressed, work.items, options)
    return row, [{**job._asdict(), **time} for time in times]


def show(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row as it is printed."""
    cells: dict[str, Any] = {}
    for name, value in row.items():
        if "bytes" in name or "disk" in name:
            cells[name.replace("bytes", "kB").replace("disk", "disk kB")] = (
                f"{value / 1000:,.0f}"
            )
        elif name == "difference":
            cells[name] = f"{value:.0e}"
        elif name.endswith("per s"):
            cells[name] = f"{value:,.0f}"
        elif name == "ratio":
            cells["time ratio (quartiles)"] = (
                f"{value:.2f} ({row['low']:.2f}-{row['high']:.2f})"
            )
        elif name not in ("low", "high", "seed"):
            cells[name] = f"{value:.2f}" if isinstance(value, float) else value
    return cells


# The script -------------------------------------------------------------------------


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = common.parser("Train sparse, compress, compare.", out="runs/compress")
    add = parser.add_argument
    models, methods = list(clients.MODELS), ["dense", "srste", "srigl"]
    add("--model", nargs="+", choices=models, default=models)
    libraries = list(clients.LIBRARIES)
    add("--library", nargs="+", choices=libraries, default=libraries)
    add("--method", nargs="+", choices=methods, default=methods)
    for name in SIZES["cnn"] | SIZES["vit"] | SIZES["translator"]:
        add(f"--{name}", type=int, help="default: by model and data")
    add("--dropout", type=float, default=0.1, help="of the translator")
    add("--lr", type=float, default=3e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=1e-4)
    add("--decay", type=float, default=2e-4, help="SR-STE's pull on pruned weights")
    add("--density", type=float, default=0.1, help="part of inputs that SRigL keeps")
    add("--delta-t", type=int, default=20, help="steps between changes of SRigL")
    add("--gamma-sal", type=float, default=0.3, help="SRigL's ablation threshold")
    add("--dtype", choices=["int8"], help="store values with scales, not exact")
    add("--batches", type=int, nargs="+", default=[1, 8, 64], help="sizes to time")
    add("--rounds", type=int, default=15, help="timings of each")
    options = parser.parse_args(arguments)
    if options.smoke:
        small = {"width": 8, "heads": 2, "layers": 1, "epochs": 1, "vocabulary": 100}
        small |= {"delta_t": 2, "log_every": 2, "rounds": 2, "batches": [1, 2]}
        vars(options).update(small)
    return options


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train, compress, check and time every network; return a row for each."""
    options = parse(arguments)
    rows, times, histories = [], [], {}
    for model in options.model:
        work = load_work(model, options)
        for library in options.library:
            client = clients.build({**work.facts, "library": library})
            for method in options.method:
                for seed in options.seeds:
                    job = Job(model, library, method, seed)
                    run = train(job, work, client, options)
                    row, timings = report(job, work, client, run, options)
                    rows.append(row)
                    times += timings
                    histories[f"{model}-{library}-{method} seed {seed}"] = run.history
                    print(f"{job.name}: {work.metric} {row[work.metric]:.2f}")
    for table in (rows, times):
        columns = dict.fromkeys(name for row in table for name in row)
        shown = [show({c: row[c] for c in columns if c in row}) for row in table]
        if shown:
            print("\n" + common.format_table(shown))
    print(f"{common.hardware()}")
    common.write_results(options.out, rows, times=times, options=vars(options))
    common.save_plot(options.out / "training.png", histories)
    print(f"results, plots and checkpoints: {options.out}")
    return rows


if __name__ == "__main__":
    main()
