"""Predicted intervals of a grid against those that a fit makes of finished runs."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest

from modjax.cli.tables import plan_text
from modjax.errors import InputError
from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.plan.experiment import load
from modjax.scaling.plan.plan_table import cells
from modjax.scaling.plan.prediction import CURVATURE, NOISE, predict

TINY = str(Path(__file__).parents[3] / "configs" / "tiny.py")


def predictions(*overrides, noise=NOISE):
    experiment = load(TINY, overrides)
    rows = cells(experiment.specs, experiment.sweep, lambda spec: None, 1e10, noise)
    return {(c.arm, c.budget_flops): c.prediction for c in rows}


def test_four_sizes_resolve_the_optimum_with_two_seeds_but_rarely_with_one():
    runs = [("dense", 1e12, n) for n in (10_000, 20_000, 40_000, 100_000)]
    (alone,) = predict(runs).values()
    assert alone.freedom == 4 - 3 and not alone.resolves
    twice = predictions("sweep.sizes=4", "sweep.seeds=0,1")
    assert all(f.resolves and f.freedom == 2 * 4 for f in twice.values())
    assert sum(not f.resolves for f in predictions("sweep.sizes=4").values()) >= 3
    assert {f.freedom for f in predictions("sweep.sizes=4").values()} == {2 * (4 - 3)}


def test_a_prediction_equals_the_fit_of_runs_with_the_stated_noise(make_sweep):
    """The runs scatter about their parabola by exactly the stated noise."""
    x = np.linspace(-0.5, 0.5, 6)
    design = np.vander(x, 3)
    noise = np.random.default_rng(1).standard_normal(6)
    noise -= design @ np.linalg.lstsq(design, noise, rcond=None)[0]
    noise *= 0.02 * math.sqrt(3) / math.sqrt((noise**2).sum())
    records = make_sweep(arms=("dense",), budgets=(1e12,), sizes=6)
    records = [
        dataclasses.replace(r, eval_loss=2 + CURVATURE * u**2 + e, eval_loss_sem=0.0)
        for r, u, e in zip(records, x, noise, strict=True)
    ]
    fitted = fit_all(records, draws=4000).parabolas[0]
    runs = [("dense", r.budget_flops, r.params_non_embedding) for r in records]
    found = predict(runs, 0.02)["dense", 1e12]
    assert (found.low, found.high, found.freedom) == (fitted.low, fitted.high, 3)
    expected = np.log10(fitted.optimum_interval)
    np.testing.assert_allclose(np.log10(found.optimum_interval), expected, atol=0.02)
    assert predict(runs, 0.2)["dense", 1e12].optimum_interval == (0, math.inf)


def test_the_plan_shows_a_prediction_for_every_arm_and_budget():
    experiment = load(TINY, ["sweep.sizes=4"])
    rows = cells(experiment.specs, experiment.sweep, lambda spec: None, 1e10, 0.03)
    text = plan_text(rows, 1)
    assert "noise of 0.03 nats" in text and "not determined" in text
    block = text[text.index("What `modjax fit`") :].splitlines()[2:8]
    assert [line.split()[:2] for line in block] == [
        [budget, arm] for budget in ("9e+11", "3e+11", "1e+11") for arm in ("dense", "mod12")
    ]
    with pytest.raises(InputError, match="must be greater than 0, in nats"):
        predictions(noise=0.0)
