"""isoFLOP fits of planted sweeps: optima, gaps, noise, and refusals."""

import dataclasses
import json
import math

import numpy as np
import pytest

from modjax.errors import InputError
from modjax.records import write_json
from modjax.scaling.fit.bootstrap import interval
from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.fit.results import QUANTITIES, to_json


def only(fits, **wanted):
    (found,) = [p for p in fits.parabolas if all(getattr(p, k) == v for k, v in wanted.items())]
    return found


def test_planted_vertices_exponents_and_gaps_are_recovered(make_sweep):
    fits = fit_all(make_sweep(exponent=0.47, coefficient=0.6, gap=-0.025), draws=200)
    for p in fits.parabolas:
        planted = 0.6 * p.budget_flops**0.47 * (2 if p.arm == "mod" else 1)
        flops = planted * (1 if p.arm == "mod" else 2)
        np.testing.assert_allclose(
            p.optimum, planted if p.quantity == "parameters" else flops, rtol=1e-3
        )
        loss = 6 * p.budget_flops**-0.04 + (-0.025 if p.arm == "mod" else 0)
        np.testing.assert_allclose(p.loss, loss, atol=1e-6)
        assert abs(p.off_centre) < 1e-3
    sizes = {law.arm: law for law in fits.laws if law.quantity == "parameters"}
    np.testing.assert_allclose(sizes["dense"].exponent, 0.47, atol=1e-4)
    np.testing.assert_allclose(sizes["dense"].coefficient, 0.6, rtol=1e-3)
    losses = {law.arm: law for law in fits.laws if law.quantity == "loss"}
    np.testing.assert_allclose(losses["dense"].exponent, -0.04, atol=1e-5)
    assert [gap.budget_flops for gap in fits.gaps] == [1e12, 3e12, 1e13]
    for gap in fits.gaps:
        np.testing.assert_allclose(gap.loss, -0.025, atol=1e-6)
        np.testing.assert_allclose(gap.percent, -2.5 / (6 * gap.budget_flops**-0.04), rtol=1e-4)
        np.testing.assert_allclose(gap.flops_ratio, 1.0, rtol=1e-3)


def test_a_noisy_parabola_is_the_one_numpy_fits(make_sweep):
    records = make_sweep(arms=("dense",), budgets=(1e12,), sizes=6, noise=0.02)
    p = only(fit_all(records, draws=100), quantity="parameters")
    x = np.log10([r.params_non_embedding for r in records])
    c2, c1, c0 = np.polyfit(x, [r.eval_loss for r in records], 2)
    np.testing.assert_allclose(math.log10(p.optimum), -c1 / (2 * c2), rtol=1e-9)
    np.testing.assert_allclose(p.loss, c0 - c1**2 / (4 * c2), rtol=1e-9)
    np.testing.assert_allclose(p.at(np.array([2e5])), np.polyval((c2, c1, c0), np.log10(2e5)))


def test_total_parameters_are_counted_when_asked(make_sweep):
    records = make_sweep(arms=("dense",), budgets=(1e12,))
    p = only(fit_all(records, size="total", draws=50), quantity="parameters")
    assert (p.low, p.high) == (records[0].params_total, records[-1].params_total)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(sizes=3), "3 finished sizes"),
        (dict(offset=0.8), "below the sampled range, 0.30 decades beyond the smallest"),
        (dict(offset=-0.8), "above the sampled range, 0.30 decades beyond the largest"),
    ],
)
def test_a_fit_that_shows_no_optimum_is_refused_in_words(make_sweep, change, words):
    fits = fit_all(make_sweep(budgets=(1e12,), **change), draws=50)
    assert len(fits.parabolas) == 4
    for p in fits.parabolas:
        assert words in p.refusal
        assert (p.optimum, p.loss, p.optimum_interval) == (None, None, None)
    (gap,) = fits.gaps
    assert gap.loss is None and words in gap.refusal


