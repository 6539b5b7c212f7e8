"""A record's loss may look at the loss of every position, also from inside a selection."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from modjax.errors import InputError
from modjax.nn import Inside, Record, TokenLoss, losses, observe, statistics


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Reward(Record):
    """Record whose loss rewards choices at positions of high loss."""

    chance_BL: jax.Array

    def loss(self, tokens=None, totals=None):
        return -jnp.mean(self.chance_BL * jax.lax.stop_gradient(tokens.nll_BL))

    def observed(self, measured, updates, tokens=None):
        return {"best": jnp.maximum(measured["best"], jnp.max(self.chance_BL))}

    @classmethod
    def statistics(cls, records, valid_BL):
        chances = [jnp.mean(jnp.where(valid_BL, r.chance_BL, 0.0)) for r in records.values()]
        return {"chance": jnp.mean(jnp.stack(chances))}


class Fresh(Reward):
    """Record whose measured number does not depend on the old one."""

    def observed(self, measured, updates, tokens=None):
        return {"best": jnp.max(self.chance_BL)}


RNG = np.random.default_rng(0)
NLL = RNG.random((2, 6)).astype(np.float32)
CHANCE = RNG.random((3, 2, 6)).astype(np.float32)  # of three repetitions


def test_losses_see_the_loss_of_every_position_and_pass_gradients():
    def own(chance):
        return losses({"0_x": Reward(chance)}, TokenLoss(NLL))

    np.testing.assert_allclose(own(CHANCE), -(CHANCE * NLL).mean(axis=(1, 2)).sum(), rtol=1e-5)
    np.testing.assert_allclose(jax.grad(own)(CHANCE), np.tile(-NLL / 12, (3, 1, 1)), rtol=1e-5)


def test_inside_a_selection_they_see_the_losses_of_what_was_selected():
    indices = np.array([[0, 2, 5], [1, 3, 6]])  # the last of the second row is empty
    valid = indices < 6
    chance = RNG.random((1, 2, 3)).astype(np.float32)
    inside = Inside(Reward(chance), indices[None], valid[None])
    seen = np.where(valid, np.take_along_axis(NLL, np.minimum(indices, 5), axis=1), 0)
    np.testing.assert_allclose(
        losses({"x": inside}, TokenLoss(NLL)), -(chance[0] * seen).mean(), rtol=1e-5
    )
    said = statistics({"0_mod/inner": inside}, jnp.ones((2, 6), bool))
    np.testing.assert_allclose(
        said["0_mod/inner/chance"], np.where(valid, chance[0], 0).mean(), rtol=1e-5
    )


def test_what_is_measured_is_kept_where_its_layer_lies():
    measured = {"0_x": {"inner": {"best": jnp.zeros(3)}}, "1_y": {"best": jnp.ones(3)}}
    new, count = observe(measured, {"0_x/inner": Reward(CHANCE)}, jnp.int32(0), stacked=True)
    np.testing.assert_allclose(new["0_x"]["inner"]["best"], CHANCE.max(axis=(1, 2)))
    np.testing.assert_array_equal(new["1_y"]["best"], np.ones(3))
    assert count == 3
    with pytest.raises(InputError, match="records = '2_z': has no measured 'best'"):
        observe(measured, {"2_z": Reward(CHANCE)}, jnp.int32(0), stacked=True)
    with pytest.raises(InputError, match="records = 'x': has no measured 'best'"):
        observe({"x": {"other": 1.0}}, {"x": Fresh(CHANCE)}, 0)
    said = r"stacked = False: x/best has the shape \(3,\), its record \(\): set stacked=True for"
    with pytest.raises(InputError, match=said):
        observe({"x": {"best": jnp.zeros(3)}}, {"x": Fresh(CHANCE)}, 0)
