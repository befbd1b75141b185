"""Budgets: published densities, exact integer totals, loud errors."""

import math

import hypothesis
import hypothesis.strategies as st
import pytest

from nmjax import distributions

LENET = [(784, 300), (300, 100), (100, 10)]


def test_erk_matches_published_lenet_densities():
    found = distributions.densities(LENET, "erk", 0.1)
    assert [round(d, 5) for d in found] == [0.07957, 0.23019, 1.0]


def test_erk_gives_published_lenet_fan_ins():
    sizes = [math.prod(s) for s in LENET]
    budgets = distributions.allocate(
        sizes, distributions.densities(LENET, "erk", 0.1), 26_620
    )
    assert [b // s[-1] for b, s in zip(budgets, LENET, strict=True)] == [62, 69, 100]
    assert sum(budgets) == 26_620


def test_erk_repeats_until_no_density_passes_one():
    # At first only the smallest layer passes 1; once it is dense, the next one does.
    shapes = [(1000, 1000), (40, 40), (10, 10)]
    sizes = [math.prod(shape) for shape in shapes]
    density = 41_900 / sum(sizes)
    epsilon = 41_900 / (2000 + 80 + 20)
    assert epsilon * 80 / 1600 < 1 < epsilon * 20 / 100
    found = distributions.densities(shapes, "erk", density)
    assert found[1:] == [1.0, 1.0]
    assert found[0] == pytest.approx((41_900 - 1700) / 1_000_000)


def test_er_ignores_kernel_axes():
    conv, dense = (3, 3, 64, 64), (64, 64)
    er = distributions.densities([conv, dense], "er", 0.05)
    erk = distributions.densities([conv, dense], "erk", 0.05)
    assert er[0] == pytest.approx(er[1])
    assert erk[0] < erk[1]


def test_stacked_layers_count_as_many_leaves():
    stacked = distributions.densities([(64, 32), (128, 16)], "erk", 0.2, copies=[3, 1])
    listed = distributions.densities([(64, 32)] * 3 + [(128, 16)], "erk", 0.2)
    assert stacked == pytest.approx([listed[0], listed[3]])


@hypothesis.given(
    st.lists(st.integers(1, 10_000), min_size=1, max_size=20),
    st.floats(0.001, 1.0),
)
def test_budgets_add_up_exactly(sizes, density):
    budgets = distributions.allocate(sizes, [density] * len(sizes))
    assert sum(budgets) == distributions.round_half_up(sum(s * density for s in sizes))
    assert all(0 <= b <= s for b, s in zip(budgets, sizes, strict=True))
    assert all(
        abs(b - s * density) < 1.0 + 1e-6 for b, s in zip(budgets, sizes, strict=True)
    )


@hypothesis.given(
    st.lists(
        st.tuples(st.integers(1, 200), st.integers(1, 200)), min_size=1, max_size=8
    ),
    st.floats(0.01, 1.0),
    st.sampled_from(["uniform", "er", "erk"]),
)
def test_densities_meet_the_target(shapes, density, kind):
    found = distributions.densities(shapes, kind, density)
    sizes = [math.prod(s) for s in shapes]
    assert all(0 < d <= 1 for d in found)
    total = sum(d * s for d, s in zip(found, sizes, strict=True))
    assert total == pytest.approx(density * sum(sizes))


def test_float_noise_does_not_lose_a_weight():
    assert distributions.allocate([200], [1 - 0.8]) == [40]


def test_allocate_moves_what_does_not_fit():
    assert distributions.allocate([2, 10], [1.0, 0.1], total=5) == [2, 3]
    assert sum(distributions.allocate([2, 10], [1.0, 0.5], total=3)) == 3


@pytest.mark.parametrize("bad", [0.0, -0.1, 1.5, float("nan")])
def test_densities_outside_their_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"KEPT fraction and must be in \(0, 1\]"):
        distributions.erk(bad)


def test_a_density_that_is_no_number_is_refused(unchecked):
    with pytest.raises(TypeError, match="must be a float, got True"):
        distributions.uniform(True)


def test_erk_of_a_vector_is_refused():
    with pytest.raises(ValueError, match=r"erk needs leaves of rank >= 2.*\(7,\)"):
        distributions.densities([(7,)], "erk", 0.5)


def test_more_than_everything_cannot_be_kept():
    with pytest.raises(ValueError, match="total=7 weights cannot be kept"):
        distributions.allocate([3, 3], [0.5, 0.5], total=7)