def test_a_concave_fit_is_refused_in_words(make_sweep):
    records = [
        dataclasses.replace(r, eval_loss=4 - r.eval_loss)
        for r in make_sweep(arms=("dense",), budgets=(1e12,))
    ]
    for p in fit_all(records, draws=50).parabolas:
        assert "concave" in p.refusal and p.optimum is None


def test_diverged_runs_are_left_out_and_listed(make_sweep):
    records = make_sweep(arms=("dense",), budgets=(1e12,), sizes=6)
    diverged = dataclasses.replace(records[2], status="diverged", eval_loss=None)
    rest = records[:2] + records[3:]
    fits = fit_all([*rest, diverged], draws=100)
    assert fits.diverged == (records[2].run_id,)
    assert only(fits, quantity="parameters").runs == 5
    assert fits.parabolas == fit_all(rest, draws=100).parabolas


def test_a_cell_whose_runs_all_diverged_is_refused_and_returned(make_record):
    fits = fit_all([make_record(status="diverged", eval_loss=None, diverged_step=3)], draws=50)
    assert [p.refusal[:16] for p in fits.parabolas] == ["0 finished sizes"] * 2


def test_seeds_of_a_cell_count_as_one_size_with_their_mean(make_sweep):
    records = make_sweep(arms=("dense",), budgets=(1e12,), sizes=4, seeds=3, noise=0.01)
    fits = fit_all(records, draws=100)
    p = only(fits, quantity="parameters")
    assert (p.sizes, p.runs, fits.seeds_per_cell) == (4, 12, 3)
    x = np.log10([r.params_non_embedding for r in records])
    c2, c1, _ = np.polyfit(x, [r.eval_loss for r in records], 2)
    np.testing.assert_allclose(math.log10(p.optimum), -c1 / (2 * c2), rtol=1e-9)
    three = make_sweep(arms=("dense",), budgets=(1e12,), sizes=3, seeds=3)
    assert "3 finished sizes" in only(fit_all(three, draws=50), quantity="parameters").refusal


def test_spread_between_seeds_widens_an_interval_that_residuals_alone_would_make_zero(make_sweep):
    exact = make_sweep(arms=("dense",), budgets=(1e12,), seeds=2)
    spread = [
        dataclasses.replace(r, eval_loss=r.eval_loss + (0.01 if r.seed else -0.01)) for r in exact
    ]
    p = only(fit_all(spread, draws=300), quantity="parameters")
    np.testing.assert_allclose(p.noise, 0.01 * math.sqrt(2), rtol=1e-6)
    low, high = p.optimum_interval
    assert high / low > 1.02


def test_intervals_cover_the_truth_as_often_as_they_claim(make_sweep):
    hits = {"optimum": 0, "loss": 0, "gap": 0}
    trials, truth = 300, 6 * 1e12**-0.04
    rng = np.random.default_rng(1)
    for trial in range(trials):
        shared = 0.004 * rng.standard_normal()
        records = [
            dataclasses.replace(r, eval_loss=r.eval_loss + shared)
            for r in make_sweep(budgets=(1e12,), sizes=4, noise=0.006, random_seed=trial)
        ]
        fits = fit_all(records, draws=400, seed=trial)
        p = only(fits, arm="dense", quantity="parameters")
        gap = fits.gaps[0]
        if p.refusal or gap.refusal:
            continue
        hits["optimum"] += p.optimum_interval[0] <= 0.2 * 1e12**0.5 <= p.optimum_interval[1]
        hits["loss"] += p.loss_interval[0] <= truth <= p.loss_interval[1]
        hits["gap"] += gap.loss_interval[0] <= -0.03 <= gap.loss_interval[1]
    for what, count in hits.items():
        assert 0.91 <= count / trials <= 0.985, (what, count / trials)


