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
To add a method, write a function like `srste` below and name it in `METHODS`.
"""

import argparse
import functools
import pathlib
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import nmjax as nm

# Data -------------------------------------------------------------------------------


class Data(NamedTuple):
    """A data set in memory: images are uint8 ``(n, height, width, channels)``."""

    name: str
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    pad: int  # random crops move by up to this many pixels
    flip: bool


class _ArrayUnpickler(pickle.Unpickler):
    """Loads arrays and plain values and nothing else: data should not run code."""

    allowed = frozenset(
        {
            ("numpy.core.multiarray", "_reconstruct"),  # written by NumPy 1
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),  # bytes, written by Python 3 in an old protocol
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.allowed:
            raise pickle.UnpicklingError(
                f"{module}.{name} does not belong in a file of images and labels"
            )
        return super().find_class(module, name)


def read_binary(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images ``(n, 3, 32, 32)`` and labels of a file of the binary version."""
    records = np.fromfile(path, np.uint8)
    if records.size == 0 or records.size % 3073:
        raise ValueError(
            f"{path} has {records.size} bytes, which is not a multiple of 3073 (one "
            "label and 32 x 32 x 3 pixels): the file is incomplete, fetch it again"
        )
    records = records.reshape(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int32)


def read_pickle(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images ``(n, 3, 32, 32)`` and labels of a file of the Python version."""
    with path.open("rb") as file:
        batch = _ArrayUnpickler(file, encoding="bytes").load()
    return batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"], np.int32)


def load_cifar10(data_dir: pathlib.Path) -> Data:
    """Read CIFAR-10, from whichever official version is there.

    Args:
      data_dir: The folder of the batches, or the folder that contains it.

    Returns:
      The 50,000 training and the 10,000 test images.

    Raises:
      FileNotFoundError: If no version is found.
    """
    for ending, read, usual in (
        (".bin", read_binary, "cifar-10-batches-bin"),
        ("", read_pickle, "cifar-10-batches-py"),
    ):
        for folder in (data_dir, data_dir / usual):
            files = [folder / f"data_batch_{i}{ending}" for i in range(1, 6)]
            files.append(folder / f"test_batch{ending}")
            if all(file.is_file() for file in files):
                images, labels = zip(*map(read, files), strict=True)
                images = [x.transpose(0, 2, 3, 1) for x in images]
                return Data(
                    "cifar10",
                    np.concatenate(images[:5]),
                    np.concatenate(labels[:5]),
                    np.ascontiguousarray(images[5]),
                    labels[5],
                    pad=4,
                    flip=True,
                )
    raise FileNotFoundError(
        f"{data_dir} has neither data_batch_1.bin ... test_batch.bin nor data_batch_1 "
        "... test_batch, all six, and no folder cifar-10-batches-bin or "
        "cifar-10-batches-py with them: give the unpacked folder of "
        "https://www.cs.toronto.edu/~kriz/cifar.html"
    )


def load_digits() -> Data:
    """Return scikit-learn's 1797 digits, 8x8 grey: 1257 to train on and 540 to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images.astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    order = np.random.default_rng(0).permutation(
        len(labels)
    )  # same split for all seeds
    test, train = order[:540], order[540:]
    return Data(
        "digits", images[train], labels[train], images[test], labels[test], 1, False
    )


def augment(images: jax.Array, key: jax.Array, pad: int, flip: bool) -> jax.Array:
    """Move every image by up to ``pad`` pixels, zeros coming in, and flip half of them.

    Args:
      images: ``(batch, height, width, channels)``, any dtype.
      key: PRNG key.
      pad: Largest shift.
      flip: Whether to mirror left and right at random.

    Returns:
      Same shape and dtype.
    """
    batch, height, width, channels = images.shape
    key_crop, key_flip = jax.random.split(key)
    offsets = jax.random.randint(key_crop, (batch, 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    images = jax.vmap(
        lambda image, at: jax.lax.dynamic_slice(
            image, (at[0], at[1], 0), (height, width, channels)
        )
    )(padded, offsets)
    if not flip:
        return images
    mirror = jax.random.bernoulli(key_flip, shape=(batch, 1, 1, 1))
    return jnp.where(mirror, images[:, :, ::-1], images)


# Models -----------------------------------------------------------------------------

_conv = functools.partial(
    nn.Conv,
    use_bias=False,
    kernel_init=nn.initializers.variance_scaling(2.0, "fan_out", "normal"),
)
_conv3x3 = functools.partial(_conv, kernel_size=(3, 3), padding=1)
_norm = functools.partial(nn.BatchNorm, momentum=0.9)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, activations after the sum (ResNet)."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``(batch, h, w, c)`` to ``(batch, h / stride, w / stride, width)``."""
        norm = functools.partial(_norm, use_running_average=not train)
        y = _conv3x3(self.width, strides=self.stride)(x)
        y = _conv3x3(self.width)(nn.relu(norm()(y)))
        y = norm(scale_init=nn.initializers.zeros)(y)
        if x.shape != y.shape:
            x = _conv(self.width, (1, 1), strides=self.stride, name="shortcut")(x)
            x = norm(name="shortcut_norm")(x)
        return nn.relu(x + y)


class WideBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, activations first (wide ResNet)."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map ``(batch, h, w, c)`` to ``(batch, h / stride, w / stride, width)``."""
        norm = functools.partial(_norm, use_running_average=not train)
        y = nn.relu(norm()(x))
        if x.shape[-1] != self.width or self.stride > 1:
            x = _conv(self.width, (1, 1), strides=self.stride, name="shortcut")(y)
        y = _conv3x3(self.width, strides=self.stride)(y)
        return x + _conv3x3(self.width)(nn.relu(norm()(y)))


class ResNet(nn.Module):
    """A residual network for small images: 3x3 stem, stages of blocks, linear head.

    Attributes:
      block: `BasicBlock` or `WideBlock`.
      stages: Blocks per stage. Every stage after the first halves the image.
      width: Channels of the stem; stage ``i`` has ``width * widen * 2 ** i``.
      widen: Factor of the wide networks.
      classes: Classes to tell apart.
    """

    block: type[nn.Module]
    stages: tuple[int, ...]
    width: int
    widen: int = 1
    classes: int = 10

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Map images ``(batch, h, w, c)`` to logits ``(batch, classes)``."""
        preactivated = self.block is WideBlock
        x = _conv3x3(self.width, name="stem")(x)
        if not preactivated:
            x = nn.relu(_norm(use_running_average=not train, name="norm")(x))
        for stage, count in enumerate(self.stages):
            for index in range(count):
                stride = 2 if stage > 0 and index == 0 else 1
                name = f"stage{stage}_block{index}"
                width = self.width * self.widen * 2**stage
                x = self.block(width, stride, name=name)(x, train)
        if preactivated:
            x = nn.relu(_norm(use_running_average=not train, name="norm")(x))
        return nn.Dense(self.classes, name="head")(x.mean(axis=(1, 2)))


MODELS = {  # name -> (usual width, constructor from a width)
    "resnet6": (64, functools.partial(ResNet, BasicBlock, (1, 1))),
    "resnet10": (64, functools.partial(ResNet, BasicBlock, (1, 1, 1, 1))),
    "resnet18": (64, functools.partial(ResNet, BasicBlock, (2, 2, 2, 2))),
    "wrn22-2": (16, functools.partial(ResNet, WideBlock, (3, 3, 3), widen=2)),
}

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
    finish = lambda params, _: nm.project(params, plan)  # noqa: E731
    return Recipe(sgd, finish=finish, trained_as="dense", sparse=False)


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
