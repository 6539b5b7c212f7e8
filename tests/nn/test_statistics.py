"""What is logged of a routing, against counts by hand and in numpy.

Legend: A routed blocks, G groups, B batch, L positions.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.nn import routing_statistics


def test_statistics_describe_a_routing_counted_by_hand():
    scores = np.array([[[1.0, 3.0, 5.0, 7.0]], [[0.0, 0.0, 2.0, 2.0]]])
    selected = np.array([[[True, True, False, False]], [[True, False, True, False]]])
    # The last position of the first block asked, and found no room.
    wanted = np.array([[[True, True, False, True]], [[True, False, True, False]]])
    slot = {"scores_BL": scores, "selected_BL": selected, "wanted_BL": wanted, "losses": {}}
    slot["k_B"] = np.array([[2], [3]])
    aux = {"1_mod": jax.tree.map(jnp.asarray, slot)}
    got = {name: float(value) for name, value in routing_statistics(aux).items()}
    assert got["router/score_mean"] == pytest.approx((4 + 1) / 2)
    assert got["router/score_std"] == pytest.approx((5**0.5 + 1) / 2)
    assert got["router/position_entropy"] == pytest.approx(0.5)  # 2 of 4 positions, evenly
    assert got["router/chosen_by_all"] == 0.25
    assert got["router/chosen_by_none"] == 0.25
    assert got["router/capacity"] == 0.5
    assert got["router/overflow"] == 1 / 8
    assert got["router/underload"] == 1 / 8
    assert routing_statistics({}) == {}


BLOCKS = ("1_mod.0", "1_mod.1", "3_mod.0", "3_mod.1")


@pytest.fixture(scope="module")
def described():
    """Two slots of two groups, with padding: the aux, its valid positions and its statistics."""
    rng = np.random.default_rng(0)
    valid_BL = np.arange(8) < np.array([[8], [5], [7]])

    def slot():
        wanted, target = (rng.random((2, 2, 3, 8)) < 0.4) & valid_BL
        return {
            "scores_BL": rng.normal(size=(2, 3, 8)).astype(np.float32),
            "predictor_BL": rng.normal(size=(2, 3, 8)).astype(np.float32),
            "target_BL": target,
            "wanted_BL": wanted,
            "selected_BL": wanted & (np.cumsum(wanted, axis=2) <= 2),
            "k_B": np.full((2, 3), 2),
            "losses": {
                name: rng.random((2, 3)).astype(np.float32) for name in ("auxiliary", "predictor")
            },
        }

    aux = {"1_mod": slot(), "3_mod": slot()}
    found = routing_statistics(jax.tree.map(jnp.asarray, aux), jnp.asarray(valid_BL))
    return aux, valid_BL, {name: float(value) for name, value in found.items()}


@pytest.mark.parametrize(
    "method, logits", [("predictor", "predictor_BL"), ("auxiliary", "scores_BL")]
)
def test_foresight_is_counted_per_block_and_averaged_over_valid_positions(
    described, method, logits
):
    aux, valid_BL, got = described
    means = {name: [] for name in ("accuracy", "precision", "recall", "capacity")}
    for block in BLOCKS:
        slot, group = block.split(".")
        said = aux[slot][logits][int(group)][valid_BL] > 0
        is_so = aux[slot]["target_BL"][int(group)][valid_BL]
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
    aux, valid_BL, got = described
    selected, wanted = (
        sum(slot[name].sum() for slot in aux.values()) for name in ("selected_BL", "wanted_BL")
    )
    assert wanted > selected
    assert got["router/capacity"] == pytest.approx(selected / (4 * valid_BL.sum()))
    taken = np.concatenate([slot["selected_BL"].sum(axis=2) for slot in aux.values()])
    assert taken.min() < 2
    assert got["router/underload"] == pytest.approx((2 - taken).sum() / (4 * valid_BL.sum()))
    assert got["router/overflow"] == pytest.approx((wanted - selected) / (4 * valid_BL.sum()))


def test_losses_are_summed_over_blocks_of_their_mean_over_rows(described):
    aux, _, got = described
    for name in ("auxiliary", "predictor"):
        expected = sum(slot["losses"][name].mean(axis=1).sum() for slot in aux.values())
        assert got[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)


def test_nothing_is_said_of_methods_that_were_not_taught():
    slot = {
        "scores_BL": jnp.zeros((1, 2, 4)), "target_BL": jnp.zeros((1, 2, 4), bool),
        "selected_BL": jnp.zeros((1, 2, 4), bool), "wanted_BL": jnp.zeros((1, 2, 4), bool),
        "k_B": jnp.ones((1, 2), int), "losses": {},
    }  # fmt: skip
    names = routing_statistics({"0_mod": slot}).keys()
    assert not any(name.startswith(("predictor/", "auxiliary/", "loss/")) for name in names)
