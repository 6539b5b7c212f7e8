"""The parametric loss surface L(N, D) = E + A / N^alpha + B / D^beta, fitted in two ways.

Both minimise the sum of Huber(log L_predicted - log L), delta = 1e-3 (Hoffmann et al. 2022,
arXiv 2203.15556, Eq. 10). `fit_descent` runs L-BFGS-B from several starts; with that routine's
default tolerances on this tiny objective it stops early, near the values that paper published
(Besiroglu et al. 2024, arXiv 2404.10102). `fit_projection` searches over alpha and beta alone and
finds E, A and B by non-negative least squares, which is far better conditioned.

Shapes: M runs, parameters (5,) in the order log E, log A', log B', alpha, beta.
"""

import itertools
from dataclasses import dataclass

import numpy as np
from scipy.optimize import OptimizeResult, minimize, nnls

from modjax.config import require

DELTA = 1e-3
MIN_RUNS = 8
OPTIMALITY = 1e-5
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


@dataclass(frozen=True)
class Data:
    """Centred logarithms: A' = A / exp(alpha * centre_n) is nearly uncorrelated with alpha."""

    log_n_M: np.ndarray
    log_d_M: np.ndarray
    log_loss_M: np.ndarray
    centre_n: float
    centre_d: float


def make_data(n_M: np.ndarray, d_M: np.ndarray, loss_M: np.ndarray) -> Data:
    """Data for the fits from parameters N, tokens D and losses, each of shape (M,)."""
    log_n_M, log_d_M = np.log(n_M), np.log(d_M)
    centre_n, centre_d = float(log_n_M.mean()), float(log_d_M.mean())
    return Data(log_n_M - centre_n, log_d_M - centre_d, np.log(loss_M), centre_n, centre_d)


def objective(theta: np.ndarray, data: Data) -> tuple[float, np.ndarray, np.ndarray]:
    """Sum of Huber losses, its gradient (5,), and the sum of |terms| of each gradient component."""
    log_e, log_a, log_b, alpha, beta = theta
    terms_3M = np.stack([
        np.full_like(data.log_n_M, log_e),
        log_a - alpha * data.log_n_M,
        log_b - beta * data.log_d_M,
    ])  # fmt: skip
    top_M = terms_3M.max(0)
    log_prediction_M = top_M + np.log(np.exp(terms_3M - top_M).sum(0))
    residual_M = log_prediction_M - data.log_loss_M
    size_M = np.abs(residual_M)
    value = np.where(size_M <= DELTA, residual_M**2 / 2, DELTA * (size_M - DELTA / 2)).sum()
    e_M, a_M, b_M = np.exp(terms_3M - log_prediction_M)  # shares of the prediction
    slopes_5M = np.stack([e_M, a_M, b_M, -a_M * data.log_n_M, -b_M * data.log_d_M])
    gradient_5M = np.clip(residual_M, -DELTA, DELTA) * slopes_5M
    return float(value), gradient_5M.sum(1), np.abs(gradient_5M).sum(1)


def descend(start: np.ndarray, data: Data) -> OptimizeResult:
    """L-BFGS-B on the objective over delta^2, which puts a residual of delta at 1/2."""

    def scaled(theta: np.ndarray) -> tuple[float, np.ndarray]:
        value, gradient, _ = objective(theta, data)
        return value / DELTA**2, gradient / DELTA**2

    bounds = [(-30, 30)] * 3 + [(0, 5)] * 2
    options = {"ftol": 1e-15, "gtol": 1e-7, "maxiter": 5000, "maxfun": 20000}
    return minimize(scaled, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options)


def fit_descent(data: Data) -> np.ndarray:
    """Parameters (5,) from the best of several starts."""
    mean = float(data.log_loss_M.mean())
    results = [
        descend(np.array([mean + np.log(share), *[mean + np.log((1 - share) / 2)] * 2, a, b]), data)
        for share, a, b in itertools.product((0.3, 0.7), (0.2, 0.6), (0.2, 0.6))
    ]
    best = min(results, key=lambda result: result.fun)
    return descend(best.x, data).x


