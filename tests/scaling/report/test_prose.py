import dataclasses
import math
import re

import pytest

from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.report.prose import (
    gap_sentence,
    law_sentence,
    parabola_sentence,
    sentences,
    span,
)
from modjax.scaling.report.tables import optimum_table
from modjax.scaling.report.terminal import render_text


def test_a_gap_names_both_arms_its_direction_and_whether_it_could_be_none(make_sweep):
    gap = fit_all(make_sweep(budgets=(1e12,)), draws=50).gaps[0]
    said = gap_sentence(gap)
    assert "mod against dense at 1e12 FLOPs" in said and "0.0300 nats lower" in said
    assert "cannot tell" not in said
    worse = dataclasses.replace(gap, loss=0.01, loss_interval=(-0.02, 0.04))
    assert "0.0100 nats higher" in gap_sentence(worse)
    assert "cannot tell from no difference" in gap_sentence(worse)


def test_an_off_centre_optimum_is_called_so(make_sweep):
    fits = fit_all(make_sweep(arms=("dense",), budgets=(1e12,), offset=0.4), draws=50)
    assert "off-centre to bias it" in parabola_sentence(fits.parabolas[0], fits.size)


def test_cells_with_several_seeds_have_their_mean_and_spread_where_no_parabola_is(make_record):
    losses = {"low": (2.10, 2.20, 2.15), "high": (2.3, 2.5), "alone": (2.0,)}
    records = [
        make_record(run_id=f"{arm}-s{seed}", variant=arm, seed=seed, eval_loss=loss)
        for arm, values in losses.items()
        for seed, loss in enumerate(values)
    ]
    records[0] = dataclasses.replace(records[0], status="diverged", eval_loss=None)
    text = render_text(fit_all(records, draws=50))
    shown = [line.split() for line in text.splitlines() if line.split()[1:3] == ["1e12", "64"]]
    assert shown == [
        ["low", "1e12", "64", "200k", "2", "2.1750", "0.0354"],
        ["high", "1e12", "64", "200k", "2", "2.4000", "0.1414"],
    ]
    assert "std of a seed" not in render_text(fit_all(records[-1:], draws=50))


def test_a_law_through_two_points_is_called_exact(make_sweep):
    fits = fit_all(make_sweep(arms=("dense",), budgets=(1e12, 1e13)), draws=50)
    assert "two points determine it exactly" in law_sentence(fits.laws[0], fits.size)


def test_the_text_has_a_row_per_arm_and_budget_and_a_sentence_per_result(make_sweep):
    records = make_sweep()
    records[-1] = dataclasses.replace(records[-1], status="diverged", eval_loss=None)
    records = [r for r in records if not (r.variant == "mod" and r.budget_flops == 1e12)] + [
        r for r in records if r.variant == "mod" and r.budget_flops == 1e12
    ][:3]
    fits = fit_all(records, draws=50)
    text = render_text(fits)
    said = sentences(fits)
    assert len(said) == 3 + 12 + 6 + 2 + 1
    assert all(sentence in text and sentence.endswith(".") for sentence in said)
    rows = re.findall(r"^(?:dense|mod) +(?:1e12|3e12|1e13) +\d ", text, re.MULTILINE)
    assert len(rows) == 6
    assert "refused" in text and records[-4].run_id in text
    assert "non-embedding" in text and "95%" in text


OPEN, POSITIVE = (-math.inf, math.inf), (0.0, math.inf)


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        (None, "not known"),
        ((1.5, 2.5), "1.5 to 2.5 nats"),
        ((-1.5, 0.5), "-1.5 to 0.5 nats"),
        (OPEN, "not determined"),
        (POSITIVE, "not determined"),
        ((1.5, math.inf), "at least 1.5 nats"),
        ((-math.inf, 2.5), "at most 2.5 nats"),
        ((0.0, 2.5), "at most 2.5 nats"),
    ],
)
def test_an_interval_that_is_open_at_both_ends_is_not_determined(ends, said):
    assert span(ends, "{:g}".format, " nats") == said


def test_no_sentence_and_no_table_speaks_of_a_number_that_is_not_there(make_sweep):
    fits = fit_all(make_sweep(budgets=(1e12, 1e13)), draws=50)
    opened = {
        "parabolas": {"optimum_interval": POSITIVE, "loss_interval": OPEN},
        "laws": {"exponent_interval": OPEN},
        "gaps": {field: OPEN for field in ("loss_interval", "percent_interval")}
        | {"flops_ratio_interval": POSITIVE},
    }
    for field, intervals in opened.items():
        results = tuple(dataclasses.replace(r, **intervals) for r in getattr(fits, field))
        fits = dataclasses.replace(fits, **{field: results})
    text = render_text(fits)
    for word in ("unbounded", "inf", "nan", "determined nats", "determined%", "beyond"):
        assert not re.search(rf"\b{word}\b", text), word
    optimum = parabola_sentence(fits.parabolas[0], fits.size)
    for said in (optimum, gap_sentence(fits.gaps[0]), law_sentence(fits.laws[0], fits.size)):
        assert "95% interval not determined" in said
    assert [row[4] for row in optimum_table(fits).rows] == ["not determined"] * 4
    assert "cannot tell from no difference" in gap_sentence(fits.gaps[0])
