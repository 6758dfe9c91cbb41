"""The figure of accuracy against operations."""

import re

import pytest

import trend
from small import ROOT


def test_a_point_is_the_mean_test_accuracy_of_its_seeds():
    point = trend.point_of("cpu", ("cpu/seed0", "cpu/seed1", "cpu/seed2"))
    assert point.accuracy == pytest.approx((86.45 + 86.39 + 86.44) / 3)
    assert point.operations == pytest.approx(8.904e13, rel=1e-3)


def test_the_figure_shows_every_published_accuracy_that_the_page_lists():
    page = (ROOT / "docs/related.md").read_text()
    for point in trend.PUBLISHED:
        assert re.search(rf"\b{point.accuracy}\b", page), point.name
    (axes,) = trend.draw().axes
    assert sum(len(line.get_xdata()) for line in axes.lines) == len(trend.PUBLISHED) + len(
        trend.OURS
    )
