"""Statistics of routing records, against counts by hand and in numpy.

Legend: A routed blocks, G groups, B batch, L positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn import Routed, statistics
from modjax.nn.routing.losses import RuleRecord


def record(**fields):
    """Returns a record whose fields that are not given are None."""
    names = [field.name for field in dataclasses.fields(Routed)]
    return Routed(**{name: fields.get(name) for name in names})


def test_statistics_describe_a_routing_counted_by_hand():
    scores = np.array([[[1.0, 3.0, 5.0, 7.0]], [[0.0, 0.0, 2.0, 2.0]]])
    selected = np.array([[[True, True, False, False]], [[True, False, True, False]]])
    # The last position of the first block is requested and dropped.
    wanted = np.array([[[True, True, False, True]], [[True, False, True, False]]])
    routed = record(
        scores_BL=scores,
        selected_BL=selected,
        requested_BL=wanted,
        k_B=np.array([[2], [3]]),
    )
    records = {"1_mod": jax.tree.map(jnp.asarray, routed)}
    got = {name: float(value) for name, value in statistics(records).items()}
    assert got["router/score_mean"] == pytest.approx((4 + 1) / 2)
    assert got["router/score_std"] == pytest.approx((5**0.5 + 1) / 2)
    assert got["router/position_entropy"] == pytest.approx(0.5)  # 2 of 4 positions, evenly
    assert got["router/chosen_by_all"] == 0.25
    assert got["router/chosen_by_none"] == 0.25
    assert got["router/capacity"] == 0.5
    assert got["router/overflow"] == 1 / 8
    assert got["router/underload"] == 1 / 8
    assert statistics({}) == {}


BLOCKS = ("1_mod.0", "1_mod.1", "3_mod.0", "3_mod.1")


@pytest.fixture(scope="module")
def described():
    """Returns records of two layers, repeated twice, with padding; valid positions; statistics."""
    rng = np.random.default_rng(0)
    valid_BL = np.arange(8) < np.array([[8], [5], [7]])

    def routed(name):
        wanted, target = (rng.random((2, 2, 3, 8)) < 0.4) & valid_BL
        scores = rng.normal(size=(2, 3, 8)).astype(np.float32)
        own = record(
            scores_BL=scores,
            target_BL=target,
            requested_BL=wanted,
            selected_BL=wanted & (np.cumsum(wanted, axis=2) <= 2),
            k_B=np.full((2, 3), 2),
        )
        losses = rng.random((2, 2, 3)).astype(np.float32)
        kth = np.zeros((2, 3), np.float32)
        auxiliary = RuleRecord({"auxiliary": losses[0]}, scores, target, kth)
        logits = rng.normal(size=(2, 3, 8)).astype(np.float32)
        predictor = RuleRecord({"predictor": losses[1]}, logits, target)
        return {name: own, f"{name}/rule": auxiliary, f"{name}/causal": predictor}

    records = routed("1_mod") | routed("3_mod")
    found = statistics(jax.tree.map(jnp.asarray, records), jnp.asarray(valid_BL))
    return records, valid_BL, {name: float(value) for name, value in found.items()}


def taught(records, method):
    """Returns the records with a taught loss, by layer."""
    rule = {"predictor": "causal", "auxiliary": "rule"}[method]
    return {place: records[f"{place}/{rule}"] for place in ("1_mod", "3_mod")}


@pytest.mark.parametrize("method", ["predictor", "auxiliary"])
def test_predictions_are_counted_per_block_and_averaged_over_valid_positions(described, method):
    records, valid_BL, got = described
    means = {name: [] for name in ("accuracy", "precision", "recall", "capacity")}
    for block in BLOCKS:
        place, repetition = block.split(".")
        said = taught(records, method)[place].logits_BL[int(repetition)][valid_BL] > 0
        is_so = records[place].target_BL[int(repetition)][valid_BL]
        expected = {
            "accuracy": np.mean(said == is_so),
            "precision": np.sum(said & is_so) / np.sum(said),
            "recall": np.sum(said & is_so) / np.sum(is_so),
            "capacity": np.mean(said),
        }
        for name, value in expected.items():
            assert got[f"{method}/{name}/{block}"] == pytest.approx(value, rel=1e-5)
            means[name].append(value)
    for name, values in means.items():
        assert got[f"{method}/{name}"] == pytest.approx(np.mean(values), rel=1e-5)


def test_capacity_and_overflow_are_shares_of_the_valid_positions(described):
    records, valid_BL, got = described
    selected, wanted = (
        sum(getattr(records[place], name).sum() for place in ("1_mod", "3_mod"))
        for name in ("selected_BL", "requested_BL")
    )
    assert wanted > selected
    assert got["router/capacity"] == pytest.approx(selected / (4 * valid_BL.sum()))
    taken = np.concatenate([records[p].selected_BL.sum(axis=2) for p in ("1_mod", "3_mod")])
    assert taken.min() < 2
    assert got["router/underload"] == pytest.approx((2 - taken).sum() / (4 * valid_BL.sum()))
    assert got["router/overflow"] == pytest.approx((wanted - selected) / (4 * valid_BL.sum()))


def test_losses_are_summed_over_blocks_of_their_mean_over_rows(described):
    records, _, got = described
    for name in ("auxiliary", "predictor"):
        each = [one.losses[name] for one in taught(records, name).values()]
        expected = sum(loss_GB.mean(axis=1).sum() for loss_GB in each)
        assert got[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_said_of_methods_that_were_not_taught():
    none = jnp.zeros((1, 2, 4), bool)
    routed = record(
        scores_BL=jnp.zeros((1, 2, 4)),
        target_BL=none,
        selected_BL=none,
        requested_BL=none,
        k_B=jnp.ones((1, 2), int),
    )
    ranked = RuleRecord({}, kth_B=jnp.zeros((1, 2)))
    names = statistics({"0_mod": routed, "0_mod/rule": ranked}).keys()
    assert not any(name.startswith(("predictor/", "auxiliary/", "loss/")) for name in names)
