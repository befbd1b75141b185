r"""Train residual networks on CIFAR-10, dense and sparse side by side.

Without ``--data-dir`` the data are scikit-learn's 8x8 digits, which need no download.

    python examples/cifar10.py                       # digits, dense and 2:4 SR-STE
    python examples/cifar10.py --method static rigl srigl --sparsity 90 95 99
    python examples/cifar10.py --data-dir data --method dense one_shot ste srste

``--data-dir`` is the folder of the official CIFAR-10 files, in the binary version
(``data_batch_1.bin`` ...) or the Python version (``data_batch_1`` ...), or its parent.
`recipes.py` has the methods, `image_options.py` the options and published recipes. On a
GPU, this is the published comparison of dynamic sparse training, and it goes on where
it was stopped (not run yet):

    python examples/cifar10.py --data-dir data --seeds 0 1 2 3 4 --resume \
        --method dense static set rigl srigl srigl_noablation --sparsity 80 90 95 99

Methods that ``--pattern`` gives the sparsity, 2:4. ``one_shot`` is the dense network of
the same seed, pruned by magnitude after training. Accuracy in %, mean and sample
standard deviation of seeds 0, 1 and 2, on 2 cores of an AMD EPYC with jax 0.10.2:

======== ============== ==============
method   digits         CIFAR-10
======== ============== ==============
dense    98.40 +- 0.11  65.39 +- 0.57
one_shot 57.41 +- 20.97 43.26 +- 5.80
ste      98.09 +- 0.28  64.59 +- 0.35
srste    98.58 +- 0.28  63.78 +- 0.36
======== ============== ==============

Digits: ``--method dense one_shot ste srste --seeds 0 1 2``, seconds per training.
CIFAR-10: the same with ``--data-dir DATA --model resnet10 --width 16 --epochs 2
--batch-size 64 --warmup 0.5``, 5 minutes per training on one core, on images decoded
from JPEG copies. That is a small network and two epochs, not the recipe above; plain
STE is ahead of SR-STE there.

Methods that ``--sparsity`` gives it. Digits, ``--width 32 --seeds 0 1 2 3 4``, 5
seconds per training on one core; the dense network reaches 98.70 +- 0.29:

================ ============= ============= ============= =============
method           80 %          90 %          95 %          99 %
================ ============= ============= ============= =============
static           98.37 +- 0.51 98.04 +- 0.10 97.52 +- 0.52 58.00 +- 2.12
set              98.26 +- 0.38 98.26 +- 0.28 97.78 +- 0.41 65.93 +- 2.19
rigl             98.52 +- 0.23 98.30 +- 0.40 97.96 +- 0.35 85.41 +- 3.54
srigl            98.74 +- 0.27 98.11 +- 0.38 97.44 +- 0.30 67.41 +- 2.78
srigl_noablation 98.74 +- 0.27 98.11 +- 0.38 97.67 +- 0.41 53.44 +- 2.02
gradual          98.33 +- 0.43 98.07 +- 0.55 97.74 +- 0.24 90.19 +- 0.92
================ ============= ============= ============= =============
"""

import functools
from typing import Any

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from image_options import Run, Settings, load, parse, run_config, runs_of
from image_steps import State, make_accuracy, make_sgd, make_step, make_tracker
from images import Data
from recipes import METHODS, Recipe, Task
from resnets import MODELS

import nmjax as nm
from nmjax import reports

# For what runs once or twice: the compiler takes seconds to optimise random bits.
run_once = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


