"""Train residual networks on CIFAR-10, dense and N:M sparse side by side.

Without ``--data-dir`` the data are scikit-learn's 8x8 digits, which need no download.

    python examples/cifar10.py                       # digits, dense and 2:4 SR-STE
    python examples/cifar10.py --data-dir data --method dense one_shot ste srste

``--data-dir`` is the folder of the official CIFAR-10 files, in the binary version
(``data_batch_1.bin`` ...) or the Python version (``data_batch_1`` ...), or its parent.
The recipe is the usual one of CIFAR-10: batches of 128, SGD with Nesterov momentum 0.9,
weight decay 5e-4, a cosine schedule from a learning rate of 0.1, random crops of the
image padded by 4, random flips.

``one_shot`` is the dense network of the same seed, pruned by magnitude after training.

Results, accuracy in %, mean and sample standard deviation of seeds 0, 1 and 2, on 2
cores of an AMD EPYC with jax 0.10.2:

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

To add a method, write a function like `srste` below and name it in `METHODS`.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from images import Data, augment, load_cifar10, load_digits
from resnets import MODELS, ResNet

import nmjax as nm

# Methods ----------------------------------------------------------------------------


class Recipe(NamedTuple):
    """How a method trains, and what network comes out.

    Attributes:
      optimizer: The whole optax chain.
      forward: ``(params, opt_state)`` -> the params that a training step computes with.
      finish: ``(params, opt_state)`` -> the params of the finished network.
      trained_as: The method whose runs it takes over; None: it is trained itself.
      sparse: Whether ``forward`` is sparse, so that its masks are worth logging.
    """

    optimizer: optax.GradientTransformation
    forward: Callable[[Any, Any], Any] = lambda params, _: params
    finish: Callable[[Any, Any], Any] = lambda params, _: params
    trained_as: str | None = None
    sparse: bool = True


Settings = argparse.Namespace
Method = Callable[[nm.Plan, optax.GradientTransformation, Settings], Recipe]


def dense(plan: nm.Plan, sgd: optax.GradientTransformation, _: Settings) -> Recipe:
    """Train all weights."""
    return Recipe(sgd, sparse=False)


def one_shot(plan: nm.Plan, sgd: optax.GradientTransformation, _: Settings) -> Recipe:
    """Train all weights, then prune by magnitude and do not train again."""
    return Recipe(
        sgd,
        finish=lambda params, _: nm.project(params, plan),
        trained_as="dense",
        sparse=False,
    )


def ste(plan: nm.Plan, sgd: optax.GradientTransformation, _: Settings) -> Recipe:
    """Train through the mask with straight-through gradients."""
    return Recipe(
        sgd,
        forward=lambda params, _: nm.sparsify(params, plan),
        finish=lambda params, _: nm.project(params, plan),
    )


def srste(
    plan: nm.Plan, sgd: optax.GradientTransformation, settings: Settings
) -> Recipe:
    """Train through the mask and let pruned weights decay (SR-STE)."""
    chain = optax.chain(nm.srste(plan, decay=settings.decay), sgd)
    return ste(plan, sgd, settings)._replace(optimizer=chain)


METHODS: dict[str, Method] = {
    "dense": dense,
    "one_shot": one_shot,
    "ste": ste,
    "srste": srste,
}


# Training ---------------------------------------------------------------------------


class State(NamedTuple):
    """All that a step needs from the one before."""

    params: Any
    batch_stats: Any
    opt_state: Any
    tracker: Any


def make_sgd(
    settings: Settings, steps: int, epoch: int
) -> optax.GradientTransformation:
    """Return SGD with weight decay, Nesterov momentum and a cosine schedule.

    Args:
      settings: The peak learning rate, the weight decay and the epochs of warm-up.
      steps: Length of the training.
      epoch: Steps per epoch.

    Returns:
      A chain to which methods add their stages.
    """
    warmup = round(settings.warmup * epoch)

    def schedule(count: Any) -> jax.Array:
        step = jnp.asarray(count).astype(jnp.float32)
        linear = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        part = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        return settings.lr * linear * 0.5 * (1 + jnp.cos(jnp.pi * part))

    return optax.chain(
        optax.add_decayed_weights(settings.weight_decay),
        optax.sgd(schedule, momentum=0.9, nesterov=True),
    )


def make_normalize(data: Data) -> Callable[[jax.Array], jax.Array]:
    """Return the map from uint8 images to floats of mean 0 and variance 1."""
    axes = (0, 1, 2)
    mean = data.images.mean(axes, dtype=np.float64).astype(np.float32)
    deviation = data.images.std(axes, dtype=np.float64).astype(np.float32)
    return lambda images: (images.astype(jnp.float32) - mean) / deviation


def make_step(model: ResNet, recipe: Recipe, plan: nm.Plan, data: Data) -> common.Step:
    """Return the jitted training step."""
    normalize, tracker = make_normalize(data), nm.tracker(plan)

    def loss_fn(params: Any, state: State, images: jax.Array, labels: jax.Array) -> Any:
        used = recipe.forward(params, state.opt_state)
        variables = {"params": used, "batch_stats": state.batch_stats}
        logits, updated = model.apply(variables, images, True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), updated["batch_stats"]

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: State, batch: dict[str, jax.Array]) -> tuple[State, dict[str, Any]]:
        key = common.key_for(batch["seed"], 1, batch["step"])
        images = normalize(augment(batch["images"], key, data.pad, data.flip))
        grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
        (loss, stats), grads = grad_fn(state.params, state, images, batch["labels"])
        updates, opt_state = recipe.optimizer.update(
            grads, state.opt_state, state.params
        )
        params = optax.apply_updates(state.params, updates)
        metrics, tracked = tracker.update(params, state.tracker)
        if not recipe.sparse:  # only how its masks would flip, for comparison
            metrics = {k: v for k, v in metrics.items() if k.startswith("flip_rate")}
        return State(params, stats, opt_state, tracked), {"loss": loss, **metrics}

    return step


def make_accuracy(model: ResNet, data: Data) -> Callable[[Any], float]:
    """Return a function from variables to the accuracy on the test images, in %."""
    normalize = make_normalize(data)

    @jax.jit
    def count(variables: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        logits = jnp.asarray(model.apply(variables, normalize(images), False))
        return (jnp.argmax(logits, -1) == labels).sum()

    def accuracy(variables: Any) -> float:
        size = len(data.test_labels)
        correct = sum(
            int(count(variables, data.test_images[at], data.test_labels[at]))
            for at in (slice(i, i + 500) for i in range(0, size, 500))
        )
        return 100.0 * correct / size

    return accuracy


# The script -------------------------------------------------------------------------

DEFAULTS = {  # of the options that are not given
    "cifar10": {"model": "resnet18", "epochs": 200, "batch_size": 128, "width": None},
    "digits": {"model": "resnet6", "epochs": 30, "batch_size": 64, "width": 16},
}
SMOKE = {"model": "resnet6", "epochs": 1, "batch_size": 8, "width": 8, "subset": 64}


def parse_pattern(text: str) -> nm.NM:
    """Read a pattern such as ``2:4``."""
    try:
        n, m = map(int, text.split(":"))
        return nm.NM(n, m)
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no pattern N:M with 1 <= N <= M, such as 2:4: N of every M "
            "weights are kept"
        ) from error


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the command line."""
    parser = common.parser("Residual networks, dense and N:M.", out="runs/cifar10")
    add = parser.add_argument
    add("--method", nargs="+", choices=METHODS, default=["dense", "srste"])
    add("--pattern", type=parse_pattern, default="2:4", help="N of every M are kept")
    add("--decay", type=float, default=2e-4, help="SR-STE's pull on pruned weights")
    add("--model", choices=MODELS, help="default: resnet18; digits: resnet6")
    add(
        "--width", type=int, help="channels of the stem; default: the usual; digits: 16"
    )
    add("--epochs", type=int, help="default: 200; digits: 30")
    add("--batch-size", type=int, help="default: 128; digits: 64")
    add("--lr", type=float, default=0.1, help="peak of the cosine schedule")
    add("--warmup", type=float, default=0.0, help="epochs of linear warm-up")
    add("--weight-decay", type=float, default=5e-4, help="of all parameters")
    add("--subset", type=int, help="train on so many images, the same for all seeds")
    settings = parser.parse_args(arguments)
    name = "digits" if settings.data_dir is None else "cifar10"
    defaults = DEFAULTS[name]
    if settings.smoke:
        defaults = SMOKE
        vars(settings).update(save_every=4, log_every=2)
    for option, value in defaults.items():
        if getattr(settings, option) is None:
            setattr(settings, option, value)
    if settings.width is None:
        settings.width = MODELS[settings.model][0]
    return settings


