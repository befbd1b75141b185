"""What the training examples share: a resumable loop, tables, plots, results.

A training run is a pure function of its settings. The batch of a step is computed from
``(seed, step)`` alone, the augmentation and dropout keys too, and everything else the
next step needs is in one state pytree that orbax saves. So a run that was killed and
resumed ends with the same bits as one that was left alone::

    options = common.parser("my example").parse_args()
    state, history = common.train(
        step,                      # jitted: (state, batch) -> (state, metrics)
        state,                     # any pytree of arrays
        batch_at,                  # step index -> batch
        steps=1000,
        run_dir=options.out / "srste-seed0",
        config={"method": "srste", "seed": 0, "steps": 1000},
        resume=options.resume,
    )
"""

import argparse
import functools
import json
import math
import os
import pathlib
import platform
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from tqdm import tqdm

import nmjax as nm
from nmjax import neurons, plans, reports

History = dict[str, list[float]]
Step = Callable[[Any, Any], tuple[Any, Mapping[str, jax.Array]]]

PANELS = ("loss", "flip_rate", "density", "itop", "active_neurons")  # of the plots
LINE_SECONDS = 20.0  # how often a line is printed when the output is no terminal


# Settings ---------------------------------------------------------------------------


def parser(description: str, *, out: str = "runs/example") -> argparse.ArgumentParser:
    """Return an argument parser with the options that every example has.

    Args:
      description: What the example does, one line.
      out: Default of ``--out``.

    Returns:
      A parser with ``--data-dir``, ``--out``, ``--seeds``, ``--resume``, ``--smoke``,
      ``--save-every`` and ``--log-every``. Add the example's own options to it.
    """
    result = argparse.ArgumentParser(
        description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = result.add_argument
    add("--data-dir", type=pathlib.Path, help="folder of the real data")
    add("--out", type=pathlib.Path, default=pathlib.Path(out), help="results folder")
    add("--seeds", type=int, nargs="+", default=[0], help="one run per seed")
    add(
        "--resume",
        action="store_true",
        help="continue from the last checkpoint in --out; without it, runs of the same "
        "name in --out are started afresh and overwritten",
    )
    add("--smoke", action="store_true", help="a few tiny steps, to test the script")
    add("--save-every", type=int, default=500, help="steps between checkpoints")
    add("--log-every", type=int, default=20, help="steps per logged average")
    return result


def key_for(seed: int | jax.Array, *path: int | jax.Array) -> jax.Array:
    """Return the random key of one use, found by folding ``path`` into ``seed``.

    Args:
      seed: Seed of the run.
      path: What the key is for, for example ``(1, step)``. May be traced.

    Returns:
      A typed PRNG key.
    """
    return functools.reduce(jax.random.fold_in, path, jax.random.key(seed))


@functools.lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Return the order in which one epoch visits the examples, ``(size,)``."""
    order = np.random.default_rng([seed, epoch]).permutation(size)
    order.flags.writeable = False  # the cache hands out the same array again
    return order


def batch_indices(seed: int, step: int, size: int, batch_size: int) -> np.ndarray:
    """Return which examples are in the batch of one step.

    An epoch is ``size // batch_size`` steps; the remainder of its order is left out.

    Args:
      seed: Seed of the run.
      step: Step index, from 0.
      size: Number of training examples.
      batch_size: Examples per batch, at most ``size``.

    Returns:
      Indices, shape ``(batch_size,)``.

    Raises:
      ValueError: If the batch is larger than the data set.
    """
    if batch_size > size:
        raise ValueError(
            f"batch_size={batch_size} is larger than the training set of {size} "
            "examples; make the batch smaller or the subset larger"
        )
    epoch, place = divmod(step, size // batch_size)
    start = place * batch_size
    return epoch_order(seed, epoch, size)[start : start + batch_size]


# Checkpoints ------------------------------------------------------------------------


class Checkpoints:
    """Rolling orbax checkpoints of one run: its state and its history.

    They are written in the background, and a save is renamed into place when it is
    complete: a process killed in the middle of one leaves the previous checkpoint as
    the latest. The two newest are kept.
    """

    def __init__(self, directory: pathlib.Path):
        """Open ``directory``, made if missing; half-written saves are removed."""
        options = ocp.CheckpointManagerOptions(
            max_to_keep=2, cleanup_tmp_directories=True
        )
        self._manager = ocp.CheckpointManager(directory.absolute(), options=options)

    def __enter__(self) -> "Checkpoints":
        """Use as a context, so that the last save is finished."""
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the last save."""
        self._manager.close()

    def save(self, step: int, state: Any, history: History) -> None:
        """Start saving; returns once all is copied, before it is on disk."""
        # While orbax is still writing, the next step donates these buffers and the
        # loop appends to these lists.
        state = _copy(state)
        history = {name: list(values) for name, values in history.items()}
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state),  # pyright: ignore[reportCallIssue]
                history=ocp.args.JsonSave(history),  # pyright: ignore[reportCallIssue]
            ),
        )

    def restore(self, like: Any) -> tuple[int, Any, History] | None:
        """Return the latest ``(step, state, history)``, or None if there is none.

        Args:
          like: A freshly initialised state: says structure, shapes, dtypes, devices.
        """
        step = self._manager.latest_step()
        if step is None:
            return None
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        found = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(  # pyright: ignore[reportCallIssue]
                    target
                ),
                history=ocp.args.JsonRestore(),  # pyright: ignore[reportCallIssue]
            ),
        )
        return step, found["state"], found["history"]


