"""Plots of results against a setting."""

import numpy as np
import pytest

from nmjax import reports
from nmjax.reports import sweep


def rows_of():
    rows = [{"method": "dense", "sparsity": None, "accuracy": a} for a in (94.0, 96.0)]
    for seed in (0, 1):
        for s, accuracy in ((90, 80.0), (80, 90.0), (99, 50.0)):
            rows.append(
                {"method": "rigl", "sparsity": s, "accuracy": accuracy + 2 * seed}
            )
    rows.append({"method": "set", "sparsity": 99, "accuracy": 40.0})
    return rows


@pytest.fixture
def figure(monkeypatch, tmp_path):
    kept = []
    monkeypatch.setattr(sweep, "save", lambda figure, path: kept.append(figure) or path)
    reports.plot_sweep(rows_of(), tmp_path / "x.png", "sparsity", {"accuracy": "%"})
    return kept[0]


def test_lines_are_means_over_seeds_in_order_of_the_setting(figure):
    axis = figure.axes[0]
    assert [t.get_text() for t in axis.get_xticklabels()] == ["80", "90", "99"]
    lines = [container.lines[0] for container in axis.containers]
    np.testing.assert_array_equal(lines[0].get_xdata(), [0, 1, 2])
    np.testing.assert_array_equal(lines[0].get_ydata(), [91.0, 81.0, 51.0])
    np.testing.assert_array_equal(lines[1].get_xdata(), [2])


def test_bars_go_from_the_lowest_seed_to_the_highest(figure):
    bars = figure.axes[0].containers[0].lines[2][0].get_segments()
    np.testing.assert_array_equal(bars[0], [[0, 90.0], [0, 92.0]])


def test_a_group_without_the_setting_is_a_level(figure):
    level = next(x for x in figure.axes[0].lines if x.get_linestyle() == "--")
    np.testing.assert_array_equal(level.get_ydata(), [95.0, 95.0])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["dense", "rigl", "set"]


def test_rows_without_a_key_are_refused(tmp_path):
    with pytest.raises(
        ValueError, match="a row has no 'loss'; it has method, sparsity"
    ):
        reports.plot_sweep(rows_of(), tmp_path / "x.png", "sparsity", {"loss": "loss"})
    dense = rows_of()[:1]
    with pytest.raises(ValueError, match="no row has a value for 'sparsity'"):
        reports.plot_sweep(dense, tmp_path / "x.png", "sparsity", {"accuracy": "%"})