def load(settings: Settings) -> Data:
    """Load the data that the settings ask for."""
    data = load_cifar10(settings.data_dir) if settings.data_dir else load_digits()
    size = len(data.labels)
    if settings.subset is not None:
        if not 0 < settings.subset <= size:
            raise ValueError(f"--subset {settings.subset} must be in [1, {size}]")
        chosen = np.random.default_rng(0).permutation(size)[: settings.subset]
        data = data._replace(images=data.images[chosen], labels=data.labels[chosen])
    if settings.smoke:
        data = data._replace(
            test_images=data.test_images[:100], test_labels=data.test_labels[:100]
        )
    return data


def run_config(
    method: str, seed: int, data: Data, settings: Settings
) -> dict[str, Any]:
    """Return all that determines a run, for the check when it is resumed."""
    names = ["model", "width", "epochs", "batch_size", "lr", "warmup", "weight_decay"]
    names += ["log_every"] + (["decay"] if method == "srste" else [])
    config = {name: getattr(settings, name) for name in names}
    facts = {"method": method, "seed": seed, "pattern": str(settings.pattern)}
    return {**facts, "data": data.name, "images": len(data.labels), **config}


# For what runs once or twice: the compiler takes seconds to optimise random bits.
run_once = functools.partial(
    jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


class Trainer:
    """Trains methods on one data set; compiles each once for all seeds."""

    def __init__(self, data: Data, settings: Settings):
        """Make the model and the plan."""
        self.data, self.settings = data, settings
        self.model = MODELS[settings.model][1](settings.width)
        self.initialise = run_once(self.initialise)
        abstract = jax.eval_shape(self.initialise, 0)
        self.plan = nm.plan(abstract["params"], settings.pattern, skip="head")
        self.accuracy = make_accuracy(self.model, data)
        self.epoch = len(data.labels) // settings.batch_size
        self.steps = self.epoch * settings.epochs
        if self.steps < 1:
            raise ValueError(
                f"{settings.epochs} epochs of {len(data.labels)} images in batches of "
                f"{settings.batch_size} have no step: make --batch-size smaller or "
                "--epochs larger"
            )
        self.compiled: dict[str, common.Step] = {}

    def initialise(self, seed: int) -> Any:
        """Return fresh variables."""
        blank = jnp.zeros((1, *self.data.images.shape[1:]))
        return self.model.init(common.key_for(seed, 0), blank, False)

    def recipe(self, method: str) -> Recipe:
        """Return how a method trains."""
        sgd = make_sgd(self.settings, self.steps, self.epoch)
        return METHODS[method](self.plan, sgd, self.settings)

    def batch_at(self, seed: int, step: int) -> dict[str, Any]:
        """Return the batch of one step."""
        size, batch_size = len(self.data.labels), self.settings.batch_size
        at = common.batch_indices(seed, step, size, batch_size)
        chosen = {"images": self.data.images[at], "labels": self.data.labels[at]}
        return {**chosen, "seed": np.int32(seed), "step": np.int32(step)}

    def train(self, method: str, seed: int) -> tuple[State, common.History]:
        """Train one network, or finish training it."""
        recipe = self.recipe(method)
        if method not in self.compiled:
            step = make_step(self.model, recipe, self.plan, self.data)
            self.compiled[method] = step

        variables = self.initialise(seed)
        params, stats = variables["params"], variables["batch_stats"]
        opt_state = run_once(recipe.optimizer.init)(params)
        tracked = run_once(nm.tracker(self.plan).init)(params)
        return common.train(
            self.compiled[method],
            State(params, stats, opt_state, tracked),
            functools.partial(self.batch_at, seed),
            steps=self.steps,
            run_dir=self.settings.out / f"{method}-seed{seed}",
            config=run_config(method, seed, self.data, self.settings),
            save_every=self.settings.save_every,
            log_every=self.settings.log_every,
            resume=self.settings.resume,
            label=f"{method} seed {seed}",
        )

    def report(self, method: str, seed: int, state: State) -> dict[str, Any]:
        """Measure the finished network, in memory and after a trip through orbax."""
        recipe = self.recipe(method)
        trained = {"params": state.params, "batch_stats": state.batch_stats}
        finish, forward = run_once(recipe.finish), run_once(recipe.forward)
        finished = {**trained, "params": finish(state.params, state.opt_state)}
        used = {**trained, "params": forward(state.params, state.opt_state)}
        folder = self.settings.out / f"{method}-seed{seed}" / "model"
        common.save_model(folder, finished)
        reloaded = common.load_model(folder, self.initialise(seed))
        return {
            "method": method,
            "seed": seed,
            "density": common.nonzero_fraction(reloaded["params"], self.plan),
            "as_trained": self.accuracy(used),
            "accuracy": self.accuracy(finished),
            "reloaded": self.accuracy(reloaded),
        }


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one line per method: means over the seeds, deviations of accuracies."""
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        of = [row for row in rows if row["method"] == method]
        column = {name: [row[name] for row in of] for name in of[0]}
        lines.append(
            {
                "method": method,
                "seeds": len(of),
                "density": f"{np.mean(column['density']):.2f}",
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
    trainer = Trainer(data, settings)
    print(f"{trainer.plan}\n")
    print(
        f"{data.name}: {len(data.labels)} training and {len(data.test_labels)} test "
        f"images, {settings.model} of width {settings.width}, {settings.epochs} epochs",
        flush=True,
    )
    rows, histories = [], {}
    for seed in settings.seeds:
        trained: dict[str, tuple[State, common.History]] = {}
        for method in settings.method:
            base = trainer.recipe(method).trained_as or method
            if base not in trained:
                trained[base] = trainer.train(base, seed)
            state, history = trained[base]
            histories[f"{base} seed {seed}"] = history
            row = trainer.report(method, seed, state)
            row["flip_rate"] = float(np.mean(history["flip_rate"]))
            row["train_seconds"] = history["seconds"][-1]
            rows.append(row)
            print(f"{method} seed {seed}: {row['accuracy']:.2f} %", flush=True)
    table = summary(rows)
    print(f"\n{common.format_table(table)}\n{common.hardware()}")
    common.write_results(settings.out, rows, summary=table, settings=vars(settings))
    common.save_plot(settings.out / "training.png", histories)
    print(f"results and plots: {settings.out}")
    return rows


if __name__ == "__main__":
    main()
