"""The figure of accuracy against operations: its law, and that it is drawn of the recorded runs."""

import pytest

import trend


def test_the_law_goes_through_points_that_follow_it():
    points = [(flops, 300 * flops**-0.25) for flops in (1e8, 1e12, 1e16)]
    assert trend.power_law(points) == pytest.approx((300, 0.25))


def test_a_point_is_the_mean_over_the_seeds():
    results = [{"validation_accuracy": x, "training_flops": 1e13} for x in (0.8, 0.82, 0.87)]
    assert trend.point_of(results) == pytest.approx((1e13, 17))


def test_the_law_is_fitted_to_the_best_run_of_each_study():
    for study, change in trend.FITTED.items():
        points = trend.points_of(study)
        assert min(points, key=lambda name: points[name][1]) == change


def test_it_shows_every_run_and_prints_the_forecast(capsys):
    (axes,) = trend.draw().axes
    shown = sum(len(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "None")
    assert shown == sum(len(trend.points_of(study)) for study in trend.FITTED) + len(trend.RUNS)
    assert "1e+15 operations: 90.7%" in capsys.readouterr().out  # as docs/recipe.md states
