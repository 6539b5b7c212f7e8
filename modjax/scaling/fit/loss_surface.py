"""L(N, D) = E + A / N^alpha + B / D^beta in logarithms, and how far a theta is from the runs.

Shapes: M runs, theta (5,) in the order log E, log A', log B', alpha, beta.
"""

from dataclasses import dataclass

import numpy as np

DELTA = 1e-3


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


def residuals(theta: np.ndarray, data: Data) -> tuple[np.ndarray, np.ndarray]:
    """log L_predicted - log L, (..., M), and its derivatives, (..., M, 5), for theta (..., 5)."""
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
    """r^2 / 2 up to delta, delta (|r| - delta / 2) beyond."""
    size = np.abs(residual)
    inner = np.minimum(size, DELTA)
    return inner * (size - inner / 2)


def objective(theta: np.ndarray, data: Data) -> tuple[float, np.ndarray, np.ndarray]:
    """Sum of Huber losses, its gradient (5,), and the sum of |terms| of each gradient component."""
    residual_M, slopes_M5 = residuals(theta, data)
    gradient_M5 = np.clip(residual_M, -DELTA, DELTA)[:, None] * slopes_M5
    return float(huber(residual_M).sum()), gradient_M5.sum(0), np.abs(gradient_M5).sum(0)
