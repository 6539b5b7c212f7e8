"""Mean and standard error of an evaluation."""

import numpy as np
import pytest

from modjax.training.evaluate import Scores, evaluate, summarise


def test_equal_weights_give_the_textbook_mean_and_standard_error():
    loss_B = np.random.default_rng(0).normal(2.0, 0.3, 40) * 16
    result = summarise(Scores(loss_B, np.full(40, 16.0), {}))
    assert result.loss == pytest.approx(np.mean(loss_B / 16))
    assert result.sem == pytest.approx(np.std(loss_B / 16, ddof=1) / np.sqrt(40))
    assert result.tokens == 640


def test_unequal_weights_give_the_token_mean_and_the_error_that_resampling_finds():
    rng = np.random.default_rng(1)
    weight_B = rng.integers(5, 50, 300).astype(float)
    loss_B = weight_B * rng.normal(2.0, 0.5, 300)
    result = summarise(Scores(loss_B, weight_B, {}))
    assert result.loss == pytest.approx(loss_B.sum() / weight_B.sum())
    rows = rng.integers(0, 300, (4000, 300))
    resampled = loss_B[rows].sum(axis=1) / weight_B[rows].sum(axis=1)
    assert result.sem == pytest.approx(resampled.std(), rel=0.08)


def test_sequences_without_weight_are_padding():
    rng = np.random.default_rng(2)
    loss_B = rng.random(10)
    padded = summarise(
        Scores(np.append(loss_B, [0.0, 0.0]), np.append(np.ones(10), [0.0, 0.0]), {})
    )
    assert padded == summarise(Scores(loss_B, np.ones(10), {}))


def test_batches_are_joined_and_numbered():
    def eval_step(params, batch, index):
        return np.asarray(batch) * params, np.full(len(batch), 1.0 + int(index)), {}

    result = summarise(evaluate(eval_step, 2.0, [[1.0, 2.0], [3.0, 4.0]]))
    assert result.loss == pytest.approx(20 / 6)
    assert result.tokens == 6
