"""The command line of `cifar10.py`: its options, their defaults, and what they ask for.

The defaults with ``--data-dir`` are the published recipes. N:M methods: 200 epochs and
a cosine schedule. Methods that take ``--sparsity``: 250 epochs, and a learning rate
that falls to a fifth every 77 epochs. Both with batches of 128, SGD with Nesterov
momentum 0.9, a learning rate of 0.1 and weight decay 5e-4.
"""

import argparse
import itertools
from typing import Any, NamedTuple

import common
import numpy as np
from images import Data, load_cifar10, load_digits, pool
from recipes import FREE, METHODS, STRUCTURED
from resnets import MODELS

import nmjax as nm

Settings = argparse.Namespace

DEFAULTS = {  # of the options that are not given
    "cifar10": {"model": "resnet18", "batch_size": 128, "delta_t": 100},
    "digits": {
        "model": "resnet6",
        "batch_size": 64,
        "width": 16,
        "epochs": 30,
        "schedule": "cosine",
        "delta_t": 10,
        "rewind": 0,
    },
}
# What was published for the two families of methods on CIFAR-10.
STRUCTURED_RECIPE = {"epochs": 200, "schedule": "cosine"}
FREE_RECIPE = {"epochs": 250, "schedule": "steps"}
SMOKE = {
    "model": "resnet6",
    "epochs": 1,
    "batch_size": 8,
    "width": 8,
    "subset": 64,
    "schedule": "cosine",
    "delta_t": 2,
    "rewind": 2,
}


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


def parse_sparsity(text: str) -> float:
    """Read a sparsity in per cent."""
    value = float(text)
    if not 0 < value < 100:
        raise argparse.ArgumentTypeError(
            f"{text} is no sparsity in per cent: it is the part of weights that go, "
            "between 0 and 100"
        )
    return value


def parse(arguments: list[str] | None = None) -> Settings:
    """Read the command line."""
    parser = common.parser("Residual networks, dense and sparse.", out="runs/cifar10")
    add = parser.add_argument
    add("--method", nargs="+", choices=METHODS, default=["dense", "srste"])
    add("--pattern", type=parse_pattern, default="2:4", help="N of every M are kept")
    add(
        "--sparsity",
        type=parse_sparsity,
        nargs="+",
        default=[90.0],
        help=f"in per cent, one run for each, of {', '.join(FREE)}",
    )
    add("--decay", type=float, default=2e-4, help="SR-STE's pull on pruned weights")
    add("--drop-fraction", type=float, default=0.3, help="of a change of topology")
    add("--delta-t", type=int, help="steps between changes; default: 100; digits: 10")
    add("--gamma-sal", type=float, default=0.3, help="SRigL's ablation threshold")
    add("--rewind", type=int, help="step that lottery goes back to; default: 1 epoch")
    add("--model", choices=MODELS, help="default: resnet18; digits: resnet6")
    add(
        "--width", type=int, help="channels of the stem; default: the usual; digits: 16"
    )
    add("--epochs", type=int, help="default: 200, or 250 with --sparsity; digits: 30")
    add("--batch-size", type=int, help="default: 128; digits: 64")
    add("--lr", type=float, default=0.1, help="peak of the schedule")
    add(
        "--schedule",
        choices=("cosine", "steps"),
        help="of the learning rate; steps: x 0.2 every 77 of 250 epochs; default: "
        "steps if all methods but dense take --sparsity",
    )
    add("--warmup", type=float, default=0.0, help="epochs of linear warm-up")
    add("--weight-decay", type=float, default=5e-4, help="of all parameters")
    add("--subset", type=int, help="train on so many images, the same for all seeds")
    add("--pool", type=int, default=1, help="average squares of so many pixels a side")
    settings = parser.parse_args(arguments)
    free = {*settings.method} <= {"dense", *FREE} and settings.method != ["dense"]
    defaults: dict[str, Any] = FREE_RECIPE if free else STRUCTURED_RECIPE
    defaults = defaults | DEFAULTS["digits" if settings.data_dir is None else "cifar10"]
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
    return pool(data, settings.pool)


class Run(NamedTuple):
    """One network to train, but for its seed.

    Attributes:
      method: Name of the method.
      sparsity: In per cent; None where the method does not choose it.
    """

    method: str
    sparsity: float | None

    @property
    def name(self) -> str:
        """Name in tables and of folders."""
        return self.method + ("" if self.sparsity is None else f"-{self.sparsity:g}")


def runs_of(settings: Settings) -> list[Run]:
    """Return the runs that the settings ask for."""
    free = itertools.product(
        (m for m in settings.method if m in FREE), settings.sparsity
    )
    return [
        *(Run(m, None) for m in settings.method if m in STRUCTURED),
        *(Run(m, s) for m, s in free),
    ]


def run_config(run: Run, seed: int, data: Data, settings: Settings) -> dict[str, Any]:
    """Return all that determines a run, for the check when it is resumed."""
    names = ["model", "width", "epochs", "batch_size", "lr", "warmup", "weight_decay"]
    names += ["log_every", "schedule", "pool"]
    names += ["decay"] if run.method == "srste" else []
    names += ["gamma_sal"] if run.method == "srigl" else []
    names += ["rewind"] if run.method == "lottery" else []
    if run.sparsity is not None:
        names += ["drop_fraction", "delta_t"]
    config = {name: getattr(settings, name) for name in names}
    facts = {"method": run.method, "sparsity": run.sparsity, "seed": seed}
    facts |= {"pattern": str(settings.pattern)} if run.sparsity is None else {}
    return {**facts, "data": data.name, "images": len(data.labels), **config}
