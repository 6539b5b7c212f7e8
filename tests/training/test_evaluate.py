"""Mean, standard error and counts of an evaluation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn import Routed
from modjax.nn.records import Counts, counts
from modjax.nn.routing.routing_records import Dispatched
from modjax.specs import Execution
from modjax.training.mesh import make_mesh
from modjax.training.results.evaluate import (
    Scores,
    difference,
    eval_batch_size,
    evaluate,
    outcome,
    summarise,
)


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
    def eval_step(weights, batch, index):
        return np.asarray(batch) * weights, np.full(len(batch), 1.0 + int(index)), {}

    result = summarise(evaluate(eval_step, 2.0, [[1.0, 2.0], [3.0, 4.0]]))
    assert result.loss == pytest.approx(20 / 6)
    assert result.tokens == 6


def test_differences_are_paired_so_what_sequences_share_cancels():
    rng = np.random.default_rng(3)
    weight_B = np.full(50, 8.0)
    hard_B = 8 * rng.normal(3, 1, 50)
    gap_B = 8 * rng.normal(0.1, 0.01, 50)
    found = difference(Scores(hard_B + gap_B, weight_B, {}), Scores(hard_B, weight_B, {}))
    assert found.loss == pytest.approx(np.mean(gap_B / 8))
    assert found.sem == pytest.approx(np.std(gap_B / 8, ddof=1) / 50**0.5)
    assert found.sem < summarise(Scores(hard_B, weight_B, {})).sem / 10


def test_decisions_are_judged_per_layer_over_scored_sequences_and_valid_positions():
    rng = np.random.default_rng(4)
    valid_BL = np.arange(10) < np.array([[10], [6], [10], [10]])
    weight_B = np.array([9.0, 6.0, 8.0, 0.0])  # the last sequence pads the batch
    wanted, target = (rng.random((2, 2, 4, 10)) < 0.5) & valid_BL
    selected = wanted & (np.cumsum(wanted, axis=2) <= 3)
    masks = {"requested_BL": wanted, "selected_BL": selected, "target_BL": target}
    unread = dict.fromkeys(("scores_BL", "k_B", "tied_B"))
    record = Routed(**{name: jnp.asarray(mask) for name, mask in masks.items()}, **unread)
    counted = jax.device_get(counts({"1_mod": record}, jnp.asarray(valid_BL)))
    whole, found = outcome(Scores(weight_B, weight_B, counted))
    assert list(found) == ["1_mod.0", "1_mod.1"]
    names = ("accuracy", "precision", "recall", "capacity", "overflow", "most")
    expected = []
    for g in range(2):
        want, take, right = (x[g, :3][valid_BL[:3]] for x in (wanted, selected, target))
        most = max(selected[g, b][valid_BL[b]].mean() for b in range(3))
        expected.append(
            (
                np.mean(want == right),
                np.sum(want & right) / want.sum(),
                np.sum(want & right) / right.sum(),
                take.mean(),
                np.mean(want & ~take),
                most,
            )
        )
        layer = dict(zip(names, expected[g], strict=True))
        assert found[f"1_mod.{g}"] == pytest.approx(layer)
    mean = dict(zip(names, np.mean(expected, axis=0), strict=True))
    assert whole == pytest.approx(mean | {"most": max(layer[-1] for layer in expected)})


@pytest.mark.parametrize("execution, size", [({"data": 1}, 8), ({"data": 8}, 8), ({"data": 3}, 9)])
def test_runs_of_any_batch_size_are_evaluated_in_the_same_batches(execution, size):
    assert eval_batch_size(make_mesh(Execution(**execution))) == size


def test_near_ties_are_counted_over_layers_and_sequences_that_are_scored():
    picks = {name: np.ones((3, 2)) for name in ("picks", "asked", "taken", "computed")}
    ties = picks | {"near_ties": np.array([[1.0, 0.0], [2.0, 1.0], [9.0, 9.0]])}
    each = {"1_moe": ties, "2_moe": picks, "3_moe": ties}
    counted = {name: Counts(of, Dispatched) for name, of in each.items()}
    scored = np.array([4.0, 4.0, 0.0])
    assert outcome(Scores(np.ones(3), scored, counted))[0]["moe/near_ties"] == 8
    without = {"2_moe": counted["2_moe"]}
    assert "moe/near_ties" not in outcome(Scores(np.ones(3), scored, without))[0]
