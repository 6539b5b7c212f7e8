"""Rule from outside: selects positions that score above the position before.

Legend: B batch, L positions, K selected positions, R scores of a position.
"""

import dataclasses

import jax
import jax.numpy as jnp

import modjax
from modjax.nn.routing.rules import Choice, Rule


@dataclasses.dataclass(frozen=True)
class Rising(modjax.Rule):
    causal, causal_names = True, ("rising",)

    def slot_share(self, capacity: float) -> float:
        return 1.0  # all may rise


class RisingModule(Rule):
    def choose(self, scores_BLR, at, call) -> Choice:
        scores_BL = scores_BLR[..., 0]
        requested_BL = scores_BL > jnp.pad(scores_BL[:, :-1], ((0, 0), (1, 0)))
        return Choice(scores_BL, scores_BL, requested_BL, scores_BLR)

    def weigh(self, scores_BK):
        return jax.nn.sigmoid(scores_BK)

    def start(self, batch):
        return jnp.zeros(batch)

    def decide(self, name, x_BLD, choice, at, state):
        """Compares the first score with the last one that was read before, `state`."""
        scores_BL = choice.scores_BL
        before_BL = jnp.concatenate([state[:, None], scores_BL[:, :-1]], axis=1)
        read_B = at.count(*scores_BL.shape)
        after_BL = jnp.concatenate([state[:, None], scores_BL], axis=1)
        return scores_BL > before_BL, jax.vmap(lambda s_L, n: s_L[n])(after_BL, read_B)


modjax.register(Rising, RisingModule)
