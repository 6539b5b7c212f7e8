"""Power laws through the optima of one arm, each optimum weighed by its own variance.

Weighted least squares in log10. Every bootstrap draw repeats the whole estimate: its optima deviate
from those found and its weights are what the draw itself would find. So an optimum that a draw
does not determine has little weight in that draw, and none where its parabola has no minimum: the
draw leaves out that optimum, not the law.

Scatter of the optima about the law. chi^2 = sum of w (y - fit)^2 should be about the number of
optima less 2. Where it is more (a Birge ratio above 1) and fewer than UNEXPLAINED of the draws
scatter as much about theirs, the variances do not explain it: every draw's deviation is then scaled
by the scatter found over the draw's own, which makes the interval that of Student's t with the
scatter's own degrees of freedom (the bootstrap of the studentised exponent).

Shapes: P optima, R bootstrap draws.
"""

from collections.abc import Mapping

import numpy as np

from modjax.scaling.fit.parabola import Estimate, interval
from modjax.scaling.fit.results import PowerLaw

# Scatter about a law that fewer of the draws reach is not explained by the variances.
UNEXPLAINED = 0.1
# An optimum is never taken to be known better than to a millionth of a decade.
LEAST_VARIANCE = 1e-12


def power_law(arm: str, quantity: str, optima: Mapping[float, Estimate]) -> PowerLaw:
    """The law of one arm through log10 of its accepted optima, by budget."""
    points = len(optima)
    if points < 2:
        refusal = f"a power law needs at least 2 accepted optima, and there are {points}"
        return PowerLaw(arm, quantity, points, points - 2, None, None, None, refusal)
    x_P = np.log10(list(optima))
    y_P = np.array([estimate.value for estimate in optima.values()])
    y_RP = np.stack([estimate.value_R for estimate in optima.values()], -1)
    variance_P = np.array([estimate.variance for estimate in optima.values()])
    variance_RP = np.stack([estimate.variance_R for estimate in optima.values()], -1)
    exponent, height, scatter = (float(of) for of in _line(x_P, y_P, variance_P))
    deviation_R, _, scatter_R = _line(x_P, y_RP - y_P, variance_RP)
    explained = (scatter_R >= scatter).sum() >= UNEXPLAINED * np.isfinite(scatter_R).sum()
    if scatter > 1 and not explained:
        with np.errstate(divide="ignore"):
            deviation_R = deviation_R * np.sqrt(scatter / scatter_R)
    return PowerLaw(
        arm=arm,
        quantity=quantity,
        points=points,
        freedom=points - 2,
        coefficient=10**height,
        exponent=exponent,
        exponent_interval=interval(exponent + deviation_R),
        refusal=None,
    )


def _line(x_P: np.ndarray, y_P: np.ndarray, variance_P: np.ndarray) -> tuple[np.ndarray, ...]:
    """Slope, height at x = 0 and chi^2 per degree of freedom of weighted lines through (..., P).

    A point of infinite variance is left out; NaN where too few are left.
    """
    weight_P = 1 / np.maximum(variance_P, LEAST_VARIANCE)
    y_P = np.where(weight_P > 0, y_P, 0)
    left = (weight_P > 0).sum(-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        share_P = weight_P / weight_P.sum(-1, keepdims=True)
        dx_P = x_P - (share_P * x_P).sum(-1, keepdims=True)
        mean = (share_P * y_P).sum(-1)
        slope = (share_P * dx_P * y_P).sum(-1) / (share_P * dx_P**2).sum(-1)
        residual_P = y_P - mean[..., None] - slope[..., None] * dx_P
        scatter = (weight_P * residual_P**2).sum(-1) / (left - 2)
    slope = np.where(left >= 2, slope, np.nan)
    return slope, mean - slope * (share_P * x_P).sum(-1), np.where(left > 2, scatter, np.nan)


def log10_of(loss: Estimate) -> Estimate:
    """log10 of a loss. A drawn loss below 0 has no logarithm: that draw has no answer."""
    loss_R = np.where(loss.value_R > 0, loss.value_R, np.nan)
    per_R = np.where(np.isnan(loss_R), np.inf, 1 / (loss_R * np.log(10)) ** 2)
    return Estimate(
        float(np.log10(loss.value)),
        loss.variance / (loss.value * np.log(10)) ** 2,
        np.log10(loss_R),
        loss.variance_R * per_R,
    )
