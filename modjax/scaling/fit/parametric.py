"""The parametric loss surface L(N, D) = E + A / N^alpha + B / D^beta, fitted in two ways.

Both minimise the sum of Huber(log L_predicted - log L), delta = 1e-3 (Hoffmann et al. 2022,
arXiv 2203.15556, Eq. 10). `fit_descent` runs Levenberg-Marquardt from several starts, then BFGS on
a scaled objective with analytic gradients. L-BFGS-B with default tolerances stops early on this
tiny objective, near the values that paper published (Besiroglu et al. 2024, arXiv 2404.10102).
`fit_projection` searches over alpha and beta alone and finds E, A and B by least squares, which is
far better conditioned.

Legend: M runs, R resamplings, J distinct pairs of N and D. A theta has shape (5,), in the order
log E, log A', log B', alpha, beta.
"""

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modjax.errors import require
from modjax.scaling.fit.results import SURFACE_NAMES, Surface

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

DELTA = 1e-3
MIN_RUNS = 8
OPTIMALITY = 1e-5
SEARCHED = 200  # runs that `fit_projection` searches with
STEPS = 150  # of Levenberg-Marquardt, at most
SETTLED = 1e-8  # relative decrease of the objective that ends Levenberg-Marquardt
LOW_5, HIGH_5 = np.array([[-30] * 3 + [0] * 2, [30] * 3 + [5] * 2])  # bounds of theta


@dataclass(frozen=True)
class Data:
    """Centred logarithms of N, D and L. A' = A / exp(alpha * centre_n), likewise B'.

    A' is nearly uncorrelated with alpha, unlike A.
    """

    log_n_M: np.ndarray
    log_d_M: np.ndarray
    log_loss_M: np.ndarray
    centre_n: float
    centre_d: float


def make_data(n_M: np.ndarray, d_M: np.ndarray, loss_M: np.ndarray) -> Data:
    """Returns the data of runs with parameters N, tokens D and losses L."""
    log_n_M, log_d_M = np.log(n_M), np.log(d_M)
    centre_n, centre_d = float(log_n_M.mean()), float(log_d_M.mean())
    return Data(log_n_M - centre_n, log_d_M - centre_d, np.log(loss_M), centre_n, centre_d)


