"""Power laws through the optima of an arm, and the intervals of their exponents."""

import math

import numpy as np
import pytest
from scipy import stats

from modjax.scaling.fit import isoflop
from modjax.scaling.fit.bootstrap import Estimate
from modjax.scaling.fit.isoflop import fit_all
from modjax.scaling.fit.power_law import power_law
from modjax.scaling.fit.results import QUANTITIES, Surface

GEOMETRIC = {count: tuple(1e12 * np.geomspace(1, 100, count)) for count in (3, 4, 5, 10)}


@pytest.fixture
def without_surfaces(monkeypatch):
    """The parametric surfaces, which take most of the time, say nothing about the exponents."""

    def refused(arm, n, *_, **__):
        return Surface(arm, len(n), refusal="not asked for")

    monkeypatch.setattr(isoflop, "fit_surface", refused)


def law_of(fits, quantity="parameters"):
    (found,) = [law for law in fits.laws if (law.arm, law.quantity) == ("dense", quantity)]
    return found


def test_a_power_law_through_two_optima_says_it_is_exact_and_one_is_refused(make_sweep):
    two = fit_all(make_sweep(arms=("dense",), budgets=(1e12, 1e13)), draws=50)
    assert {law.freedom for law in two.laws} == {0}
    one = fit_all(make_sweep(arms=("dense",), budgets=(1e12,)), draws=50)
    assert all("at least 2 accepted optima" in law.refusal for law in one.laws)
    assert one.gaps == () and all(p.refusal is None for p in one.parabolas)


def test_the_exponent_is_the_one_numpy_fits_with_each_optimum_weighed_by_its_own_variance(
    make_sweep, without_surfaces
):
    records = []
    for budget, noise, seeds in ((1e12, 0.02, 1), (3e12, 0.005, 2), (1e13, 0.02, 4)):
        grid = {"arms": ("dense",), "budgets": (budget,), "random_seed": seeds}
        records += make_sweep(noise=noise, seeds=seeds, **grid)
    fits = fit_all(records, draws=50)
    place, weight = [], []
    for p in (q for q in fits.parabolas if q.quantity == "parameters"):
        runs = [r for r in records if r.budget_flops == p.budget_flops]
        x = np.log10([r.params_non_embedding for r in runs])
        x0 = x.mean()
        (c2, c1, _), covariance = np.polyfit(x - x0, [r.eval_loss for r in runs], 2, cov="unscaled")
        step = 1e-6
        slopes = [(-c1 / 2 / (c2 + step) + c1 / 2 / (c2 - step)) / 2 / step, -1 / 2 / c2, 0]
        place.append(x0 - c1 / 2 / c2)
        weight.append(1 / (p.noise * math.sqrt(slopes @ covariance @ slopes)))
    exponent, height = np.polyfit(np.log10(fits.budgets), place, 1, w=weight)
    np.testing.assert_allclose(law_of(fits).exponent, exponent, rtol=1e-7)
    np.testing.assert_allclose(math.log10(law_of(fits).coefficient), height, rtol=1e-6)
    assert max(weight) > 3 * min(weight)


@pytest.mark.parametrize("scatter", [0.0, 0.3])
def test_scatter_beyond_the_variances_gives_the_interval_of_students_t(scatter):
    rng = np.random.default_rng(3)
    x = np.linspace(12, 14, 6)
    y = 0.5 * x - 1 + scatter * np.array([1, -1, 0.5, -0.5, -1, 1])
    optima = {
        10**a: Estimate(b, 0.01, b + 0.1 * rng.standard_normal(40_000), np.full(40_000, 0.01))
        for a, b in zip(x, y, strict=True)
    }
    plain = stats.linregress(x, y)
    error = 0.1 / math.sqrt(((x - x.mean()) ** 2).sum())
    reach = stats.t.ppf(0.975, 4) * plain.stderr if scatter else 1.96 * error
    low, high = power_law("dense", "parameters", optima).exponent_interval
    found = ((low + high) / 2, (high - low) / 2)
    np.testing.assert_allclose(found, (plain.slope, reach), rtol=0.03)


def test_draws_without_a_minimum_at_some_budgets_leave_the_exponent_determined(
    make_sweep, without_surfaces
):
    fits = fit_all(make_sweep(arms=("dense",), budgets=GEOMETRIC[10], noise=0.04), draws=400)
    ends = [p.optimum_interval for p in fits.parabolas if p.refusal is None]
    assert any(math.isinf(high) for _, high in ends)
    for quantity in (*QUANTITIES, "loss"):
        low, high = law_of(fits, quantity).exponent_interval
        assert high - low < 0.5


def coverage(sweeps, draws):
    """How often the intervals of dense's three exponents hold the planted ones."""
    hits = {"parameters": [], "forward_flops": [], "loss": []}
    for trial, records in enumerate(sweeps):
        for law in fit_all(records, draws=draws, seed=trial).laws:
            if law.arm == "dense":
                low, high = law.exponent_interval
                hits[law.quantity].append(low <= (-0.04 if law.quantity == "loss" else 0.5) <= high)
    return {quantity: np.mean(hit) for quantity, hit in hits.items()}


def test_exponents_are_covered_though_some_draws_have_no_minimum(make_sweep, without_surfaces):
    sweeps = (
        make_sweep(arms=("dense",), budgets=GEOMETRIC[5], noise=0.03, random_seed=trial)
        for trial in range(60)
    )
    covered = coverage(sweeps, draws=200)
    assert all(0.85 <= share <= 1 for share in covered.values()), covered


PLANTED = {
    "little noise": dict(budgets=3, noise=0.003),
    "draws without a minimum": dict(budgets=10, noise=0.04),
    "more such draws, one arm": dict(budgets=10, noise=0.05, arms=("dense",)),
    "two seeds": dict(budgets=3, noise=0.01, seeds=2),
    "unequal noise": dict(budgets=5, noise=(0.005, 0.01, 0.02, 0.03, 0.04)),
    "unequal seeds": dict(budgets=5, noise=0.02, seeds=(1, 2, 4, 1, 2)),
    "optima off their law": dict(budgets=10, noise=0.01, off=0.05),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PLANTED)
def test_intervals_of_exponents_cover_the_truth_as_often_as_they_claim(
    name, make_sweep, without_surfaces
):
    planted = {"arms": ("dense", "mod"), "seeds": 1, "off": 0.0} | PLANTED[name]
    budgets = GEOMETRIC[planted["budgets"]]
    noises, seeds = (np.broadcast_to(planted[k], len(budgets)) for k in ("noise", "seeds"))

    def sweep(trial):
        off = planted["off"] * np.random.default_rng([trial, 1]).standard_normal(len(budgets))
        records = []
        for i, budget in enumerate(budgets):
            grid = {"arms": planted["arms"], "budgets": (budget,)}
            chance = {"noise": noises[i], "seeds": seeds[i], "random_seed": 1000 * trial + i}
            records += make_sweep(coefficient=0.2 * 10 ** off[i], **grid, **chance)
        return records

    covered = coverage((sweep(trial) for trial in range(200)), draws=400)
    print(name, covered)
    assert all(0.9 <= share <= 0.98 for share in covered.values()), covered
