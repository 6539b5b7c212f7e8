"""Bootstrap intervals against closed forms, and McNemar's test against published numbers."""

import numpy as np
import pytest

from modjax.finished.paired import compare

DRAWN = np.random.default_rng(5)


def test_intervals_of_gaussian_numbers_are_those_of_the_normal_distribution():
    ours, noise = DRAWN.normal(3, 1, 500), DRAWN.normal(0.05, 0.2, 500)
    found = compare([ours, ours - noise], np.ones(500))
    for name, values in {"score": ours, "base": ours - noise, "difference": noise}.items():
        value, low, high = found[name]
        half = 1.96 * values.std() / np.sqrt(500)
        assert value == pytest.approx(values.mean())
        assert low == pytest.approx(values.mean() - half, abs=0.06 * half)
        assert high == pytest.approx(values.mean() + half, abs=0.06 * half)
    assert "mcnemar" not in found


def test_the_interval_of_a_ratio_is_that_of_its_linear_approximation():
    weights = DRAWN.integers(1, 1000, 400).astype(float)
    values = weights * DRAWN.normal(2, 0.3, 400)
    value, low, high = compare([values], weights)["score"]
    ratio = values.sum() / weights.sum()
    sem = np.sqrt(np.sum((values - ratio * weights) ** 2)) / weights.sum()
    assert value == pytest.approx(ratio)
    assert (high - low) / 2 == pytest.approx(1.96 * sem, rel=0.05)


@pytest.mark.parametrize(
    ("gained", "lost", "p"),
    [
        (1, 7, 0.0703),  # Fagerland, Lydersen and Laake 2013, BMC Med Res Methodol 13:91, Table 1
        (7, 1, 0.0703),
        (0, 0, 1.0),
        (3, 3, 1.0),
    ],
)
def test_mcnemars_exact_test(gained, lost, p):
    ours = np.array([True] * gained + [False] * lost + [True] + [False] * 12)
    base = np.array([False] * gained + [True] * lost + [True] + [False] * 12)
    assert compare([ours, base], np.ones(len(ours)))["mcnemar"] == pytest.approx(p, abs=5e-5)


def test_one_unit_has_no_interval_and_no_base_no_difference():
    assert compare([np.array([6.0])], np.array([4])) == {"score": (1.5, None, None)}
