import dataclasses
import math
import struct

import numpy as np
import pytest

from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.report import markers
from modjax.scaling.report.figures import (
    curves_figure,
    draw_all,
    isoflop_figure,
    normalised_figure,
    optima_figure,
)
from modjax.scaling.report.learning_curves import Curve, read_curves
from modjax.scaling.report.markers import COLOURS


def marks(figure, prefix):
    return {
        line.get_gid(): line
        for ax in figure.axes
        for line in ax.lines
        if (line.get_gid() or "").startswith(prefix)
    }


def texts(figure):
    return " ".join(text.get_text().replace("\n", " ") for ax in figure.axes for text in ax.texts)


@pytest.fixture
def mixed(make_sweep):
    """Three arms: one diverged run, and one refused fit with two sizes at the first budget."""
    records = make_sweep(arms=("dense", "mod", "stochastic"), noise=0.004)
    kept = []
    for r in records:
        if r.variant == "stochastic" and r.budget_flops == 1e12 and r.d_model > 64:
            continue
        if r.run_id == "mod-1e+13-n4-s0":
            r = dataclasses.replace(r, status="diverged", eval_loss=None, diverged_step=7)
        kept.append(r)
    return kept


def test_every_figure_is_a_print_wide_png_and_an_svg_that_marks_every_run(mixed, make_workdir):
    workdir = make_workdir(mixed)
    paths = draw_all(
        mixed, fit_all(mixed, draws=50), read_curves(workdir, mixed).curves, workdir / "f"
    )
    assert list(paths) == ["isoflop", "normalised", "curves", "optima"]
    for path in paths.values():
        png = path.with_suffix(".png").read_bytes()
        width = struct.unpack(">I", png[16:20])[0]
        assert width == round(10 / 2.54 * 300) and len(png) > 10_000
    for name, wanted in (
        ("isoflop", mixed),
        ("normalised", [r for r in mixed if r.eval_loss is not None]),
        ("curves", mixed),
    ):
        svg = paths[name].read_text()
        assert all(f'id="run:{r.run_id}"' in svg for r in wanted), name


def test_optima_are_drawn_where_accepted_and_refusals_are_said(mixed):
    figure = isoflop_figure(mixed, fit_all(mixed, draws=50))
    optima = marks(figure, "optimum:")
    assert len(optima) == 8 and "optimum:stochastic:1000000000000.0" not in optima
    assert "stochastic refused: 2 finished sizes" in texts(figure)
    (x,), (y,) = optima["optimum:dense:1000000000000.0"].get_data()
    np.testing.assert_allclose((x, y), (0.2 * 1e12**0.5, 6 * 1e12**-0.04), rtol=0.05)


def test_more_refusals_than_a_panel_has_room_for_are_counted(make_sweep):
    records = make_sweep(arms=("dense", "a", "b", "c", "d"), sizes=3)
    said = texts(isoflop_figure(records, fit_all(records, draws=50)))
    assert said.count("5 arms refused") == 3 and "finished sizes" not in said


def test_arms_differ_in_colour_and_marker_and_line_style(mixed):
    (legend,) = isoflop_figure(mixed, fit_all(mixed, draws=50)).legends
    shown = legend.legend_handles[:3]
    assert [line.get_color() for line in shown] == list(COLOURS[:3])
    for look in (lambda line: line.get_marker(), lambda line: line._dash_pattern):
        assert len({str(look(line)) for line in shown}) == 3


def test_more_arms_than_colours_differ_by_marker_and_by_line_alone(make_record):
    arms = [f"arm{i}" for i in range(13)]
    records = [make_record(run_id=arm, variant=arm) for arm in arms]
    (legend,) = isoflop_figure(records, fit_all(records, draws=50)).legends
    lines = legend.legend_handles
    assert len({line.get_color() for line in lines[:6]}) == 6
    assert len({(line.get_color(), line.get_marker()) for line in lines}) == 13
    assert len({(line.get_color(), str(line._dash_pattern)) for line in lines}) == 13


