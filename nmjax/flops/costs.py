"""Costs: counts of multiply-accumulates weighed by densities, as fractions of dense.

Of a dense training step, the forward pass is one third; the backward pass is two more
products of the same size for each of the forward pass, one for the gradient of the
inputs and one for that of the weights. (The first layer needs none for its inputs; that
is counted all the same.) This is the accounting of RigL's appendix (Evci et al., 2020,
arXiv 1911.11134). The optimizer and the change of masks are left out.
"""

import dataclasses
from collections.abc import Iterable, Mapping

import jax
import numpy as np

from nmjax.flops.tracing import Macs
from nmjax.paths import is_masked, named_leaves
from nmjax.plans import Plan
from nmjax.typing import Masks


@dataclasses.dataclass(frozen=True)
class LeafCost:
    """What the products with one leaf cost.

    Attributes:
      path: path name, as in the plan.
      dense: MACs with all weights.
      density: kept fraction of the weights.
    """

    path: str
    dense: int
    density: float

    @property
    def sparse(self) -> float:
        """MACs with the kept weights."""
        return self.dense * self.density


@dataclasses.dataclass(frozen=True)
class Forward:
    """Theoretical cost of a forward pass; made by `forward`. Printed, it is a table.

    Attributes:
      leaves: one `LeafCost` for each leaf, in the order of the params.
      other: MACs that belong to no leaf and are never saved.
    """

    leaves: tuple[LeafCost, ...]
    other: int

    @property
    def dense(self) -> int:
        """MACs of the dense model."""
        return sum(leaf.dense for leaf in self.leaves) + self.other

    @property
    def sparse(self) -> float:
        """MACs of the sparse model."""
        return sum(leaf.sparse for leaf in self.leaves) + self.other

    @property
    def fraction(self) -> float:
        """MACs of the sparse model as a fraction of the dense one's."""
        return self.sparse / self.dense

    def __str__(self) -> str:
        """Show the cost as a table; leaves without a product are left out."""
        rows = [("path", "dense MACs", "density", "sparse MACs")]
        rows += [
            (leaf.path, f"{leaf.dense:,}", f"{leaf.density:.4g}", f"{leaf.sparse:,.0f}")
            for leaf in self.leaves
            if leaf.dense
        ]
        if self.other:
            rows.append(("other", f"{self.other:,}", "1", f"{self.other:,}"))
        total = f"{self.dense:,}", f"{self.fraction:.4g}", f"{self.sparse:,.0f}"
        rows.append(("total", *total))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            row[0].ljust(widths[0])
            + "".join(
                f"  {c.rjust(w)}" for c, w in zip(row[1:], widths[1:], strict=True)
            )
            for row in rows
        ]
        lines.insert(1, "-" * len(lines[0]))
        return "\n".join(lines)


def forward(macs: Macs, plan_or_masks: Plan | Mapping[str, float] | Masks) -> Forward:
    r"""Weigh the cost of a forward pass by what each leaf keeps.

    .. math:: f = \frac{\sum_i c_i d_i + c_{other}}{\sum_i c_i + c_{other}}

    with :math:`c_i` the MACs of leaf i and :math:`d_i` its density, 1 for dense leaves.
    This is also the fraction of inference. A dropped weight saves its share of the
    leaf's products. An ablated neuron saves its own weights, but not those that the
    next layer still holds for its (constant) output.

    Args:
      macs: the counts, from `flops.macs`.
      plan_or_masks: a plan of the same params, whose exact counts are taken; or a
        tree of masks, such as ``nm.masks(state)``, for what is really active; or a
        mapping from path to density. Leaves without an entry are dense, but a plan
        must know every leaf.

    Returns:
      A `Forward`; its `fraction` is f.

    Raises:
      ValueError: plan, masks or mapping name a leaf that was not counted, a leaf is
        not in the plan, a plan leaves densities open because leaves share a global
        budget, a density is outside [0, 1], or no products were counted at all.
      TypeError: a mask is not bool.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import nmjax as nm
      >>> from nmjax import flops
      >>> params = {"in": jnp.ones((16, 32)), "out": jnp.ones((32, 10))}
      >>> fn = lambda params, x: jax.nn.relu(x @ params["in"]) @ params["out"]
      >>> macs = flops.macs(fn, params, jnp.ones((1, 16)))
      >>> cost = flops.forward(macs, nm.plan(params, {"in": nm.NM(1, 4)}))
      >>> print(cost)
      path   dense MACs  density  sparse MACs
      ---------------------------------------
      in            512     0.25          128
      out           320        1          320
      total         832   0.5385          448
    """
    if not macs.total:
        raise ValueError("macs counts no products: fn has none that meets its args")
    if isinstance(plan_or_masks, Plan):
        densities = _planned(macs, plan_or_masks)
    else:
        densities = _given(plan_or_masks)
    for path, density in densities.items():
        if path not in macs.leaves:
            raise ValueError(
                f"leaf {path!r} was not counted; the leaves of macs are: "
                f"{_some(macs.leaves)}. Give flops.macs the same params"
            )
        if not 0 <= density <= 1:
            raise ValueError(f"density of leaf {path!r} is {density!r}, not in [0, 1]")
    leaves = (
        LeafCost(path, cost, float(densities.get(path, 1.0)))
        for path, cost in macs.leaves.items()
    )
    return Forward(tuple(leaves), macs.other)