def residuals(theta: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """Returns log L_predicted - log L, (..., M), and its slopes, (..., M, 5), at theta (..., 5)."""
    log_e, log_a, log_b, alpha, beta = np.moveaxis(theta[..., None], -2, 0)
    log_a = log_a - alpha * data.log_n_M
    log_b = log_b - beta * data.log_d_M
    top = np.maximum(np.maximum(log_a, log_b), log_e)
    e, a, b = np.exp(log_e - top), np.exp(log_a - top), np.exp(log_b - top)
    total = e + a + b
    e, a, b = e / total, a / total, b / total  # shares of the prediction
    slopes = np.stack([e, a, b, -a * data.log_n_M, -b * data.log_d_M], -1)
    return top + np.log(total) - data.log_loss_M, slopes


def huber(residual: np.ndarray) -> np.ndarray:
    """Returns r^2 / 2 up to delta, and delta (|r| - delta / 2) beyond."""
    size = np.abs(residual)
    inner = np.minimum(size, DELTA)
    return inner * (size - inner / 2)


def objective(theta: np.ndarray, data: Data) -> tuple[float, np.ndarray, np.ndarray]:
    """Returns the sum of Huber losses, its gradient (5,), and sums of absolute terms (5,).

    The last are the sums over runs of the absolute terms of each gradient component.
    """
    residual_M, slopes_M5 = residuals(theta, data)
    gradient_M5 = np.clip(residual_M, -DELTA, DELTA)[:, None] * slopes_M5
    return float(huber(residual_M).sum()), gradient_M5.sum(0), np.abs(gradient_M5).sum(0)


def natural(theta: np.ndarray, data: Data) -> np.ndarray:
    """Returns E, A, B, alpha, beta in the units of the formula, from theta (..., 5)."""
    shift = theta[..., 3:] * [data.centre_n, data.centre_d]
    with np.errstate(over="ignore"):  # a resampling that determines nothing runs off to infinity
        ab = np.exp(theta[..., 1:3] + shift)
    return np.concatenate([np.exp(theta[..., :1]), ab, theta[..., 3:]], -1)


def descend(start: np.ndarray, data: Data) -> "OptimizeResult":
    """Runs BFGS on the objective over delta^2, in which a residual of delta counts 1/2.

    With five parameters the full matrix costs nothing and converges where L-BFGS-B crawls.
    """
    from scipy.optimize import minimize  # slow to import, and not needed for predictions of a plan

    options = {"gtol": 1e-6, "maxiter": 5000}
    return minimize(_scaled, start, (data,), jac=True, method="BFGS", options=options)


def _scaled(theta: np.ndarray, data: Data) -> tuple[float, np.ndarray]:
    value, gradient, _ = objective(theta, data)
    return value / DELTA**2, gradient / DELTA**2


def fit_descent(data: Data) -> np.ndarray:
    """Returns theta from the best of several starts."""
    mean = float(data.log_loss_M.mean())
    starts_R5 = np.array(
        [
            [mean + np.log(share), *[mean + np.log((1 - share) / 2)] * 2, a, b]
            for share, a, b in itertools.product((0.3, 0.7), (0.2, 0.6), (0.2, 0.6))
        ]
    )
    ends_R5 = minima(starts_R5, np.ones((len(starts_R5), len(data.log_loss_M))), data)
    best = min(ends_R5, key=lambda end: objective(end, data)[0])
    return descend(best, data).x


def project(alpha: float, beta: float, data: Data, steps: int = 200) -> tuple[float, np.ndarray]:
    """Returns the least objective for given alpha and beta, and its (E, A', B'), each 0 or more.

    Runs Gauss-Newton on log L with Huber's weights. Every step is a least squares problem, solved
    as a non-negative one if a coefficient would be negative.
    """
    powers = (0 * data.log_n_M, -alpha * data.log_n_M, -beta * data.log_d_M)
    basis_M3 = np.exp(np.stack(powers, -1))
    prediction_M = np.exp(data.log_loss_M)
    residual_M = np.zeros_like(prediction_M)
    best, best_3 = np.inf, np.zeros(3)
    for _ in range(steps):
        root_M = np.sqrt(DELTA / np.maximum(np.abs(residual_M), DELTA))
        design_M3 = basis_M3 * (root_M / prediction_M)[:, None]
        target_M = root_M * (1 - residual_M)
        gram_33 = design_M3.T @ design_M3
        coefficients_3 = np.linalg.lstsq(gram_33, design_M3.T @ target_M, rcond=None)[0]
        if coefficients_3.min() < 0:
            from scipy.optimize import nnls

            coefficients_3, _ = nnls(design_M3, target_M)
        prediction_M = basis_M3 @ coefficients_3
        if prediction_M.min() <= 0:
            break
        residual_M = np.log(prediction_M) - data.log_loss_M
        value = float(huber(residual_M).sum())
        if value >= best * (1 - 1e-13):
            break
        best, best_3 = value, coefficients_3
    return best, best_3


def fit_projection(data: Data, steps: int = 200) -> np.ndarray:
    """Returns theta by variable projection: a grid over alpha and beta, then L-BFGS-B.

    At the best E, A' and B' the total derivatives by alpha and beta are the partial ones.
    steps: of each search for E, A' and B'. A few are enough to find a start for `descend`.
    """
    from scipy.optimize import minimize

    def theta(alpha_beta: np.ndarray) -> np.ndarray:
        _, coefficients_3 = project(alpha_beta[0], alpha_beta[1], data, steps)
        return np.concatenate([np.log(np.maximum(coefficients_3, 1e-13)), alpha_beta])

    def scaled(alpha_beta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient = _scaled(theta(alpha_beta), data)
        return value, gradient[3:]

    grid = itertools.product(np.geomspace(0.1, 1.6, 7), repeat=2)
    start = min(grid, key=lambda ab: project(ab[0], ab[1], data, steps=3)[0])
    options = {"ftol": 1e-13, "gtol": 1e-7}
    bounds = [(0, 5)] * 2
    result = minimize(scaled, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)
    return theta(result.x)


def resampled(theta: np.ndarray, data: Data, draws: int, rng: np.random.Generator) -> np.ndarray:
    """Returns the minimum for every resampling of the runs, shape (R, 5), started from `theta`."""
    runs = len(data.log_loss_M)
    weight_RM = rng.multinomial(runs, np.full(runs, 1 / runs), size=draws)
    return minima(np.tile(theta, (draws, 1)), weight_RM, data)


def minima(theta_R5: np.ndarray, weight_RM: np.ndarray, data: Data) -> np.ndarray:
    """Returns the minimum reached from every row of `theta_R5`, shape (R, 5).

    weight_RM: the weight of every run.
    Runs Levenberg-Marquardt with Huber's weights on all rows at once. Runs with the same N and D
    share their prediction, so that 10,000 runs and more are feasible.
    """
    both_M2 = np.stack([data.log_n_M, data.log_d_M], -1)
    places_J2, place_M = np.unique(both_M2, axis=0, return_inverse=True)
    order_M = np.argsort(place_M, kind="stable")
    place_M, loss_M, weight_RM = place_M[order_M], data.log_loss_M[order_M], weight_RM[:, order_M]
    first_J = np.searchsorted(place_M, np.arange(len(places_J2)))
    at_places = Data(places_J2[:, 0], places_J2[:, 1], np.zeros(len(places_J2)), 0.0, 0.0)

    def evaluate(theta_R5: np.ndarray, weight_RM: np.ndarray) -> tuple[np.ndarray, ...]:
        prediction_RJ, slopes_RJ5 = residuals(theta_R5, at_places)
        residual_RM = prediction_RJ[:, place_M] - loss_M
        return np.einsum("RM,RM->R", weight_RM, huber(residual_RM)), residual_RM, slopes_RJ5

    found_R5, live_R = theta_R5.copy(), np.arange(len(theta_R5))
    damping_R = np.full(len(theta_R5), 1e-3)
    value_R, residual_RM, slopes_RJ5 = evaluate(theta_R5, weight_RM)
    for _ in range(STEPS):
        pull_RM = weight_RM * DELTA / np.maximum(np.abs(residual_RM), DELTA)
        pull_RJ = np.add.reduceat(pull_RM, first_J, axis=1)
        push_RJ = np.add.reduceat(pull_RM * residual_RM, first_J, axis=1)
        step_R5 = _damped_step(damping_R, pull_RJ, push_RJ, slopes_RJ5)
        trial_R5 = np.clip(theta_R5 - step_R5, LOW_5, HIGH_5)
        value, residual, slopes = evaluate(trial_R5, weight_RM)
        better_R = value < value_R
        settled_R = np.where(better_R, value_R - value < SETTLED * value_R, damping_R > 1e8)
        damping_R = np.where(better_R, damping_R / 4, damping_R * 4).clip(1e-12, 1e12)
        theta_R5 = np.where(better_R[:, None], trial_R5, theta_R5)
        residual_RM = np.where(better_R[:, None], residual, residual_RM)
        slopes_RJ5 = np.where(better_R[:, None, None], slopes, slopes_RJ5)
        value_R = np.minimum(value, value_R)
        found_R5[live_R] = theta_R5
        if settled_R.all():
            break
        state = (live_R, theta_R5, damping_R, value_R, weight_RM, residual_RM, slopes_RJ5)
        live_R, theta_R5, damping_R, value_R, weight_RM, residual_RM, slopes_RJ5 = (
            part[~settled_R] for part in state
        )
    return found_R5


def _damped_step(
    damping_R: np.ndarray, pull_RJ: np.ndarray, push_RJ: np.ndarray, slopes_RJ5: np.ndarray
) -> np.ndarray:
    """Returns the Levenberg-Marquardt step, shape (R, 5).

    pull_RJ, push_RJ: sums of weights, and of weighted residuals, over the runs of each (N, D).
    """
    slopes_R5J = np.swapaxes(slopes_RJ5, -1, -2)
    normal_R55 = (pull_RJ[:, None] * slopes_R5J) @ slopes_RJ5
    diagonal_R5 = np.einsum("Rii->Ri", normal_R55)
    damped_R55 = normal_R55 + (damping_R[:, None] * diagonal_R5 + 1e-12)[..., None] * np.eye(5)
    return np.linalg.solve(damped_R55, slopes_R5J @ push_RJ[..., None])[..., 0]


def fit_surface(
    arm: str,
    n_M: np.ndarray,
    d_M: np.ndarray,
    loss_M: np.ndarray,
    *,
    draws: int = 100,
    seed: int = 0,
) -> Surface:
    """Returns the surface of one arm from parameters N, tokens D and losses L of its runs.

    Takes the better of the two methods. The intervals resample runs. Its `refusal` names too few
    runs, a term of the formula that vanishes, or a minimum that was not reached.
    """
    require(draws >= 0, "draws", draws, "must be 0 or more")
    runs = len(loss_M)
    if runs < MIN_RUNS:
        refusal = f"{runs} finished runs; five parameters need at least {MIN_RUNS}"
        return Surface(arm, runs, refusal=refusal)
    data = make_data(n_M, d_M, loss_M)
    ends = [descend(fit_projection(_sample(data), steps=5), data).x, fit_descent(data)]
    theta = min(ends, key=lambda end: objective(end, data)[0])
    value, gradient, terms = objective(theta, data)
    optimality = float(np.max(np.abs(gradient) / np.maximum(terms, 1e-300)))
    shares = np.exp(theta[:3] - data.log_loss_M.mean())
    refusal = intervals = None
    if shares.min() < 1e-3 or theta[3:].min() < 1e-2 or theta[3:].max() > 4.99:
        refusal = "these runs do not determine all five parameters: a term vanishes"
    elif optimality > OPTIMALITY:
        refusal = f"the minimum was not reached: relative gradient {optimality:.1e}"
    elif draws > 0:
        drawn_R5 = natural(resampled(theta, data, draws, np.random.default_rng(seed)), data)
        ends_52 = np.quantile(drawn_R5, [0.025, 0.975], axis=0).T.tolist()
        intervals = {n: (low, high) for n, (low, high) in zip(SURFACE_NAMES, ends_52, strict=True)}
    return Surface(
        arm,
        runs,
        *natural(theta, data).tolist(),
        objective=value,
        optimality=optimality,
        intervals=intervals,
        refusal=refusal,
    )


def _sample(data: Data) -> Data:
    """Returns SEARCHED of the runs, drawn at random, or all if they are fewer."""
    runs = len(data.log_loss_M)
    if runs <= SEARCHED:
        return data
    picked = np.random.default_rng(0).permutation(runs)[:SEARCHED]
    n_M, d_M, loss_M = data.log_n_M[picked], data.log_d_M[picked], data.log_loss_M[picked]
    return Data(n_M, d_M, loss_M, data.centre_n, data.centre_d)
