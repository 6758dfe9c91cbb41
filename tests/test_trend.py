"""The figure of accuracy against operations: its law, and that it is drawn of the recorded runs."""

import pytest

import trend
from study import STUDIES
from trend import Point


def test_the_law_goes_through_points_that_follow_it():
    points = [Point(flops, 300 * flops**-0.25, 0.0, 64) for flops in (1e8, 1e12, 1e16)]
    assert trend.power_law(points) == pytest.approx((300, 0.25))


def test_a_point_is_the_mean_and_deviation_over_the_seeds():
    results = [
        {"validation_accuracy": accuracy, "training_flops": 1e13, "model": {"width": 48}}
        for accuracy in (0.8, 0.82, 0.84)
    ]
    assert trend.point_of(results) == pytest.approx(Point(1e13, 18, 2, 48))
    assert trend.point_of(results[:1]) == pytest.approx(Point(1e13, 20, 0, 48))


def test_the_law_is_fitted_to_the_best_run_of_each_study():
    for study, change in trend.FITTED.items():
        points = trend.points_of(STUDIES[study])
        assert min(points, key=lambda name: points[name].error) == change


def test_it_shows_every_run_and_prints_the_forecast(capsys):
    left = trend.draw().axes[0]
    shown = sum(len(line.get_xdata()) for line in left.lines if line.get_linestyle() == "None")
    runs = sum(len(trend.points_of(STUDIES[study])) for study in trend.FITTED)
    assert shown == runs + len(trend.RUNS)
    assert "1e+15 operations: 90.7%" in capsys.readouterr().out  # as docs/recipe.md states