def test_evaluation_error_moves_losses_together_and_leaves_the_gap(make_sweep):
    records = make_sweep(budgets=(1e12,), noise=1e-5)
    fits = fit_all(records, draws=500)
    low, high = only(fits, arm="dense", quantity="parameters").loss_interval
    np.testing.assert_allclose(high - low, 2 * 1.96 * 0.004, rtol=0.15)
    low, high = fits.gaps[0].loss_interval
    assert high - low < 1e-3


def test_draws_without_an_answer_leave_an_interval_unbounded():
    draws = np.concatenate([np.linspace(0, 1, 90), np.full(10, np.nan)])
    assert interval(draws) == (-np.inf, np.inf)
    low, high = interval(np.linspace(0, 1, 1001))
    np.testing.assert_allclose((low, high), (0.025, 0.975), atol=1e-3)


def test_the_noise_is_that_between_seeds_unless_the_parabolas_miss_their_cells(make_sweep):
    records = make_sweep(arms=("dense",), budgets=(1e12,), seeds=3, noise=0.01, random_seed=2)
    cells = {}
    for r in records:
        cells.setdefault(r.d_model, []).append(r.eval_loss)
    between = math.sqrt(np.mean([np.var(losses, ddof=1) for losses in cells.values()]))
    noise = only(fit_all(records, draws=50), quantity="parameters").noise
    np.testing.assert_allclose(noise, between)
    off = {32: 0.1, 64: -0.1, 96: 0.1, 128: -0.1, 160: 0.1}
    missed = [dataclasses.replace(r, eval_loss=r.eval_loss + off[r.d_model]) for r in records]
    assert only(fit_all(missed, draws=50), quantity="parameters").noise > 10 * between


def test_a_run_whose_causal_loss_was_not_finite_is_left_out_of_causal_fits_and_listed(make_sweep):
    records = [
        dataclasses.replace(r, causal_routing="router", causal_loss=r.eval_loss + 0.05)
        for r in make_sweep(arms=("dense",), budgets=(1e12,), sizes=6)
    ]
    changes = {f.name: None for f in dataclasses.fields(records[0]) if "causal_" in f.name}
    lost = dataclasses.replace(records[2], **changes | {"causal_routing": "router"})
    fits = fit_all([*records[:2], lost, *records[3:]], loss="causal", draws=50)
    assert fits.diverged == (lost.run_id,)
    assert only(fits, quantity="parameters").runs == 5
    assert fit_all([lost, *records[3:]], loss="trained", draws=50).diverged == ()


def test_the_baseline_is_dense_unless_another_is_named(make_sweep):
    records = make_sweep(arms=("mod", "dense"), budgets=(1e12,))
    assert fit_all(records, draws=50).baseline == "dense"
    fits = fit_all(records, baseline="mod", draws=50)
    assert fits.arms == ("mod", "dense") and fits.gaps[0].arm == "dense"
    with pytest.raises(InputError, match="baseline = 'moe': must be one of"):
        fit_all(records, baseline="moe")


def test_runs_that_cannot_be_compared_are_refused_in_one_line(make_record):
    with pytest.raises(InputError, match="run the sweep first"):
        fit_all([])
    with pytest.raises(InputError, match="different validation data"):
        fit_all([make_record(), make_record(data_fingerprint="other")])


def test_saved_fits_are_strict_json_with_null_for_unbounded_ends(tmp_path, make_sweep):
    fits = fit_all(make_sweep(), draws=50)
    wide = dataclasses.replace(fits.parabolas[0], optimum_interval=(0.0, math.inf))
    write_json(tmp_path / "fit.json", to_json(dataclasses.replace(fits, parabolas=(wide,))))

    def refuse(text):
        raise AssertionError(text)

    saved = json.loads((tmp_path / "fit.json").read_text(), parse_constant=refuse)
    assert saved["parabolas"][0]["optimum_interval"] == [0.0, None]
    assert {p.quantity for p in fits.parabolas} == set(QUANTITIES)
