"""The parametric loss surface L(N, D) = E + A / N^alpha + B / D^beta, fitted in two ways.

Both minimise the sum of Huber(log L_predicted - log L), delta = 1e-3 (Hoffmann et al. 2022,
arXiv 2203.15556, Eq. 10). `fit_descent` runs Levenberg-Marquardt from several starts, then BFGS on
a scaled objective with analytic gradients: L-BFGS-B with default tolerances on this tiny objective
stops early, near the values that paper published (Besiroglu et al. 2024, arXiv 2404.10102).
`fit_projection` searches over alpha and beta alone and finds E, A and B by least squares, which is
far better conditioned.

Shapes: M runs, R resamplings, theta (5,) in the order log E, log A', log B', alpha, beta.
"""

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from modjax.errors import require
from modjax.scaling.fit.loss_surface import DELTA, Data, huber, make_data, objective, residuals

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

MIN_RUNS = 8
OPTIMALITY = 1e-5
SEARCHED = 200  # runs that the search of `fit_projection` is made with
SETTLED = 1e-8  # a relative decrease of the objective that ends a search; `descend` goes on
NAMES = ("E", "A", "B", "alpha", "beta")


@dataclass(frozen=True)
class Surface:
    """L = E + A / N^alpha + B / D^beta for one arm: N parameters, D tokens, L nats per token.

    objective: sum of Huber losses; optimality: largest gradient component over the sum of the
    absolute values of its terms (0 at a minimum). intervals: central 95% over resampled runs.
    """

    arm: str
    runs: int
    E: float | None
    A: float | None
    B: float | None
    alpha: float | None
    beta: float | None
    objective: float | None
    optimality: float | None
    intervals: dict[str, tuple[float, float]] | None
    refusal: str | None


def descend(start: np.ndarray, data: Data) -> "OptimizeResult":
    """BFGS on the objective over delta^2, which puts a residual of delta at 1/2.

    With five parameters the full matrix costs nothing and converges where L-BFGS-B crawls.
    """
    from scipy.optimize import minimize  # slow to import, and not needed for what a plan foretells

    def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient, _ = objective(theta, data)
        return value / DELTA**2, gradient / DELTA**2

    return minimize(scaled, start, jac=True, method="BFGS", options={"gtol": 1e-6, "maxiter": 5000})


