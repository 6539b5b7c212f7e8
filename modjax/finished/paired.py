"""Paired comparison of a model with its base, with 95% intervals.

Legend: J units that are drawn, such as documents, Q ratios, R bootstrap draws.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS = 10_000
TAILS = (0.025, 0.975)
NAMES = ("score", "base", "difference")


class Estimate(NamedTuple):
    """A value and its interval, whose ends are None for a single unit."""

    value: float
    low: float | None
    high: float | None


def compare(values: Sequence[np.ndarray], weights_J: np.ndarray) -> dict[str, Any]:
    """Returns the Estimate of sum(values) / sum(weights) of a model, its base and the difference.

    Each draw of the bootstrap takes the same units for all three. Booleans have "mcnemar", too: the
    p-value of the exact test that a changed unit is a gain or a loss with equal chances.

    values: of the model and, if it has one, of its base, (J,) each.
    """
    columns, found = np.array(values, float), {}
    if len(values) == 2:
        columns = np.stack([*columns, columns[0] - columns[1]])
        if values[0].dtype == bool:
            from scipy.stats import binomtest  # takes long to import

            gained, changed = int(np.sum(columns[2] > 0)), int(np.sum(columns[2] != 0))
            found["mcnemar"] = float(binomtest(gained, max(changed, 1)).pvalue)
    table_JQ, units = np.stack([*columns, weights_J], axis=1), len(weights_J)
    rng = np.random.default_rng(0)
    draws = (rng.integers(units, size=units) for _ in range(DRAWS))
    sums_RQ = np.array([np.bincount(at_J, minlength=units) @ table_JQ for at_J in draws])
    ends_Q2 = np.quantile(sums_RQ[:, :-1] / sums_RQ[:, -1:], TAILS, axis=0).T.tolist()
    for name, column_J, ends in zip(NAMES, columns, ends_Q2, strict=False):
        value = float(column_J.sum() / weights_J.sum())
        found[name] = Estimate(value, *(ends if units > 1 else (None, None)))
    return found