class Trainer:
    """Trains methods on one data set; compiles each once for all seeds."""

    def __init__(self, data: Data, settings: Settings):
        """Make the model."""
        self.data, self.settings = data, settings
        self.model = MODELS[settings.model][1](settings.width)
        self.initialise = run_once(self.initialise)
        self.params = jax.eval_shape(self.initialise, 0)["params"]
        self.accuracy = make_accuracy(self.model, data)
        self.epoch = len(data.labels) // settings.batch_size
        self.steps = self.epoch * settings.epochs
        if self.steps < 1:
            raise ValueError(
                f"{settings.epochs} epochs of {len(data.labels)} images in batches of "
                f"{settings.batch_size} have no step: make --batch-size smaller or "
                "--epochs larger"
            )
        if settings.rewind is None:
            settings.rewind = self.epoch
        self.recipe = functools.cache(self.recipe)
        self.step = functools.cache(self.step)

    def initialise(self, seed: int) -> Any:
        """Return fresh variables."""
        blank = jnp.zeros((1, *self.data.images.shape[1:]))
        return self.model.init(common.key_for(seed, 0), blank, False)

    def recipe(self, run: Run, first: int = 0) -> Recipe:
        """Return how a method trains from a step of the schedule on."""
        sgd = make_sgd(self.settings, self.steps, self.epoch, first)
        sparsity = (run.sparsity or 0.0) / 100
        return METHODS[run.method](
            Task(self.params, self.settings, sparsity, self.steps, sgd)
        )

    def step(self, run: Run, first: int = 0) -> common.Step:
        """Return the jitted step of a method."""
        return make_step(self.model, self.recipe(run, first), self.data)

    def batch_at(self, seed: int, step: int) -> dict[str, Any]:
        """Return the batch of one step."""
        size, batch_size = len(self.data.labels), self.settings.batch_size
        at = common.batch_indices(seed, step, size, batch_size)
        chosen = {"images": self.data.images[at], "labels": self.data.labels[at]}
        return {**chosen, "seed": np.int32(seed), "step": np.int32(step)}

    def train(self, run: Run, seed: int) -> tuple[State, common.History]:
        """Train one network, or finish training it."""
        recipe, variables = self.recipe(run), self.initialise(seed)
        if recipe.rounds:
            return self.find_ticket(run, seed, variables)
        start = run_once(recipe.start)
        params = start(common.key_for(seed, 2), variables["params"])
        return self.fit(run, seed, params, variables["batch_stats"], recipe.optimizer)

    def fit(
        self,
        run: Run,
        seed: int,
        params: Any,
        stats: Any,
        optimizer: optax.GradientTransformation,
        first: int = 0,
        last: int | None = None,
        part: str = "",
    ) -> tuple[State, common.History]:
        """Train from one step of the schedule to another.

        Args:
          run: What is trained.
          seed: Decides the batches.
          params: Params to start from.
          stats: Batch statistics to start from.
          optimizer: Makes the first optimizer state.
          first: Step to begin at.
          last: Step to end at; None: the end of the training.
          part: Folder of this part of a run that has several.

        Returns:
          The state and the history.
        """
        recipe = self.recipe(run, first)
        opt_state = run_once(optimizer.init)(params)
        track = run_once(make_tracker(recipe).init)
        tracked = track(params, recipe.masks(opt_state))
        return common.train(
            self.step(run, first),
            State(params, stats, opt_state, tracked),
            lambda step: self.batch_at(seed, first + step),
            steps=(self.steps if last is None else last) - first,
            run_dir=self.settings.out / f"{run.name}-seed{seed}" / part,
            config=run_config(run, seed, self.data, self.settings) | {"part": part},
            save_every=self.settings.save_every,
            log_every=self.settings.log_every,
            resume=self.settings.resume,
            label=" ".join(f"{run.name} seed {seed} {part}".split()),
        )

    def find_ticket(
        self, run: Run, seed: int, variables: Any
    ) -> tuple[State, common.History]:
        """Train, prune and rewind, as often as the recipe says."""
        first = self.settings.rewind
        recipe = self.recipe(run, first)
        params, stats = variables["params"], variables["batch_stats"]
        if first:
            fit = functools.partial(self.fit, part="early", last=first)
            state, _ = fit(run, seed, params, stats, self.recipe(run).optimizer)
            params, stats = state.params, state.batch_stats
        rewind = run_once(
            functools.partial(nm.rewind, prune=recipe.prune, scope="global")
        )
        sgd = make_sgd(self.settings, self.steps, self.epoch, first)
        early, alive, optimizer = params, recipe.plan, recipe.optimizer
        spent = 0.0

        def train_round(index: int) -> tuple[State, common.History]:
            # Copies: a training donates what it starts from.
            weights, averages = jax.tree.map(jnp.copy, (params, stats))
            part = f"round{index}"
            return self.fit(run, seed, weights, averages, optimizer, first, part=part)

        for index in range(recipe.rounds):
            state, history = train_round(index)
            spent += history["seconds"][-1]
            params, alive = rewind(state.params, early, alive)
            optimizer = nm.static(sgd, recipe.plan, masks=alive)
        state, history = train_round(recipe.rounds)
        return state, {**history, "seconds": [spent + s for s in history["seconds"]]}

    def report(self, run: Run, seed: int, state: State) -> dict[str, Any]:
        """Measure the finished network, in memory and after a trip through orbax."""
        recipe = self.recipe(run)
        trained = {"params": state.params, "batch_stats": state.batch_stats}
        finish, forward = run_once(recipe.finish), run_once(recipe.forward)
        finished = {**trained, "params": finish(state.params, state.opt_state)}
        used = {**trained, "params": forward(state.params, state.opt_state)}
        folder = self.settings.out / f"{run.name}-seed{seed}" / "model"
        common.save_model(folder, finished)
        reloaded = common.load_model(folder, self.initialise(seed))
        return {
            "method": run.method,
            "sparsity": run.sparsity,
            "seed": seed,
            "density": common.nonzero_fraction(reloaded["params"], recipe.plan),
            "active_neurons": 100
            * common.active_neurons(
                reloaded["params"], recipe.masks(state.opt_state), recipe.plan
            ),
            "as_trained": self.accuracy(used),
            "accuracy": self.accuracy(finished),
            "reloaded": self.accuracy(reloaded),
        }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per method: means over the seeds, deviations of accuracies."""
    lines = []
    for run in dict.fromkeys(Run(row["method"], row["sparsity"]) for row in rows):
        of = [row for row in rows if (row["method"], row["sparsity"]) == run]
        column = {name: [row[name] for row in of] for name in of[0]}
        lines.append(
            {
                "method": run.name,
                "seeds": len(of),
                "density": f"{np.mean(column['density']):.2f}",
                "active neurons %": common.mean_std(column["active_neurons"], 1),
                "as trained %": common.mean_std(column["as_trained"]),
                "accuracy %": common.mean_std(column["accuracy"]),
                "reloaded %": common.mean_std(column["reloaded"]),
                "mean flip rate": f"{np.mean(column['flip_rate']):.5f}",
                "train s": f"{np.mean(column['train_seconds']):.0f}",
            }
        )
    return lines


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Train every method with every seed; print, plot and save the results."""
    settings = parse(arguments)
    data = load(settings)
    trainer, runs = Trainer(data, settings), runs_of(settings)
    plans = dict.fromkeys(trainer.recipe(run).plan for run in runs)
    for index, plan in enumerate(plans):
        print(str(plan) if index == 0 else str(plan).splitlines()[-1])
    side = data.images.shape[1]
    print(
        f"\n{data.name}: {len(data.labels)} training and {len(data.test_labels)} test "
        f"images of {side} x {side} pixels, {settings.model} of width "
        f"{settings.width}, {settings.epochs} epochs",
        flush=True,
    )
    rows, histories = [], {}
    for seed in settings.seeds:
        trained: dict[Run, tuple[State, common.History]] = {}
        for run in runs:
            other = trainer.recipe(run).trained_as
            base = run if other is None else Run(other, None)
            if base not in trained:
                trained[base] = trainer.train(base, seed)
            state, history = trained[base]
            histories[f"{base.name} seed {seed}"] = history
            row = trainer.report(run, seed, state)
            row["flip_rate"] = float(np.mean(history["flip_rate"]))
            row["train_seconds"] = history["seconds"][-1]
            rows.append(row)
            print(f"{run.name} seed {seed}: {row['accuracy']:.2f} %", flush=True)
    table = summary(rows)
    print(f"\n{common.format_table(table)}\n{common.hardware()}")
    common.write_results(settings.out, rows, summary=table, settings=vars(settings))
    common.save_plot(settings.out / "training.png", histories)
    if any(run.sparsity is not None for run in runs):
        panels = {"accuracy": "accuracy, %", "active_neurons": "active neurons, %"}
        reports.plot_sweep(rows, settings.out / "sparsity.png", "sparsity", panels)
    print(f"results and plots: {settings.out}")
    return rows


if __name__ == "__main__":
    main()
