"""The jitted pieces of `cifar10.py`: its optimizer, training step and accuracy."""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from images import Data, augment
from recipes import Recipe
from resnets import ResNet

import nmjax as nm
from nmjax.tracking import Tracker

Settings = argparse.Namespace


class State(NamedTuple):
    """All that a step needs from the one before."""

    params: Any
    batch_stats: Any
    opt_state: Any
    tracker: Any


def make_sgd(
    settings: Settings, steps: int, epoch: int, first: int = 0
) -> optax.GradientTransformation:
    """Return SGD with weight decay, Nesterov momentum and a schedule.

    Args:
      settings: The peak learning rate, its schedule, the weight decay and the epochs
        of warm-up.
      steps: Length of the training.
      epoch: Steps per epoch.
      first: Step of the schedule to begin at.

    Returns:
      A chain to which methods add their stages, or that they wrap.
    """
    warmup = round(settings.warmup * epoch)

    def schedule(count: Any) -> jax.Array:
        step = jnp.asarray(count).astype(jnp.float32) + first
        linear = jnp.minimum(1.0, (step + 1) / max(warmup, 1))
        part = jnp.clip((step - warmup) / max(steps - warmup, 1), 0.0, 1.0)
        if settings.schedule == "steps":  # every 77 of 250 epochs
            return settings.lr * linear * 0.2 ** jnp.floor(part * 250 / 77)
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


def make_tracker(recipe: Recipe) -> Tracker:
    """Return the tracker of a method; held masks are also explored over time."""
    return nm.tracker(
        recipe.plan, include_itop=recipe.held, include_neurons=recipe.held
    )


def make_step(model: ResNet, recipe: Recipe, data: Data) -> common.Step:
    """Return the jitted training step."""
    normalize, tracker = make_normalize(data), make_tracker(recipe)

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
        masks = recipe.masks(opt_state)
        measured, tracked = tracker.update(params, state.tracker, masks)
        if not recipe.sparse:  # only how its masks would flip, for comparison
            measured = {k: v for k, v in measured.items() if k.startswith("flip_rate")}
        return State(params, stats, opt_state, tracked), {"loss": loss, **measured}

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