@jax.jit
def _copy(tree: Any) -> Any:
    return jax.tree.map(jnp.copy, tree)


def save_model(directory: pathlib.Path, variables: Any) -> None:
    """Write finished variables through orbax, replacing what is there."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory.absolute(), variables, force=True)


def load_model(directory: pathlib.Path, like: Any) -> Any:
    """Read what `save_model` wrote; ``like`` gives structure, shapes and dtypes."""
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(directory.absolute(), target)


def _claim(run_dir: pathlib.Path, config: Mapping[str, Any], resume: bool) -> None:
    """Make ``run_dir`` ready for a run with ``config``, or check that it is its own."""
    path = run_dir / "config.json"
    if resume and path.exists():
        found = json.loads(path.read_text())
        wanted = json.loads(json.dumps(config))
        for name in sorted(found.keys() | wanted.keys()):
            if found.get(name) != wanted.get(name):
                raise ValueError(
                    f"{run_dir} was started with {name}={found.get(name)!r}, now "
                    f"{name}={wanted.get(name)!r}: a resumed run must keep the "
                    "settings of its start; give another --out, or leave --resume out "
                    "to start afresh"
                )
        return
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)
    run_dir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(config, indent=2) + "\n")


# Training ---------------------------------------------------------------------------


class Progress:
    """A progress bar in a terminal; a line now and then anywhere else."""

    def __init__(self, label: str, total: int, initial: int):
        """Start the clock at step ``initial`` of ``total``."""
        self._label, self._total, self._done = label, total, initial
        self._started = self._printed = time.perf_counter()
        self._first = initial
        self._bar = (
            tqdm(total=total, initial=initial, desc=label, dynamic_ncols=True)
            if sys.stderr.isatty()
            else None
        )

    def update(self, steps: int, loss: float) -> None:
        """Advance by ``steps`` and show ``loss``."""
        self._done += steps
        if self._bar is not None:
            self._bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            self._bar.update(steps)
            return
        now = time.perf_counter()
        if now - self._printed < LINE_SECONDS and self._done < self._total:
            return
        self._printed = now
        rate = (self._done - self._first) / (now - self._started)
        left = (self._total - self._done) / rate
        print(
            f"{self._label}: step {self._done}/{self._total}  loss {loss:.4f}  "
            f"{rate:.2f} steps/s  {left:.0f} s left",
            flush=True,
        )

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()


def train(
    step: Step,
    state: Any,
    batch_at: Callable[[int], Any],
    *,
    steps: int,
    run_dir: pathlib.Path,
    config: Mapping[str, Any],
    save_every: int = 500,
    log_every: int = 20,
    resume: bool = False,
    label: str = "",
) -> tuple[Any, History]:
    """Run a jitted step to the end, with checkpoints, progress and a history.

    Args:
      step: ``(state, batch) -> (state, metrics)``; may donate its state. ``metrics`` is
        a flat dict of scalars with a ``"loss"``.
      state: Freshly initialised state, any pytree of arrays.
      batch_at: Batch of a step index; must depend on nothing else.
      steps: Step count at which the run ends.
      run_dir: Folder of this run; gets ``checkpoints/`` and ``config.json``.
      config: All that determines the run, JSON-able. A resumed run must have the same.
      save_every: Steps between checkpoints, rounded up to a multiple of ``log_every``.
      log_every: Steps whose metrics are averaged into one entry of the history.
      resume: Continue from the latest checkpoint if there is one.
      label: Name in the progress display; default is the name of ``run_dir``.

    Returns:
      The final state and the history: ``"step"``, ``"seconds"`` (training time spent so
      far, summed over resumed parts) and every metric, one entry per window.

    Raises:
      ValueError: If ``resume`` finds a run with other settings.
      FloatingPointError: If the loss is no longer finite.
    """
    save_every = math.ceil(save_every / log_every) * log_every
    _claim(run_dir, config, resume)
    history: History = {"step": [], "seconds": []}
    done = 0
    with Checkpoints(run_dir / "checkpoints") as checkpoints:
        if resume and (found := checkpoints.restore(state)) is not None:
            done, state, history = found
        progress = Progress(label or run_dir.name, steps, done)
        spent = history["seconds"][-1] if history["seconds"] else 0.0
        started = time.perf_counter()
        window: list[Mapping[str, jax.Array]] = []
        for index in range(done, steps):
            state, metrics = step(state, batch_at(index))
            window.append(metrics)
            count = index + 1
            if count % log_every and count < steps:
                continue
            means = _means(jax.device_get(window))
            if not math.isfinite(means["loss"]):
                raise FloatingPointError(
                    f"{run_dir.name}: the loss is {means['loss']} in the steps up to "
                    f"{count}; lower the learning rate"
                )
            means |= {"step": count, "seconds": spent + time.perf_counter() - started}
            for name, value in means.items():
                history.setdefault(name, []).append(value)
            progress.update(len(window), means["loss"])
            window = []
            if count % save_every == 0 or count == steps:
                checkpoints.save(count, state, history)
        progress.close()
    return state, history


def _means(window: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    return {name: float(np.mean([m[name] for m in window])) for name in window[0]}


# Results ----------------------------------------------------------------------------


def hardware() -> str:
    """Return what the run is made on, such as ``"2 cores of AMD EPYC, jax 0.10.2"``."""
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    device = jax.devices()[0]
    kind = "" if device.platform == "cpu" else f", {device.device_kind}"
    return f"{cores} core{'s' * (cores != 1)} of {name}{kind}, jax {jax.__version__}"


def mean_std(values: Iterable[float], digits: int = 2) -> str:
    """Return ``"mean +- sample standard deviation"``; of one value, just the value."""
    values = list(values)
    mean = f"{statistics.fmean(values):.{digits}f}"
    if len(values) < 2:
        return mean
    return f"{mean} +- {statistics.stdev(values):.{digits}f}"


def format_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows as an aligned Markdown table, every cell as it prints."""
    return reports.markdown([{k: str(v) for k, v in row.items()} for row in rows])


