"""Distributions: one target density -> an integer budget of weights per leaf.

`density` is the kept fraction. A distribution gives each leaf a real density;
`allocate` rounds them to integers that add up to the target exactly.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Distribution:
    """How a target density is shared out between leaves; see `uniform` and others.

    Attributes:
      kind: ``"uniform"``, ``"er"``, ``"erk"`` or ``"global"``.
      density: the kept fraction of all leaves together, in (0, 1].
      limits: for ``"global"``, the least and the largest density of a leaf.
    """

    kind: Literal["uniform", "er", "erk", "global"]
    density: float
    limits: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        """Check the target and the limits."""
        check_density(self.density, f"{self.kind} distribution")
        low, high = self.limits
        if not 0.0 <= low <= self.density <= high <= 1.0:
            raise ValueError(
                f"a leaf's density between {low} and {high} does not go with a density "
                f"of {self.density} in all: 0 <= min_density <= density <= max_density "
                "<= 1 must hold"
            )


def check_density(density: float, what: str) -> None:
    """Raise unless a density is a number in (0, 1].

    Args:
      density: the kept fraction.
      what: what the density belongs to, for the message.

    Raises:
      TypeError: it is not a real number.
      ValueError: it is outside (0, 1].

    Example:
      >>> from nmjax import distributions
      >>> distributions.check_density(0.5, "leaf 'w'")
    """
    if isinstance(density, bool) or not isinstance(density, int | float):
        raise TypeError(f"density of {what} must be a float, got {density!r}")
    if not 0.0 < density <= 1.0:
        raise ValueError(
            f"density of {what} is {density!r}; it is the KEPT fraction and must be in "
            "(0, 1] (for a sparsity s, give 1 - s)"
        )


def uniform(density: float) -> Distribution:
    r"""Give every sparse leaf the same density.

    .. math:: d_i = d

    Args:
      density: kept fraction, in (0, 1].

    Returns:
      A distribution for `nm.plan(..., density=...)`.

    Raises:
      ValueError: `density` is outside (0, 1].

    Example:
      >>> import nmjax as nm
      >>> nm.uniform(0.1)
      Distribution(kind='uniform', density=0.1, limits=(0.0, 1.0))
    """
    return Distribution("uniform", density)


def er(density: float) -> Distribution:
    r"""Scale densities as in an Erdos-Renyi graph of the last two axes.

    .. math:: d_i \propto \frac{n_{in} + n_{out}}{n_{in} \, n_{out}}

    Leaves whose density would pass 1 are made dense and the rest is solved again.

    Args:
      density: kept fraction of all sparse leaves together, in (0, 1].

    Returns:
      A distribution for `nm.plan(..., density=...)`.

    Raises:
      ValueError: `density` is outside (0, 1].

    Example:
      >>> import nmjax as nm
      >>> nm.er(0.1).kind
      'er'

    Reference:
      Mocanu et al., "Scalable training of artificial neural networks with adaptive
      sparse connectivity inspired by network science", 2018, arXiv 1707.04780.
    """
    return Distribution("er", density)


def erk(density: float) -> Distribution:
    r"""Scale densities as in an Erdos-Renyi graph, kernel axes included.

    .. math:: d_i = \epsilon \frac{\sum_a n_{i,a}}{\prod_a n_{i,a}}

    with :math:`\epsilon` such that the kept weights of all leaves add up to the
    target. While some :math:`d_i > 1`, the leaves with the largest are made
    dense, taken out, and the rest is solved again.

    Args:
      density: kept fraction of all sparse leaves together, in (0, 1].

    Returns:
      A distribution for `nm.plan(..., density=...)`.

    Raises:
      ValueError: `density` is outside (0, 1].

    Example:
      >>> from nmjax import distributions
      >>> lenet = [(784, 300), (300, 100), (100, 10)]
      >>> [round(d, 5) for d in distributions.densities(lenet, "erk", 0.1)]
      [0.07957, 0.23019, 1.0]

    Reference:
      Evci, Gale, Menick, Castro and Elsen, "Rigging the Lottery: Making All Tickets
      Winners", 2020, arXiv 1911.11134, section 3.
    """
    return Distribution("erk", density)


def global_(
    density: float, *, min_density: float = 0.0, max_density: float = 1.0
) -> Distribution:
    """Let all sparse leaves compete for one budget by their scores.

    The masks keep the best `round(density * size)` weights of the whole tree, so
    that densities follow the scores and change with them. For `Unstructured` leaves.
    Every leaf keeps at least `min_density` and at most `max_density` of its weights.

    Args:
      density: kept fraction of all sparse leaves together, in (0, 1].
      min_density: least kept fraction of a leaf, in [0, density].
      max_density: largest kept fraction of a leaf, in [density, 1].

    Returns:
      A distribution for `nm.plan(..., density=...)`.

    Raises:
      ValueError: `density` is outside (0, 1], or the limits do not hold it.

    Example:
      >>> import nmjax as nm
      >>> nm.global_(0.1, min_density=0.02).limits
      (0.02, 1.0)
    """
    return Distribution("global", density, (min_density, max_density))


def densities(
    shapes: Sequence[Shape],
    kind: Literal["uniform", "er", "erk"],
    density: float,
    copies: Sequence[int] | None = None,
) -> list[float]:
    """Compute the real-valued density of every leaf.

    Args:
      shapes: the shape of each leaf (of one layer, where layers are stacked).
      kind: ``"uniform"``, ``"er"`` or ``"erk"``; see the functions of these names.
      density: the target, in (0, 1].
      copies: how many layers each shape stands for. Default 1 each.

    Returns:
      One density per shape, in (0, 1], whose weighted mean is the target.

    Raises:
      ValueError: `density` is outside (0, 1], or a leaf has rank below 2.

    Example:
      >>> from nmjax import distributions
      >>> distributions.densities([(8, 8), (8, 4)], "uniform", 0.25)
      [0.25, 0.25]
    """
    check_density(density, f"{kind} distribution")
    if kind == "uniform":
        return [float(density)] * len(shapes)
    copies = [1] * len(shapes) if copies is None else list(copies)
    for shape in shapes:
        if len(shape) < 2:
            raise ValueError(f"{kind} needs leaves of rank >= 2, got shape {shape}")
    axes = slice(None) if kind == "erk" else slice(-2, None)
    raw = [sum(shape[axes]) / math.prod(shape[axes]) for shape in shapes]
    sizes = [c * math.prod(shape) for c, shape in zip(copies, shapes, strict=True)]
    target = density * sum(sizes)
    dense: set[int] = set()
    while True:
        free = [i for i in range(len(shapes)) if i not in dense]
        room = target - sum(sizes[i] for i in dense)
        weight = sum(raw[i] * sizes[i] for i in free)
        epsilon = room / weight if free else 0.0
        worst = max((raw[i] for i in free), default=0.0)
        # A relative slack, so that rounding does not push out a leaf at exactly 1.
        if epsilon * worst <= 1.0 + 1e-12:
            break
        dense.update(i for i in free if raw[i] == worst)
    return [1.0 if i in dense else min(1.0, epsilon * raw[i]) for i in range(len(raw))]


def allocate(
    sizes: Sequence[int], fractions: Sequence[float], total: int | None = None
) -> list[int]:
    """Round densities to integer budgets that add up to the target exactly.

    Largest remainders: every leaf gets the floor of its share; what is then
    missing goes, one weight each, to the leaves with the largest remainders
    (ties to the lowest index), never above a leaf's size.

    Args:
      sizes: the number of weights of each leaf.
      fractions: the density of each leaf, in [0, 1].
      total: the sum to reach. Default: the rounded sum of sizes times densities.

    Returns:
      One budget per leaf, 0 <= budget <= size, adding up to `total`.

    Raises:
      ValueError: `total` is negative or more than all weights.

    Example:
      >>> from nmjax import distributions
      >>> distributions.allocate([10, 10, 10], [0.25, 0.25, 0.25])
      [3, 3, 2]
    """
    shares = [size * f for size, f in zip(sizes, fractions, strict=True)]
    if total is None:
        total = round_half_up(sum(shares))
    if not 0 <= total <= sum(sizes):
        raise ValueError(
            f"total={total} weights cannot be kept: the leaves have {sum(sizes)}"
        )
    # Shares a hair below an integer are that integer: 200 * (1 - 0.8) is 40.
    floors = [
        min(size, math.floor(share + 1e-9 * max(1.0, share)))
        for size, share in zip(sizes, shares, strict=True)
    ]
    budgets = list(floors)
    order = sorted(range(len(sizes)), key=lambda i: (floors[i] - shares[i], i))
    while sum(budgets) != total:
        step = 1 if sum(budgets) < total else -1
        missing = abs(total - sum(budgets))
        turn = order if step > 0 else order[::-1]
        movable = [i for i in turn if 0 <= budgets[i] + step <= sizes[i]]
        for i in movable[:missing]:
            budgets[i] += step
    return budgets


def round_half_up(value: float) -> int:
    """Round to the nearest integer, halves up, forgiving float noise.

    Args:
      value: a non-negative number.

    Returns:
      The nearest integer; 2.5 gives 3.

    Example:
      >>> from nmjax import distributions
      >>> distributions.round_half_up(200 * (1 - 0.8)), distributions.round_half_up(2.5)
      (40, 3)
    """
    return math.floor(value + 0.5 + 1e-9)