def dynamic_training(
    fraction: float,
    *,
    total_steps: int,
    delta_t: int = 100,
    stop: int | None = None,
    accumulate: int = 1,
) -> float:
    r"""Give the cost of a training with RigL or SRigL as a fraction of dense.

    Each change of topology needs the dense gradient of the weights in A steps. With f
    the fraction of the forward pass and n changes in T steps,

    .. math:: \frac{3 T f + n A (1 - f)}{3 T}

    In RigL's own code the change takes the place of a gradient step, so that
    :math:`\Delta T + 1` steps cost :math:`3 f \Delta T + 2 f + 1`. Here the change
    comes after the step, on the same batch: :math:`\Delta T` steps cost
    :math:`3 f \Delta T + (1 - f)`. SET, static masks and pruning at initialisation
    never need a dense gradient: their cost is f itself.

    Args:
      fraction: f, from `flops.forward`, in [0, 1].
      total_steps: T, steps of the training.
      delta_t: steps between two changes of topology.
      stop: no change from this step on. Default: 3/4 of `total_steps`, as in `nm.rigl`.
      accumulate: A, gradients summed for each change.

    Returns:
      The fraction.

    Raises:
      ValueError: `fraction` is outside [0, 1], a number of steps is below 1, or
        `accumulate` is above `delta_t`.

    Example:
      >>> from nmjax import flops
      >>> flops.dynamic_training(0.25, total_steps=100, delta_t=10, stop=100)
      0.2725

    Reference:
      Evci et al., 2020, arXiv 1911.11134, appendix.
    """
    _check_fraction("fraction", fraction)
    for name, value in (
        ("total_steps", total_steps),
        ("delta_t", delta_t),
        ("accumulate", accumulate),
    ):
        if value < 1:
            raise ValueError(f"{name}={value!r} must be >= 1")
    if accumulate > delta_t:
        raise ValueError(
            f"accumulate={accumulate} gradients do not fit between two changes of "
            f"topology, delta_t={delta_t} steps apart"
        )
    stop = total_steps * 3 // 4 if stop is None else stop
    changes = max(0, min(stop - 1, total_steps)) // delta_t
    return fraction + changes * accumulate * (1 - fraction) / (3 * total_steps)


def soft_training(fraction: float, *, sparse_input_gradient: bool = True) -> float:
    r"""Give the cost of a training with dense latent weights as a fraction of dense.

    For `nm.sparsify`, `nm.srste` and the like: the forward pass costs f, the gradient
    of the inputs f or 1, and that of the weights 1, since it reaches all of them.

    .. math:: \frac{f + f + 1}{3} \quad\text{or}\quad \frac{f + 1 + 1}{3}

    Args:
      fraction: f, from `flops.forward`, in [0, 1].
      sparse_input_gradient: whether the gradient of the inputs uses the zeros of the
        weights. It can in any count; on hardware for n:m patterns only with
        transposable masks, whose groups run along both axes.

    Returns:
      The fraction. For a dense phase before or after, see `phased_training`.

    Raises:
      ValueError: `fraction` is outside [0, 1].

    Example:
      >>> from nmjax import flops
      >>> round(flops.soft_training(0.5), 4)
      0.6667
      >>> round(flops.soft_training(0.5, sparse_input_gradient=False), 4)
      0.8333
    """
    _check_fraction("fraction", fraction)
    input_gradient = fraction if sparse_input_gradient else 1.0
    return (fraction + input_gradient + 1.0) / 3


def phased_training(phases: Iterable[tuple[int, float]]) -> float:
    r"""Give the cost of a training whose steps do not all cost the same.

    .. math:: \frac{\sum_p T_p f_p}{\sum_p T_p}

    For one-shot pruning, n:m ladders, gradual pruning and dense phases.

    Args:
      phases: pairs of a number of steps and the fraction that each of them costs: 1
        while the model is dense, that of `flops.forward` while masks are held.

    Returns:
      The fraction.

    Raises:
      ValueError: a number of steps is negative, a fraction outside [0, 1], or there
        are no steps.

    Example:
      >>> from nmjax import flops
      >>> flops.phased_training([(100, 1.0), (300, 0.25)])
      0.4375
    """
    total, cost = 0, 0.0
    for steps, fraction in phases:
        _check_fraction("fraction of a phase", fraction)
        if steps < 0:
            raise ValueError(f"a phase of {steps!r} steps; must be >= 0")
        total, cost = total + steps, cost + steps * fraction
    if not total:
        raise ValueError("the phases have no steps")
    return cost / total


def _planned(macs: Macs, plan: Plan) -> dict[str, float]:
    """Give the densities of a plan."""
    for path in macs.leaves:
        if path not in plan.by_path:
            raise ValueError(
                f"leaf {path!r} is not in the plan, whose leaves are: "
                f"{_some(plan.by_path)}. Give flops.macs the params of the plan; what "
                "else fn needs comes after them"
            )
    densities = {}
    for leaf in plan.leaves:
        if leaf.density is None:
            raise ValueError(
                f"leaf {leaf.path!r} shares a global budget: its density is only known "
                "from masks. Give nm.masks(state) or nm.compute_masks(params, plan) in "
                "place of the plan"
            )
        densities[leaf.path] = leaf.density
    return densities


def _given(masks: Masks) -> dict[str, float]:
    """Give the densities of masks, or the given ones."""
    densities = {}
    for path, mask in named_leaves(masks)[0]:
        if is_masked(mask):
            continue
        if isinstance(mask, int | float) and not isinstance(mask, bool):
            densities[path] = float(mask)
            continue
        entries = np.asarray(jax.device_get(mask))
        if entries.dtype != np.bool_:
            raise TypeError(
                f"mask of leaf {path!r} has dtype {entries.dtype}, must be bool"
            )
        densities[path] = int(np.count_nonzero(entries)) / max(1, entries.size)
    return densities


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} must be in [0, 1]")


def _some(paths: Iterable[str]) -> str:
    """List paths, at most ten of them."""
    paths = list(paths)
    return ", ".join(paths[:10]) + (", ..." if len(paths) > 10 else "")