def nonzero_fraction(params: Any, plan: nm.Plan) -> float:
    """Return the fraction of nonzero weights, of the leaves that the plan prunes."""
    leaves = [
        np.asarray(leaf)
        for leaf, planned in zip(jax.tree.leaves(params), plan.leaves, strict=True)
        if planned.is_sparse
    ]
    return sum(np.count_nonzero(x) for x in leaves) / sum(x.size for x in leaves)


def active_neurons(params: Any, masks: Any, plan: nm.Plan) -> float:
    """Return the fraction of neurons with an input, of the leaves in the plan.

    Without masks, an input is a weight that is not zero.
    """
    if masks is None:
        masks = plans.map_planned(
            lambda _, weights: weights != 0,
            plan,
            params,
            otherwise=lambda _: optax.MaskedNode(),
        )
    return float(neurons.active_share(masks, plan))


def write_results(
    out: pathlib.Path, rows: Sequence[Mapping[str, Any]], **facts: Any
) -> None:
    """Write ``out/results.json``: the rows, the command, the hardware and ``facts``."""
    out.mkdir(parents=True, exist_ok=True)
    results = {
        "command": " ".join(["python", *sys.argv]),
        "hardware": hardware(),
        **facts,
        "rows": list(rows),
    }
    path = out / "results.json"
    path.write_text(json.dumps(results, indent=2, default=str) + "\n")


def save_plot(path: pathlib.Path, histories: Mapping[str, History]) -> None:
    """Save the curves of all runs: one picture of all, and one of each.

    The picture of all, ``path``, shows loss, flip rate and density of the methods side
    by side, seeds averaged. That of one run, ``<method>-seed<seed>.png`` beside it,
    shows the layers.

    Args:
      path: File to write.
      histories: ``"<method> seed <seed>"`` -> history of `train`.
    """
    runs: dict[str, list[list[reports.Row]]] = {}
    for label, history in histories.items():
        names, columns = history.keys(), history.values()
        rows = [
            dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True)
        ]
        runs.setdefault(label.split(" seed ")[0], []).append(rows)
        name = label.replace(" seed ", "-seed") + path.suffix
        panels = [panel for panel in PANELS if any(n.startswith(panel) for n in names)]
        reports.plot_history(rows, path.with_name(name), panels=panels, title=label)
    present = {name for history in histories.values() for name in history}
    panels = [panel for panel in PANELS if panel in present]
    reports.plot_comparison(runs, path, panels=panels)
