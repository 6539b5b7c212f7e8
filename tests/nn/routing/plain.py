"""A routed block with a small inner block, and the same in plain numpy.

Legend: B batch, L positions, D width.
"""

import dataclasses

import jax
import numpy as np
from flax import nnx

from modjax.nn import MoDBlock
from modjax.specs import MoDConfig, Predictor
from tests.nn.small import QUICK, SCHEMES, WIDTH, Mixer

BATCH, LENGTH, K = 3, 16, 4
CONFIG = MoDConfig(capacity=K / LENGTH, causal=Predictor(weight=2.0))
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, LENGTH, WIDTH)).astype(np.float32)
VALID = np.arange(LENGTH) < np.array([[LENGTH], [11], [2]])
KS = (K, 3, 1)  # a quarter of each row's positions: 16 / 4, 11 / 4 and 2 / 4, but one at least


def run_block(name, x=X, edit=lambda block: None, config=CONFIG, **arguments):
    """Returns the block of a scheme of SCHEMES, its output and its record."""
    rngs = nnx.Rngs(0)
    config = dataclasses.replace(config, **SCHEMES[name])
    block = MoDBlock(Mixer(rngs), WIDTH, config, rngs=rngs)
    edit(block)
    graphdef, params = nnx.split(block)
    routing = arguments.pop("routing", "trained")
    slots = arguments.pop("slots", None)
    call = jax.jit(
        lambda params, x, arguments: nnx.merge(graphdef, params)(
            x, routing=routing, slots=slots, **arguments
        ),
        compiler_options=QUICK,
    )
    y, record = jax.device_get(call(params, x, arguments))
    return block, y, record


def plain_mixer(x, w):
    count = np.arange(1, len(x) + 1)[:, None]
    return x + np.tanh(np.cumsum(x, axis=0) / count) @ w


def plain_block(block, weights, selected, x=X):
    """Returns x + weight * (f(x) - x) at the selected positions of each row; f sees only these."""
    y = x.astype(np.float64)
    w = np.asarray(block.inner.w[...], np.float64)
    for b, row in enumerate(selected):
        f = plain_mixer(y[b, row], w)
        y[b, row] += weights[b, row][:, None] * (f - y[b, row])
    return y


def best_k(ranking, valid):
    """Returns the best quarter of each row's valid positions, as a mask."""
    mask = np.zeros_like(valid)
    for b in range(len(ranking)):
        order = [i for i in np.argsort(-ranking[b]) if valid[b, i]]
        mask[b, order[: max(1, round(K / LENGTH * len(order)))]] = True
    return mask


def first_k(wanted, k):
    """Returns each row's first k requested positions, as a mask; k is one number or one a row."""
    return wanted & (np.cumsum(wanted, axis=1) <= np.reshape(k, (-1, 1)))


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def masked_mean(x, valid):
    return np.array([row[keep].mean() for row, keep in zip(x, valid, strict=True)])


def assert_close(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