def project(alpha: float, beta: float, data: Data) -> tuple[float, np.ndarray]:
    """The least objective for given alpha and beta, and its (E, A', B'), each 0 or more.

    Gauss-Newton on log L with Huber's weights: every step is a non-negative least squares problem.
    """
    basis_M3 = np.stack([
        np.ones_like(data.log_n_M), np.exp(-alpha * data.log_n_M), np.exp(-beta * data.log_d_M),
    ], -1)  # fmt: skip
    prediction_M = np.exp(data.log_loss_M)
    best, best_3 = np.inf, np.zeros(3)
    for _ in range(200):
        residual_M = np.log(prediction_M) - data.log_loss_M
        root_M = np.sqrt(DELTA / np.maximum(np.abs(residual_M), DELTA))
        design_M3 = basis_M3 * (root_M / prediction_M)[:, None]
        coefficients_3, _ = nnls(design_M3, root_M * (1 - residual_M))
        prediction_M = basis_M3 @ coefficients_3
        if not (prediction_M > 0).all():
            break
        size_M = np.abs(np.log(prediction_M) - data.log_loss_M)
        value = np.where(size_M <= DELTA, size_M**2 / 2, DELTA * (size_M - DELTA / 2)).sum()
        if value >= best * (1 - 1e-13):
            break
        best, best_3 = float(value), coefficients_3
    return best, best_3


def fit_projection(data: Data) -> np.ndarray:
    """Parameters (5,) by variable projection: a grid over alpha and beta, then Nelder-Mead."""
    grid = itertools.product(np.geomspace(0.1, 1.6, 7), repeat=2)
    start = min(grid, key=lambda ab: project(ab[0], ab[1], data)[0])
    result = minimize(
        lambda ab: project(ab[0], ab[1], data)[0] / DELTA**2, start, method="Nelder-Mead",
        bounds=[(0, 5)] * 2, options={"xatol": 1e-8, "fatol": 1e-10, "maxiter": 1000},
    )  # fmt: skip
    _, coefficients_3 = project(result.x[0], result.x[1], data)
    return np.concatenate([np.log(np.maximum(coefficients_3, 1e-13)), result.x])


def natural(theta: np.ndarray, data: Data) -> np.ndarray:
    """E, A, B, alpha, beta in the units of the formula."""
    log_e, log_a, log_b, alpha, beta = theta
    logs = np.array([log_e, log_a + alpha * data.centre_n, log_b + beta * data.centre_d])
    return np.concatenate([np.exp(logs), [alpha, beta]])


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
        return Surface(arm, runs, *[None] * 8, refusal=f"{runs} finished runs; five parameters "
                       f"need at least {MIN_RUNS}")  # fmt: skip
    data = make_data(n_M, d_M, loss_M)
    ends = [descend(fit_projection(data), data).x, fit_descent(data)]
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
        rng = np.random.default_rng(seed)
        drawn = np.array([_resample(theta, data, rng) for _ in range(draws)])
        ends = np.quantile(drawn, [0.025, 0.975], axis=0).T.tolist()
        intervals = {name: (low, high) for name, (low, high) in zip(NAMES, ends, strict=True)}
    return Surface(arm, runs, **values, objective=value, optimality=optimality,
                   intervals=intervals, refusal=refusal)  # fmt: skip


def _resample(theta: np.ndarray, data: Data, rng: np.random.Generator) -> np.ndarray:
    rows = rng.integers(len(data.log_loss_M), size=len(data.log_loss_M))
    picked = Data(data.log_n_M[rows], data.log_d_M[rows], data.log_loss_M[rows],
                  data.centre_n, data.centre_d)  # fmt: skip
    return natural(descend(theta, picked).x, data)
