"""Tracking: measure the masks at every step of a training.

`tracker` makes a pair of pure functions in the manner of an optax transform. It
belongs inside the jitted step, after `optax.apply_updates`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from nmjax import metrics, neurons
from nmjax.paths import is_masked
from nmjax.plans import LeafPlan, Plan, map_planned
from nmjax.projection import compute_masks
from nmjax.typing import Masks, Params


class TrackerState(NamedTuple):
    """What a tracker remembers: the masks of its last call.

    Attributes:
      previous: tree of bool arrays and `optax.MaskedNode()`, one byte per weight.
    """

    previous: Masks


class ExploringState(NamedTuple):
    """What a tracker with ``include_itop`` remembers.

    Attributes:
      previous: masks of the last call.
      explored: bool tree of the same structure, True where any mask so far was.
    """

    previous: Masks
    explored: Masks


class Tracker(NamedTuple):
    """A pair of pure functions, as an optax transform has; see `tracker`.

    Attributes:
      init: ``init(params, masks=None) -> state``, a `TrackerState`; with
        ``include_itop`` an `ExploringState`.
      update: ``update(params, state, masks=None) -> (metrics, state)``.
    """

    init: Callable[..., TrackerState | ExploringState]
    update: Callable[..., tuple[dict[str, Array], TrackerState | ExploringState]]


def tracker(
    plan: Plan,
    *,
    include_sad: bool = True,
    include_itop: bool = False,
    include_neurons: bool = False,
) -> Tracker:
    """Make a tracker that measures the masks at every step.

    ``state = tracker.init(params)`` remembers the masks of the first params.
    ``metrics, state = tracker.update(params, state)`` measures, and remembers the new
    masks; call it after `optax.apply_updates`, inside the jitted step. It works under
    `jax.jit`, `jax.lax.scan` and `jax.vmap` over seeds, and its state can be donated.

    The metrics are scalars in a flat dict:

    - ``density``: kept fraction of the leaves that the plan makes sparse, together.
    - ``density_all``: kept fraction of all params, biases and other dense leaves
      included; they keep everything.
    - ``sad``: int32, mask entries changed since the last call; see `metrics.sad`.
    - ``flip_rate``: ``sad`` divided by the number of entries.
    - ``kept_magnitude``: part of the magnitude that is kept; see
      `metrics.kept_magnitude`.
    - ``density/<path>``, ``flip_rate/<path>``, ``kept_magnitude/<path>``: the same
      for each sparse leaf, with the path names of the plan.
    - ``itop`` and ``itop/<path>``, with `include_itop`: part of the positions that any
      mask since `init` has kept; see `metrics.explore`.
    - ``active_neurons`` and ``active_neurons/<path>``, with `include_neurons`: share of
      the neurons that have an active input; see `nm.active_neurons`.
    - ``fan_in_max`` and ``fan_in_max/<path>``, with `include_neurons`: int32, the most
      active inputs of a neuron. It grows where neurons are ablated and others share
      their budget.

    The state costs one byte per weight of a sparse leaf: a quarter of float32
    weights, a twelfth of them with both moments of Adam. `include_itop` doubles it.

    Args:
      plan: the plan of the params.
      include_sad: False leaves ``sad`` out, for plans of 2**31 weights or more,
        which an int32 cannot count. The other metrics are exact at any size.
      include_itop: whether to measure how much of the layers has been explored, for
        methods that drop and grow. Changes the structure of the state.
      include_neurons: whether to measure neurons, for methods that ablate them.

    Returns:
      A `Tracker`. Masks are computed from the magnitude of the params; where masks
      are held elsewhere, give them: ``update(params, state, nm.masks(opt_state))``.
      Both functions raise a ValueError if params or masks do not fit the plan.

    Raises:
      ValueError: the plan has more than 2**31 - 1 sparse weights and `include_sad`.

    Example:
      >>> import jax.numpy as jnp
      >>> import nmjax as nm
      >>> params = {"kernel": jnp.tile(jnp.arange(1.0, 5.0)[:, None], (1, 8))}
      >>> tracker = nm.tracker(nm.plan(params, nm.NM(2, 4)))
      >>> state = tracker.init(params)
      >>> metrics, state = tracker.update({"kernel": params["kernel"][::-1]}, state)
      >>> int(metrics["sad"]), float(metrics["flip_rate/kernel"])
      (32, 1.0)

    Reference:
      SAD: Zhou et al., 2021, arXiv 2102.04010. Flip rate: Hu et al., 2024, arXiv
      2404.01847. ITOP: Liu et al., 2021, arXiv 2102.02887. Ablated neurons: Lasby et
      al., 2024, arXiv 2305.02299.
    """
    if include_sad and plan.size > metrics.INT32_MAX:
        raise ValueError(
            f"the plan has {plan.size} sparse weights; the int32 total 'sad' counts "
            f"to {metrics.INT32_MAX}. Give include_sad=False: flip_rate stays exact"
        )

    def init(params: Params, masks: Masks | None = None) -> Any:
        masks = _masks_of(plan, params, masks)
        if not include_itop:
            return TrackerState(masks)
        # A copy: donation fails where two slots share a buffer.
        return ExploringState(masks, jax.tree.map(jnp.copy, masks))

    def update(
        params: Params, state: Any, masks: Masks | None = None
    ) -> tuple[dict[str, Array], Any]:
        _check_state(state, include_itop)
        masks = _masks_of(plan, params, masks)
        measured = _measure(params, state.previous, masks)
        if include_sad:
            measured["sad"] = metrics.sad(state.previous, masks)
        state = state._replace(previous=masks)
        if include_neurons:
            measured |= _measure_neurons(masks, plan)
        if include_itop:
            explored = metrics.explore(state.explored, masks)
            measured |= _with_leaves("itop", metrics.density, explored)
            state = state._replace(explored=explored)
        return measured, state

    return Tracker(init, update)


def _measure(params: Params, old: Masks, new: Masks) -> dict[str, Array]:
    """Apply every metric to the tree and to its leaves."""
    out = {"density_all": metrics.density_all(params, new)}
    for metric, trees in (
        (metrics.density, (new,)),
        (metrics.flip_rate, (old, new)),
        (metrics.kept_magnitude, (params, new)),
    ):
        out |= _with_leaves(metric.__name__, metric, *trees)
    return out


def _measure_neurons(masks: Masks, plan: Plan) -> dict[str, Array]:
    """Measure which neurons have inputs, and how many."""
    counts = neurons.fan_in(masks, plan)
    active = jax.tree.map(lambda count: count > 0, counts)
    return _with_leaves("active_neurons", metrics.density, active) | _with_leaves(
        "fan_in_max", lambda tree: neurons.fan_in_summary(tree).max, counts
    )


def _with_leaves(
    name: str, metric: Callable[..., Array], *trees: PyTree
) -> dict[str, Array]:
    """Apply a metric to trees and to their leaves."""
    leaves = metrics.per_leaf(metric, *trees)
    return {name: metric(*trees)} | {f"{name}/{p}": v for p, v in leaves.items()}


def _check_state(state: Any, include_itop: bool) -> None:
    """Raise unless a state comes from a tracker of the same options."""
    wanted = ExploringState if include_itop else TrackerState
    if not isinstance(state, wanted):
        raise TypeError(
            f"state has type {type(state).__name__}, but a tracker with include_itop="
            f"{include_itop} keeps a {wanted.__name__}: make it with this tracker's "
            "init"
        )


def _masks_of(plan: Plan, params: Params, masks: Masks | None) -> Masks:
    """Compute masks, or check and copy those given."""
    if masks is None:
        return compute_masks(params, plan)

    def check(leaf_plan: LeafPlan, leaf: Any, mask: Any) -> Any:
        if is_masked(mask):
            raise ValueError(
                f"leaf {leaf_plan.path!r} is {leaf_plan.pattern} in the plan, but the "
                "given masks leave it dense; they were made for another plan"
            )
        # A copy: donation fails where two states share a buffer.
        return jnp.copy(mask)

    def check_dense(leaf: Any, mask: Any) -> Any:
        if is_masked(mask):
            return mask
        raise ValueError(
            f"the given masks have a mask of shape {jnp.shape(mask)} for a leaf that "
            "is dense in the plan; they were made for another plan"
        )

    return map_planned(check, plan, params, masks, otherwise=check_dense)
