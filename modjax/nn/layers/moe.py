"""Mixture of experts in place of an MLP: a router, a rule, and the sum of the experts' outputs.

Legend: B batch, L positions, P picks of a position, R scores of a position, E experts, D model
width.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from modjax import specs
from modjax.kernels import project, project_back
from modjax.nn.build import build
from modjax.nn.call import At, Call, Out, under
from modjax.nn.layers.dense import Sublayer, depth_scale, mlp, mlp_weights
from modjax.nn.layers.experts import MATRIX_AXES, in_groups, in_slots, one_by_one, slots_of
from modjax.nn.params import normal_param, read
from modjax.nn.routing.expert_rules import SCORES
from modjax.nn.routing.routing_records import Dispatched
from modjax.nn.routing.selection import of_valid

# At most this many positions are computed expert by expert: they do little but read weights.
FEW = 16


class MoE(Sublayer):
    """A weighted sum of the experts that a rule picks (arXiv 2101.03961, Eq. 2), see specs.MoE."""

    def __init__(self, spec: specs.MoE, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec.norm, shape)
        self.spec = spec
        d, f, e = shape.d_model, spec.expert_width(shape), spec.experts
        self.router = build(spec.router, shape, rngs=rngs, outputs=spec.rule.outputs(e))
        stds = dict.fromkeys(mlp_weights(spec.activation), 1 / math.sqrt(d))
        stds["w_out"] = 1 / math.sqrt(f) / depth_scale(shape)

        def matrices(*shape: int) -> nnx.Dict:
            found, axes = {}, MATRIX_AXES[-len(shape) :]
            for name, std in stds.items():
                back = name == "w_out"
                found[name] = normal_param(rngs, shape, axes, std=std, transposed=back)
            return nnx.Dict(found)

        self.experts: Any = matrices(e, d, f)  # or a list of each expert's, see split_weights
        self.shared = matrices(d, f * spec.shared) if spec.shared else None
        self.rule: Any = build(spec.rule, shape, rngs=rngs, experts=e)

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        spec, (batch, length) = self.spec, x_BLD.shape[:2]
        valid_BL = jnp.ones((batch, length), bool) if at.valid_BL is None else at.valid_BL
        y_BLD, dtype = self.before(x_BLD), x_BLD.dtype
        scored = self.router(y_BLD, at, call, cache or None)
        scores_BLR = SCORES[spec.rule.scores](scored.x)
        picks = self.rule.pick(scores_BLR, at, valid_BL, spec.slots, call)
        picked_BL = taken_BL = jnp.sum(picks.experts_BLP < spec.experts, axis=2)
        computed_B = jnp.sum(picked_BL, axis=1)
        if call.routing == "trained" and spec.capacity_factor is not None:
            size_B = of_valid(spec.slots, at.valid_BL, batch, length)
            slots = slots_of(picks, spec.experts, spec.slots(length), size_B)
            taken_BL = slots.taken_BL
            computed_B = jnp.full(batch, spec.computed(length))
            z_BLD = in_slots(y_BLD, slots, self._stacked(dtype), spec.activation)
        elif batch * length <= FEW:
            z_BLD = one_by_one(y_BLD, picks, self._each(dtype), spec.activation)
        else:
            z_BLD = in_groups(y_BLD, picks, self._stacked(dtype), spec.activation)
        if self.shared is not None:
            shared = {name: read(w, dtype) for name, w in self.shared.items()}
            z_BLD += mlp(y_BLD, shared, spec.activation, project, project_back)
        picks_B = jnp.sum(picks.rows_BR, axis=1)
        own = Dispatched(
            picked_BL, taken_BL, valid_BL, picks.experts_BLP, picks_B, computed_B, picks.tied_BE
        )
        rule = self.rule.report(scored.x, scores_BLR, picks, valid_BL)
        records = {"": own, "rule": rule, **under("router", scored.records)}
        depth_BL = (taken_BL > 0).astype(jnp.int32) if spec.real < 1 else 0
        return Out(self.added(x_BLD, z_BLD), scored.write, records, {}, depth_BL)

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> Any:
        return self.router.empty(batch, length, slack, dtype)

    def split_weights(self) -> None:
        """Stores each expert's weights separately, so that a step reads only those that it uses."""
        if not isinstance(self.experts, nnx.List):
            of = range(self.spec.experts)
            each = [{name: nnx.Param(w[...][e]) for name, w in self.experts.items()} for e in of]
            self.experts = nnx.List([nnx.Dict(one) for one in each])

    def _each(self, dtype: DTypeLike) -> list[dict[str, jax.Array]]:
        if isinstance(self.experts, nnx.List):
            return [_read(one, dtype) for one in self.experts]
        stacked = _read(self.experts, dtype)
        return [{name: w[e] for name, w in stacked.items()} for e in range(self.spec.experts)]

    def _stacked(self, dtype: DTypeLike) -> dict[str, jax.Array]:
        if isinstance(self.experts, nnx.List):
            return jax.tree.map(lambda *each: jnp.stack(each), *self._each(dtype))
        return _read(self.experts, dtype)


def _read(matrices: Any, dtype: DTypeLike) -> dict[str, jax.Array]:
    """Returns the matrices of experts, which experts.py gathers."""
    return {name: read(w, dtype, whole=False) for name, w in matrices.items()}
