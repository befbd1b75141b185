"""The methods of `cifar10.py`: one function each, from a plan to a `Recipe`.

To add a method, write a function like `srste` below and name it in `METHODS`.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import jax
import optax

import nmjax as nm

Optimizer = optax.GradientTransformation
Settings = argparse.Namespace


class Task(NamedTuple):
    """What a method is asked to do.

    Attributes:
      params: Shapes of the params.
      settings: The command line.
      sparsity: Fraction of weights that go, for methods that can choose it.
      steps: Length of the training.
      sgd: The dense optimizer.
    """

    params: Any
    settings: Settings
    sparsity: float
    steps: int
    sgd: Optimizer

    @property
    def structured(self) -> nm.Plan:
        """N of every M weights, the head dense."""
        return nm.plan(self.params, self.settings.pattern, skip="head")

    @property
    def unstructured(self) -> nm.Plan:
        """Weights anywhere, at the densities of ERK; the head takes part."""
        return nm.plan(
            self.params, {"kernel": nm.Unstructured()}, density=self._density
        )

    @property
    def constant_fan_in(self) -> nm.Plan:
        """As many inputs for every neuron of a layer, at the densities of ERK."""
        return nm.plan(self.params, {"kernel": nm.FanIn()}, density=self._density)

    @property
    def _density(self) -> Any:
        return nm.erk(1.0 - self.sparsity)

    @property
    def dynamics(self) -> dict[str, Any]:
        """The arguments that all methods of drop and growth share."""
        return {
            "total_steps": self.steps,
            "drop_fraction": self.settings.drop_fraction,
            "delta_t": self.settings.delta_t,
        }


class Recipe(NamedTuple):
    """How a method trains, and what network comes out.

    Attributes:
      plan: Which leaf holds which pattern.
      optimizer: The whole optax chain.
      start: ``(seed, params)`` -> the params that training starts from.
      forward: ``(params, opt_state)`` -> the params that a training step computes with.
      finish: ``(params, opt_state)`` -> the params of the finished network.
      trained_as: The method whose runs it takes over; None: it is trained itself.
      sparse: Whether ``forward`` is sparse, so that its masks are worth logging.
      held: Whether the optimizer state holds the masks (`nm.masks`).
      rounds: How often it is pruned and trained again, for lottery tickets.
      prune: Fraction of the alive weights that goes in a round.
    """

    plan: nm.Plan
    optimizer: Optimizer
    start: Callable[[jax.Array, Any], Any] = lambda _, params: params
    forward: Callable[[Any, Any], Any] = lambda params, _: params
    finish: Callable[[Any, Any], Any] = lambda params, _: params
    trained_as: str | None = None
    sparse: bool = True
    held: bool = False
    rounds: int = 0
    prune: float = 0.0

    def masks(self, opt_state: Any) -> Any:
        """Return the masks that are held, or None."""
        return nm.masks(opt_state) if self.held else None


# N of M, dense weights behind -------------------------------------------------------


def dense(task: Task) -> Recipe:
    """Train all weights."""
    return Recipe(task.structured, task.sgd, sparse=False)


def one_shot(task: Task) -> Recipe:
    """Train all weights, then prune by magnitude and do not train again."""
    plan = task.structured
    return Recipe(
        plan,
        task.sgd,
        finish=lambda params, _: nm.project(params, plan),
        trained_as="dense",
        sparse=False,
    )


def ste(task: Task) -> Recipe:
    """Train through the mask with straight-through gradients."""
    plan = task.structured
    return Recipe(
        plan,
        task.sgd,
        forward=lambda params, _: nm.sparsify(params, plan),
        finish=lambda params, _: nm.project(params, plan),
    )


def srste(task: Task) -> Recipe:
    """Train through the mask and let pruned weights decay (SR-STE)."""
    recipe = ste(task)
    stage = nm.srste(recipe.plan, decay=task.settings.decay)
    return recipe._replace(optimizer=optax.chain(stage, task.sgd))


# N of M, pruned on the way ----------------------------------------------------------


def retrain(task: Task) -> Recipe:
    """Train dense for half the steps, prune, train again with the mask fixed.

    The learning rate starts again at the pruning. As published, both halves are as
    long as a whole training: double ``--epochs`` for that.
    """
    plan = task.structured
    return Recipe(
        plan, nm.one_shot(task.sgd, plan, at=max(1, task.steps // 2)), held=True
    )


def progressive(task: Task) -> Recipe:
    """Prune from M of M to N of M, one weight of a group at a time.

    The rungs are spread evenly over the second quarter of the training.
    """
    plan, pattern = task.structured, task.settings.pattern
    rungs = range(pattern.m - 1, pattern.n - 1, -1)
    quarter = max(1, task.steps // 4)
    ladder = {
        quarter + (i * quarter) // max(1, len(rungs) - 1): n
        for i, n in enumerate(rungs)
    }
    return Recipe(plan, nm.progressive_nm(task.sgd, plan, ladder), held=True)


# Any sparsity, weights anywhere -----------------------------------------------------


def gradual(task: Task) -> Recipe:
    """Raise the sparsity along a cubic from 10 % to 75 % of the training."""
    plan = task.unstructured
    first = task.steps // 10
    last = max(first + 1, task.steps * 3 // 4)
    tx = nm.gradual(task.sgd, plan, start=first, stop=last, every=task.settings.delta_t)
    return Recipe(plan, tx, held=True)


def static(task: Task) -> Recipe:
    """Train with a fixed random mask."""
    plan = task.unstructured
    return Recipe(plan, nm.static(task.sgd, plan), start=_sparse(plan), held=True)


def set_(task: Task) -> Recipe:
    """Drop by magnitude, grow at random (SET)."""
    plan = task.unstructured
    key = common.key_for(0, 3)
    tx = nm.set_(task.sgd, plan, key=key, **task.dynamics)
    return Recipe(plan, tx, start=_sparse(plan), held=True)


def rigl(task: Task) -> Recipe:
    """Drop by magnitude, grow by gradient (RigL)."""
    plan = task.unstructured
    tx = nm.rigl(task.sgd, plan, **task.dynamics)
    return Recipe(plan, tx, start=_sparse(plan), held=True)


def lottery(task: Task) -> Recipe:
    """Train, prune at most 20 % of the alive weights of all layers, rewind; repeat.

    Every round prunes the same fraction, so that the last one ends at the sparsity.
    """
    plan = nm.plan(task.params, {"kernel": nm.Unstructured()}, density=1.0)
    rounds = math.ceil(math.log(1.0 - task.sparsity) / math.log(1.0 - 0.2))
    prune = 1.0 - (1.0 - task.sparsity) ** (1.0 / rounds)
    tx = nm.static(task.sgd, plan)
    return Recipe(plan, tx, held=True, rounds=rounds, prune=prune)


# Any sparsity, constant fan-in ------------------------------------------------------


def srigl(task: Task) -> Recipe:
    """RigL with constant fan-in and neuron ablation (SRigL), classes exempt."""
    return _srigl(task, task.settings.gamma_sal)


def srigl_noablation(task: Task) -> Recipe:
    """RigL with constant fan-in (SRigL without ablation)."""
    return _srigl(task, None)


def _srigl(task: Task, gamma_sal: float | None) -> Recipe:
    plan = task.constant_fan_in
    tx = nm.srigl(task.sgd, plan, gamma_sal=gamma_sal, exempt="head", **task.dynamics)
    return Recipe(plan, tx, start=_sparse(plan), held=True)


def _sparse(plan: nm.Plan) -> Callable[[jax.Array, Any], Any]:
    return lambda key, params: nm.sparse_init(key, params, plan)


Method = Callable[[Task], Recipe]

STRUCTURED: dict[str, Method] = {  # sparsity is that of --pattern
    "dense": dense,
    "one_shot": one_shot,
    "ste": ste,
    "srste": srste,
    "retrain": retrain,
    "progressive": progressive,
}
FREE: dict[str, Method] = {  # one run for every --sparsity
    "gradual": gradual,
    "static": static,
    "set": set_,
    "rigl": rigl,
    "srigl": srigl,
    "srigl_noablation": srigl_noablation,
    "lottery": lottery,
}
METHODS = STRUCTURED | FREE
