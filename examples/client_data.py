"""What `compress.py` trains: the data of its models, their sizes and the methods."""

import argparse
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import common
import multi30k
import numpy as np
import optax
import sacrebleu
from images import load_cifar10, load_digits
from recipes import Recipe

import nmjax as nm

SIZES: dict[str, dict[str, int]] = {  # on digits and made-up dates
    "cnn": {"width": 16, "epochs": 20, "batch": 64},
    "vit": {
        "width": 64,
        "heads": 4,
        "layers": 2,
        "patch": 2,
        "epochs": 80,
        "batch": 64,
    },
    "translator": {
        "width": 128,
        "heads": 4,
        "layers": 1,
        "vocabulary": 300,
        "longest": 32,
        "epochs": 8,
        "tokens": 1024,
    },
}
LARGER: dict[str, dict[str, int]] = {  # with --data-dir
    "cnn": {"width": 32, "epochs": 5},
    "vit": {"width": 128, "layers": 4, "patch": 4, "epochs": 5},
    "translator": {
        "width": 128,
        "layers": 2,
        "vocabulary": 4000,
        "longest": 48,
        "epochs": 5,
    },
}


class Job(NamedTuple):
    """One network to train."""

    model: str
    library: str
    method: str
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.model}-{self.library}-{self.method}-seed{self.seed}"


class Work(NamedTuple):
    """Data of a model.

    Attributes:
      facts: What the model has to know, for `clients.build`.
      batches: ``seed -> step -> (batch, key)``.
      epochs: Length of the training.
      per_epoch: Steps of an epoch.
      items: Inputs of the test, as a request has them.
      metric: Name of the score.
      score: From answers to the items to the score.
    """

    facts: dict[str, Any]
    batches: Callable[[int], Callable[[int], Any]]
    epochs: int
    per_epoch: int
    items: Sequence[Any]
    metric: str
    score: Callable[[Sequence[Any]], float]


def load_work(model: str, options: argparse.Namespace) -> Work:
    """Load the data of a model and choose the sizes that were not given."""
    sizes = SIZES[model] | (LARGER[model] if options.data_dir else {})
    given = {name: getattr(options, name) for name in sizes}
    sizes |= {name: size for name, size in given.items() if size is not None}
    load = load_sentences if model == "translator" else load_images
    return load(model, sizes, options)


def load_images(model: str, sizes: dict[str, int], options: argparse.Namespace) -> Work:
    """Load CIFAR-10, or digits."""
    data = load_cifar10(options.data_dir) if options.data_dir else load_digits()
    images, labels = data.images, data.labels
    test_images, test_labels = data.test_images, data.test_labels
    if options.smoke:
        images, labels = images[:64], labels[:64]
        test_images, test_labels = test_images[:10], test_labels[:10]
        sizes = sizes | {"batch": 16}
    epochs, batch = sizes.pop("epochs"), sizes.pop("batch")
    facts = {
        "model": model,
        "image": data.images.shape[1:],
        "classes": int(data.labels.max()) + 1,
        "mean": data.images.mean((0, 1, 2)).tolist(),
        "deviation": data.images.std((0, 1, 2)).tolist(),
        "shift": data.pad,
        "flip": data.flip,
        **sizes,
    }

    def batch_at(seed: int, step: int) -> Any:
        at = common.batch_indices(seed, step, len(labels), batch)
        return (images[at], labels[at]), common.key_for(seed, 1, step)

    def score(answers: Sequence[Any]) -> float:
        return 100.0 * float(np.mean(np.asarray(answers) == test_labels))

    return Work(
        facts,
        lambda seed: functools.partial(batch_at, seed),
        epochs,
        len(labels) // batch,
        list(test_images),
        "accuracy %",
        score,
    )


def load_sentences(
    model: str, sizes: dict[str, int], options: argparse.Namespace
) -> Work:
    """Load Multi30k, or made-up dates."""
    most = 40 if options.smoke else None
    size, longest = sizes.pop("vocabulary"), sizes["longest"]
    task = multi30k.read_task(options.data_dir, size, longest, most)
    epochs, tokens = sizes.pop("epochs"), sizes.pop("tokens")
    facts = {
        "model": model,
        "vocabulary": task.vocabulary.to_str(),
        "dropout": options.dropout,
        **sizes,
    }

    def batches(seed: int) -> Callable[[int], Any]:
        pairs = multi30k.Batches(task.train, tokens, seed)
        return lambda step: (pairs(step), common.key_for(seed, 1, step))

    short = [i for i, ids in enumerate(task.test.source_ids) if len(ids) < longest]
    short = short[:10] if options.smoke else short
    targets = [task.test.target[i] for i in short]

    def score(answers: Sequence[Any]) -> float:
        return sacrebleu.corpus_bleu(answers, [targets]).score

    return Work(
        facts,
        batches,
        epochs,
        multi30k.Batches(task.train, tokens, 0).per_epoch,
        [task.test.source[i] for i in short],
        "BLEU",
        score,
    )


def make_recipe(
    method: str,
    shapes: Any,
    dense: Sequence[str],
    steps: int,
    options: argparse.Namespace,
) -> Recipe:
    """Return how a method trains.

    Args:
      method: ``"dense"``; ``"srste"``, 2:4; or ``"srigl"``, a constant fan-in.
      shapes: Shapes of the params.
      dense: Regexes of leaves that stay dense.
      steps: Length of the training.
      options: The command line.

    Returns:
      The recipe, with AdamW, warm-up and a cosine schedule.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.lr, max(1, steps // 10), max(2, steps)
    )
    adamw = optax.adamw(schedule, b2=0.98, weight_decay=options.weight_decay)
    clip = optax.clip_by_global_norm(1.0)
    if method == "srigl":
        plan = nm.plan(shapes, nm.FanIn(density=options.density), skip=dense)
        tx = nm.srigl(
            optax.chain(clip, adamw),
            plan,
            total_steps=max(1, steps),
            delta_t=options.delta_t,
            gamma_sal=options.gamma_sal,
        )
        return Recipe(
            plan, tx, start=lambda key, w: nm.sparse_init(key, w, plan), held=True
        )
    plan = nm.plan(shapes, nm.NM(2, 4), skip=dense)
    if method == "dense":
        return Recipe(plan, optax.chain(clip, adamw), sparse=False)
    return Recipe(
        plan,
        optax.chain(clip, nm.srste(plan, options.decay), adamw),
        forward=lambda params, _: nm.sparsify(params, plan),
        finish=lambda params, _: nm.project(params, plan),
    )
