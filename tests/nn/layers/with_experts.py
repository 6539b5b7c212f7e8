"""Foreign block with experts inside, and inputs for it.

Legend: B batch, L positions, K selected positions.
"""

import numpy as np
from flax import nnx

from modjax.nn import At, Call, build
from modjax.specs import MoDConfig, MoE, Predictor, Shape, TokenChoice
from tests.nn.small import WIDTH

B, L, K = 2, 12, 6
X = np.random.default_rng(0).normal(size=(B, L, WIDTH)).astype(np.float32)
CONFIG = MoDConfig(capacity=K / L, causal=Predictor())


class WithExperts(nnx.Module):
    """Foreign block with a MoE inside."""

    def __init__(self, rngs):
        shape = Shape(WIDTH, 2, 2, 2, 4, 16, 1e-6)
        self.moe = build(MoE(4, TokenChoice(2, balance=0.3, z=0.2)), shape, rngs=rngs)

    def __call__(self, x_BKD, positions_BK, valid_BK):
        out = self.moe(x_BKD, At(positions_BK, None, valid_BK, {}, {}), Call())
        return out.x, out.records
