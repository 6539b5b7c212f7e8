"""Power laws through the optima of one arm, each optimum weighted by its inverse variance.

The fit is weighted least squares in log10. Every bootstrap draw repeats it with its own optima and
its own weights. An optimum that a draw hardly determines has little weight in that draw. If the
drawn parabola has no minimum, the draw fits its law without that optimum.

Scatter of the optima about the law: chi^2 = sum of w (y - fit)^2 should be about the number of
optima less 2. A larger scatter (a Birge ratio above 1) is taken as unexplained by the variances if
less than a share UNEXPLAINED of the draws scatter as much about their own laws. Every draw's
deviation is then multiplied by sqrt(estimated scatter / the draw's scatter). This bootstrap of the
studentised exponent gives the interval of Student's t with the scatter's degrees of freedom.

Legend: P optima, R bootstrap draws.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from modjax.scaling.fit.bootstrap import Estimate, interval
from modjax.scaling.fit.optimum import Vertices
from modjax.scaling.fit.results import QUANTITIES, PowerLaw

UNEXPLAINED = 0.1
# No optimum is taken to be known better than to a millionth of a decade.
LEAST_VARIANCE = 1e-12


def fit_laws(arms: Sequence[str], vertices: Vertices) -> list[PowerLaw]:
    """Returns every arm's laws of parameters, forward FLOPs and loss through its optima."""
    laws = []
    for arm in arms:
        for quantity in QUANTITIES:
            found = vertices[arm, quantity].items()
            laws.append(power_law(arm, quantity, {budget: v.log_x for budget, v in found}))
        found = vertices[arm, "parameters"].items()
        laws.append(power_law(arm, "loss", {budget: _log10(v.loss) for budget, v in found}))
    return laws


def power_law(arm: str, quantity: str, optima: Mapping[float, Estimate]) -> PowerLaw:
    """Returns the law of one arm. optima: log10 of the accepted optima, by budget."""
    points = len(optima)
    if points < 2:
        refusal = f"a power law needs at least 2 accepted optima, and there are {points}"
        return PowerLaw(arm, quantity, points, points - 2, refusal=refusal)
    x_P = np.log10(list(optima))
    y_P = np.array([estimate.value for estimate in optima.values()])
    y_RP = np.stack([estimate.value_R for estimate in optima.values()], -1)
    variance_P = np.array([estimate.variance for estimate in optima.values()])
    variance_RP = np.stack([estimate.variance_R for estimate in optima.values()], -1)
    exponent, height, scatter = (float(number) for number in _line(x_P, y_P, variance_P))
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
    )


def _line(x_P: np.ndarray, y_P: np.ndarray, variance_P: np.ndarray) -> tuple[np.ndarray, ...]:
    """Returns slope, intercept and chi^2 per degree of freedom of lines through points (..., P).

    Leaves out points of infinite variance. With fewer than 2 points left, slope and intercept are
    NaN; with fewer than 3, chi^2 is NaN.
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


def _log10(loss: Estimate) -> Estimate:
    """Returns log10 of a loss. A drawn loss of 0 or less becomes NaN with infinite variance."""
    loss_R = np.where(loss.value_R > 0, loss.value_R, np.nan)
    per_R = np.where(np.isnan(loss_R), np.inf, 1 / (loss_R * np.log(10)) ** 2)
    return Estimate(
        float(np.log10(loss.value)),
        loss.variance / (loss.value * np.log(10)) ** 2,
        np.log10(loss_R),
        loss.variance_R * per_R,
    )