def test_a_diverged_run_does_not_set_the_limits_of_the_curves(make_record):
    records = [
        make_record(run_id="good"),
        make_record(run_id="bad", status="diverged", eval_loss=None, diverged_step=9),
    ]
    step = np.arange(1, 11)  # of 10 steps: every point is one
    curves = [
        Curve("good", "dense", 10, step, np.ones(10), step * 1e11, np.linspace(6, 2, 10)),
        Curve("bad", "dense", 10, step, np.ones(10), step * 1e11, np.geomspace(6, 1e6, 10)),
    ]
    figure = curves_figure(curves, fit_all(records, draws=50))
    assert figure.axes[0].get_ylim() == pytest.approx((0.97 * 2, 2 * 2))
    figure = curves_figure(curves[1:], fit_all(records, draws=50))
    assert figure.axes[0].get_ylim()[1] == pytest.approx(1e6), "alone, it is shown"


def test_normalised_points_are_ratios_to_the_optimal_baseline_of_their_budget(make_sweep):
    records = make_sweep(budgets=(1e12, 1e13))
    points = marks(normalised_figure(records, fit_all(records, draws=50)), "run:")
    for r in records:
        (x,), (y,) = points[f"run:{r.run_id}"].get_data()
        flops = 2 * 0.2 * r.budget_flops**0.5
        np.testing.assert_allclose(x, r.forward_flops_per_token / flops, rtol=1e-3)
        np.testing.assert_allclose(y, r.eval_loss / (6 * r.budget_flops**-0.04), rtol=1e-4)


def test_without_an_accepted_baseline_the_figure_says_so(make_sweep):
    records = make_sweep(sizes=3)
    figure = normalised_figure(records, fit_all(records, draws=50))
    assert "accepted optimum of dense" in texts(figure)


@pytest.mark.parametrize("ends", [(0.0, 3e5), (1e5, math.inf), (0.0, math.inf)])
def test_an_interval_that_is_open_at_an_end_is_a_dotted_line(ends, make_sweep):
    fits = fit_all(make_sweep(noise=0.002), draws=50)
    first, *others = fits.parabolas
    opened = (dataclasses.replace(first, optimum_interval=ends), *others)
    sizes = optima_figure(dataclasses.replace(fits, parabolas=opened)).axes[0]
    first = [line for line in sizes.lines if list(line.get_xdata()) == [1e12, 1e12]]
    assert [line.get_linestyle() for line in first] == [":", "-"], "one arm's, and the other's"


def test_one_arm_at_one_budget_gives_what_it_can(make_sweep, tmp_path):
    records = make_sweep(arms=("dense",), budgets=(1e12,))
    fits = fit_all(records, draws=50)
    assert optima_figure(fits) is None
    assert list(draw_all(records, fits, [], tmp_path)) == ["isoflop", "normalised"]


def test_of_very_many_runs_an_arm_is_one_artist_without_ids(mixed, make_workdir, monkeypatch):
    monkeypatch.setattr(markers, "MANY", len(mixed) - 1)
    workdir, fits = make_workdir(mixed), fit_all(mixed, draws=50)
    curves = read_curves(workdir, mixed).curves
    for name, path in draw_all(mixed, fits, curves, workdir / "f").items():
        svg = path.read_text()
        assert 'id="run:' not in svg
        assert ("<image" in svg) == (name != "optima"), name
    assert len(curves_figure(curves, fits).axes[0].collections) == 3
    panel = isoflop_figure(mixed, fits).axes[0]
    points = [line for line in panel.lines if line.get_rasterized()]
    assert sorted(len(line.get_xdata()) for line in points) == [2, 5, 5]


def test_without_a_curve_the_figure_of_an_earlier_report_goes(mixed, make_workdir):
    workdir, fits = make_workdir(mixed), fit_all(mixed, draws=50)
    draw_all(mixed, fits, read_curves(workdir, mixed).curves, workdir / "f")
    assert (workdir / "f/curves.png").exists() and (workdir / "f/curves.svg").exists()
    assert "curves" not in draw_all(mixed, fits, [], workdir / "f")
    assert not list((workdir / "f").glob("curves.*"))
