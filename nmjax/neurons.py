"""Neurons: which output units of sparse layers have inputs, and how many.

A neuron is an output unit of a kernel: of a Dense ``(in, out)`` or conv ``(h, w, in,
out)`` kernel one entry of the last axis, of the query, key and value kernels ``(in,
heads, head_dim)`` one pair of head and head_dim. Its fan-in is its number of active
weights. A neuron without any is *ablated*: its output is its bias, whatever the input.

Everything is read from masks, never from weights: a freshly grown weight is 0 and
active. `fan_in_summary` and `fan_in_histogram` take the counts that `fan_in` gives; for
every leaf by itself use ``metrics.per_leaf(fan_in_summary, counts)``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, PyTree

from nmjax import metrics
from nmjax.budgets import FanIn
from nmjax.pairing import check_bool, pair
from nmjax.paths import is_masked, named_leaves
from nmjax.patterns import fan_in_axes
from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.typing import Masks


class FanInSummary(NamedTuple):
    """The fan-in of the neurons that have inputs; zeros if none has.

    Attributes:
      min: int32 scalar, the smallest fan-in.
      mean: float32 scalar, their mean.
      max: int32 scalar, the largest fan-in.
    """

    min: Int[Array, ""]
    mean: Float[Array, ""]
    max: Int[Array, ""]


def fan_in(masks: Masks, plan: Plan | None = None) -> PyTree:
    r"""Count the active inputs of every neuron.

    .. math:: c_j = \sum_i e_{ij}

    Args:
      masks: a bool array or a tree of them, `optax.MaskedNode()` at dense leaves.
      plan: the plan of the masks. It says which leaves stack layers: their counts keep
        the leading axes, one row per layer. WITHOUT a plan a stacked leaf cannot be
        told from a conv, and its inputs are added over the layers. The plan's `FanIn`
        patterns also say which axes are neurons, where they have `neuron_axes`.

    Returns:
      A tree with the structure of `masks`: int32 arrays with one entry per neuron, of
      the mask's shape without its fan-in axes; `optax.MaskedNode()` at dense leaves. A
      mask of rank 1 has no fan-in axis: every entry is a neuron.

    Raises:
      TypeError: a mask is not bool.
      ValueError: the masks do not fit the plan.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import neurons
      >>> masks = {"kernel": jnp.array([[True, False], [True, False], [True, True]])}
      >>> neurons.fan_in(masks)["kernel"].tolist()
      [3, 1]
    """

    def count(path: str, mask: Any, axes: tuple[int, ...]) -> Array:
        check_bool(path, mask)
        return jnp.sum(mask, axis=axes, dtype=jnp.int32)

    return _map_neurons(count, masks, plan)


def active_neurons(masks: Masks, plan: Plan | None = None) -> PyTree:
    r"""Tell which neurons have at least one active input.

    .. math:: a_j = \bigvee_i e_{ij}

    Works under `jax.jit` and `jax.vmap`; the plan is static.

    Args:
      masks: a bool array or a tree of them, for example `nm.masks(state)`;
        `optax.MaskedNode()` at dense leaves.
      plan: the plan of the masks. It says which leaves stack layers: their result
        keeps the leading axes, one row per layer. WITHOUT a plan a stacked leaf cannot
        be told from a conv: a neuron then counts as active if any layer has inputs for
        it. The plan's `FanIn` patterns also say which axes are neurons, where they
        have `neuron_axes`.

    Returns:
      A tree with the structure of `masks`: bool arrays, True = has inputs, of the
      mask's shape without its fan-in axes; `optax.MaskedNode()` at dense leaves. A
      mask of rank 1 has no fan-in axis: every entry is a neuron.

    Raises:
      TypeError: a mask is not bool.
      ValueError: the masks do not fit the plan.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> masks = {"kernel": jnp.array([[True, False], [True, False], [False, False]])}
      >>> nm.active_neurons(masks)["kernel"].tolist()
      [True, False]

    Reference:
      Neuron ablation: Lasby, Golubeva, Evci, Nica and Ioannou, "Dynamic Sparse
      Training with Structured Sparsity", 2024, arXiv 2305.02299.
    """

    def has_inputs(path: str, mask: Any, axes: tuple[int, ...]) -> Array:
        check_bool(path, mask)
        return jnp.any(mask, axis=axes)

    return _map_neurons(has_inputs, masks, plan)


def active_share(masks: Masks, plan: Plan | None = None) -> Float[Array, ""]:
    """Give the share of neurons that have inputs, over all sparse leaves together.

    Args:
      masks: a bool array or a tree of them, `optax.MaskedNode()` at dense leaves.
      plan: the plan of the masks; see `active_neurons`.

    Returns:
      float32 scalar in [0, 1].

    Raises:
      TypeError: a mask is not bool.
      ValueError: the masks do not fit the plan, or have no neuron.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import neurons
      >>> masks = {"kernel": jnp.array([[True, False, False, True]] * 2)}
      >>> float(neurons.active_share(masks))
      0.5
    """
    return metrics.density(active_neurons(masks, plan))


def fan_in_summary(counts: PyTree) -> FanInSummary:
    """Give the smallest, mean and largest fan-in of the neurons that have inputs.

    Args:
      counts: what `fan_in` gives: an int32 array or a tree of them.

    Returns:
      Three scalars; all 0 if no neuron has inputs. Works under `jax.jit`.

    Raises:
      ValueError: there are no counts.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import neurons
      >>> low, mean, high = neurons.fan_in_summary(jnp.array([0, 2, 2, 5]))
      >>> int(low), float(mean), int(high)
      (2, 3.0, 5)
    """
    leaves = [jnp.asarray(leaf) for (leaf,) in pair(counts=counts).values()]
    if not sum(leaf.size for leaf in leaves):
        raise ValueError("the counts have no entries: there is no neuron to summarise")
    largest = jnp.iinfo(jnp.int32).max
    lows = [
        jnp.min(jnp.where(leaf > 0, leaf, largest), initial=largest) for leaf in leaves
    ]
    low = jnp.min(jnp.stack(lows))
    high = jnp.max(jnp.stack([jnp.max(leaf, initial=0) for leaf in leaves]))
    alive = metrics.add_counts([(leaf > 0).astype(jnp.int32) for leaf in leaves])
    mean = metrics.add_counts(leaves) / jnp.maximum(alive, 1.0)
    return FanInSummary(jnp.where(high > 0, low, 0), mean, high)


def fan_in_histogram(counts: PyTree) -> dict[int, int]:
    """Count the neurons of every fan-in, for a report.

    Args:
      counts: what `fan_in` gives: an int32 array or a tree of them, not traced.

    Returns:
      Fan-in -> number of neurons that have it, from the smallest fan-in to the
      largest; ablated neurons stand under 0.

    Raises:
      TypeError: the counts are traced.
      ValueError: there are no counts.

    Example:
      >>> import jax.numpy as jnp
      >>> from nmjax import neurons
      >>> neurons.fan_in_histogram({"kernel": jnp.array([2, 0, 2, 5])})
      {0: 1, 2: 2, 5: 1}
    """
    leaves = [leaf for (leaf,) in pair(counts=counts).values()]
    if any(isinstance(leaf, Tracer) for leaf in leaves):
        raise TypeError(
            "fan_in_histogram needs concrete counts, its keys depend on them: call it "
            "outside jax.jit and jax.vmap, or use fan_in_summary there"
        )
    values = np.concatenate([np.asarray(leaf).ravel() for leaf in leaves])
    fan_ins, numbers = np.unique(values, return_counts=True)
    return dict(zip(fan_ins.tolist(), numbers.tolist(), strict=True))


def _map_neurons(fn: Any, masks: Masks, plan: Plan | None) -> PyTree:
    """Map ``fn(path, mask, fan-in axes)`` over masks."""
    if plan is None:
        pairs, treedef = named_leaves(masks)
        return jax.tree.unflatten(
            treedef,
            [
                mask
                if is_masked(mask)
                else fn(path, mask, fan_in_axes(path, jnp.ndim(mask)))
                for path, mask in pairs
            ],
        )

    def planned(leaf: LeafPlan, mask: Any) -> Array:
        return fn(leaf.path, mask, _planned_axes(leaf))

    return map_planned(planned, plan, masks, otherwise=_refuse_dense)


def _planned_axes(leaf: LeafPlan) -> tuple[int, ...]:
    """Give a leaf's fan-in axes, counted from the end."""
    ndim = len(leaf.layer_shape)
    if not isinstance(leaf.pattern, FanIn) or leaf.pattern.neuron_axes is None:
        return fan_in_axes(leaf.path, ndim)
    neurons = {axis % ndim for axis in leaf.pattern.neuron_axes}
    return tuple(axis - ndim for axis in range(ndim) if axis not in neurons)


def _refuse_dense(mask: Any) -> Any:
    raise ValueError(
        f"the masks have a mask of shape {jnp.shape(mask)} for a leaf that is dense in "
        "the plan; they were made for another plan"
    )