def fit_descent(data: Data) -> np.ndarray:
    """Parameters (5,) from the best of several starts."""
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
    """The least objective for given alpha and beta, and its (E, A', B'), each 0 or more.

    Gauss-Newton on log L with Huber's weights: every step is a least squares problem, solved as a
    non-negative one where it must be.
    """
    basis_M3 = np.stack(
        [
            np.ones_like(data.log_n_M),
            np.exp(-alpha * data.log_n_M),
            np.exp(-beta * data.log_d_M),
        ],
        -1,
    )
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
    """Parameters (5,) by variable projection: a grid over alpha and beta, then L-BFGS-B.

    At the best E, A' and B' the objective's derivatives by alpha and beta are its partial ones.
    steps: of each search for those; a few are enough for a place to start from.
    """
    from scipy.optimize import minimize

    def theta(alpha_beta: np.ndarray) -> np.ndarray:
        _, coefficients_3 = project(alpha_beta[0], alpha_beta[1], data, steps)
        return np.concatenate([np.log(np.maximum(coefficients_3, 1e-13)), alpha_beta])

    def scaled(alpha_beta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient, _ = objective(theta(alpha_beta), data)
        return value / DELTA**2, gradient[3:] / DELTA**2

    grid = itertools.product(np.geomspace(0.1, 1.6, 7), repeat=2)
    start = min(grid, key=lambda ab: project(ab[0], ab[1], data, steps=3)[0])
    result = minimize(
        scaled,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=[(0, 5)] * 2,
        options={"ftol": 1e-13, "gtol": 1e-7},
    )
    return theta(result.x)


def natural(theta: np.ndarray, data: Data) -> np.ndarray:
    """E, A, B, alpha, beta in the units of the formula, from theta (..., 5)."""
    shift = theta[..., 3:] * [data.centre_n, data.centre_d]
    with np.errstate(over="ignore"):  # a resampling that determines nothing runs off to infinity
        ab = np.exp(theta[..., 1:3] + shift)
    return np.concatenate([np.exp(theta[..., :1]), ab, theta[..., 3:]], -1)


def bootstrap(
    theta: np.ndarray, data: Data, draws: int, rng: np.random.Generator, steps: int = 150
) -> np.ndarray:
    """The minimum, (R, 5), for every resampling of the runs, started from `theta`."""
    runs = len(data.log_loss_M)
    weight_RM = rng.multinomial(runs, np.full(runs, 1 / runs), size=draws)
    return minima(np.tile(theta, (draws, 1)), weight_RM, data, steps)


def minima(theta_R5: np.ndarray, weight_RM: np.ndarray, data: Data, steps: int = 150) -> np.ndarray:
    """The minimum, (R, 5), reached from every row of `theta_R5` with the runs so weighted.

    Levenberg-Marquardt with Huber's weights on all rows at once. Runs at one of the J places in N
    and D share their prediction.
    """
    both_M2 = np.stack([data.log_n_M, data.log_d_M], -1)
    places_J2, place_M = np.unique(both_M2, axis=0, return_inverse=True)
    order_M = np.argsort(place_M, kind="stable")
    place_M, loss_M, weight_RM = place_M[order_M], data.log_loss_M[order_M], weight_RM[:, order_M]
    first_J = np.searchsorted(place_M, np.arange(len(places_J2)))
    at_places = Data(places_J2[:, 0], places_J2[:, 1], np.zeros(len(places_J2)), 0.0, 0.0)

    def evaluate(
        theta_R5: np.ndarray, weight_RM: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        prediction_RJ, slopes_RJ5 = residuals(theta_R5, at_places)
        residual_RM = prediction_RJ[:, place_M] - loss_M
        return np.einsum("RM,RM->R", weight_RM, huber(residual_RM)), residual_RM, slopes_RJ5

    found_R5, live_R = theta_R5.copy(), np.arange(len(theta_R5))
    damping_R = np.full(len(theta_R5), 1e-3)
    value_R, residual_RM, slopes_RJ5 = evaluate(theta_R5, weight_RM)
    for _ in range(steps):
        pull_RM = weight_RM * DELTA / np.maximum(np.abs(residual_RM), DELTA)
        pull_RJ, push_RJ = (
            np.add.reduceat(of_RM, first_J, axis=1) for of_RM in (pull_RM, pull_RM * residual_RM)
        )
        slopes_R5J = np.swapaxes(slopes_RJ5, -1, -2)
        normal_R55 = (pull_RJ[:, None] * slopes_R5J) @ slopes_RJ5
        diagonal_R5 = np.einsum("Rii->Ri", normal_R55)
        normal_R55 = normal_R55 + (damping_R[:, None] * diagonal_R5 + 1e-12)[..., None] * np.eye(5)
        step_R5 = np.linalg.solve(normal_R55, slopes_R5J @ push_RJ[..., None])[..., 0]
        trial_R5 = np.clip(theta_R5 - step_R5, [-30] * 3 + [0] * 2, [30] * 3 + [5] * 2)
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
        live_R, theta_R5, damping_R, value_R, weight_RM, residual_RM, slopes_RJ5 = (
            of[~settled_R]
            for of in (live_R, theta_R5, damping_R, value_R, weight_RM, residual_RM, slopes_RJ5)
        )
    return found_R5


def _some(data: Data) -> Data:
    """Enough of the runs to start from: SEARCHED of them, drawn at random."""
    runs = len(data.log_loss_M)
    if runs <= SEARCHED:
        return data
    picked = np.random.default_rng(0).permutation(runs)[:SEARCHED]
    return dataclasses.replace(
        data,
        log_n_M=data.log_n_M[picked],
        log_d_M=data.log_d_M[picked],
        log_loss_M=data.log_loss_M[picked],
    )


def fit_surface(
    arm: str,
    n_M: np.ndarray,
    d_M: np.ndarray,
    loss_M: np.ndarray,
    *,
    draws: int = 100,
    seed: int = 0,
) -> Surface:
    """The surface of one arm from parameters N, tokens D and losses L, each of shape (M,).

    Takes the better of the two methods; its intervals resample runs. Says in `refusal` when there
    are too few runs, a term of the formula vanishes, or the minimum was not reached.
    """
    require(draws >= 0, "draws", draws, "must be 0 or more")
    runs = len(loss_M)
    if runs < MIN_RUNS:
        return Surface(
            arm,
            runs,
            *[None] * 8,
            refusal=f"{runs} finished runs; five parameters need at least {MIN_RUNS}",
        )
    data = make_data(n_M, d_M, loss_M)
    ends = [descend(fit_projection(_some(data), steps=5), data).x, fit_descent(data)]
    theta = min(ends, key=lambda end: objective(end, data)[0])
    value, gradient, terms = objective(theta, data)
    optimality = float(np.max(np.abs(gradient) / np.maximum(terms, 1e-300)))
    values = dict(zip(NAMES, natural(theta, data).tolist(), strict=True))
    shares = np.exp(theta[:3] - data.log_loss_M.mean())
    refusal = None
    if shares.min() < 1e-3 or theta[3:].min() < 1e-2 or theta[3:].max() > 4.99:
        refusal = "these runs do not determine all five parameters: a term vanishes"
    elif optimality > OPTIMALITY:
        refusal = f"the minimum was not reached: relative gradient {optimality:.1e}"
    intervals = None
    if refusal is None and draws > 0:
        drawn_R5 = bootstrap(theta, data, draws, np.random.default_rng(seed))
        ends = np.quantile(natural(drawn_R5, data), [0.025, 0.975], axis=0).T.tolist()
        intervals = {name: (low, high) for name, (low, high) in zip(NAMES, ends, strict=True)}
    return Surface(
        arm,
        runs,
        **values,
        objective=value,
        optimality=optimality,
        intervals=intervals,
        refusal=refusal,
    )
