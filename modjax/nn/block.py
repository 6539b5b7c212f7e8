"""Mixture-of-Depths around any block of yours, from any model.

Legend: B batch, L positions, K selected positions, D model width.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from modjax.nn.call import At, Call
from modjax.nn.routed import Routed
from modjax.nn.routed_layer import RoutedLayer
from modjax.nn.routing import Selection, check_inputs, gather, gather_pairs, scatter_add
from modjax.nn.sharding import constrain_stream
from modjax.spec.mod import MoDConfig


class MoDBlock(RoutedLayer):
    """Routes the k = max(1, round(capacity * n)) best-scored of n valid positions through `inner`.

    `inner` maps (x_BKD, *per_position, **pairwise, **whole) to x_BKD or to (x_BKD, extra) and sees
    the selected positions only, in order, with what belongs to them.
    """

    def __init__(self, inner: nnx.Module, d_model: int, config: MoDConfig, *, rngs: nnx.Rngs):
        self.inner = inner
        super().__init__(config, d_model, rngs=rngs)

    def __call__(
        self,
        x_BLD: jax.Array,
        *per_position: Any,
        pairwise: Mapping[str, Any] | None = None,
        whole: Mapping[str, Any] | None = None,
        valid_BL: jax.Array | None = None,
        key: jax.Array | None = None,
        handed: Mapping[str, jax.Array] | None = None,
        routing: str = "trained",
        slots: int | None = None,
    ) -> tuple[jax.Array, Routed]:
        """Returns x_BLD and the record of what was routed; add its `loss()` to your objective.

        per_position: pytrees of arrays (B or 1, L, ...) that `inner` takes beside x: positions,
          segment ids, rotary tables. Each is gathered like x.
        pairwise: keyword arguments of `inner` between two positions, (B or 1, heads or 1, L, L),
          like the masks of nnx.make_causal_mask. Each is gathered along both. Where a row selects
          fewer than K, the entries left over see themselves (1), and no other sees them (0): a
          bias needs a mask beside it.
        whole: keyword arguments that `inner` gets as they are, like the output of an encoder.
        valid_BL: False marks padding, which is never selected.
        key: for random routing. handed: what a router needs of an earlier layer, by name.
        routing: "trained" selects as in training; "router", "predictor" and "threshold" let each
          position decide for itself, "paced" by the predictor and what its row has spent. They
          drop none, or those beyond the first `slots` of a row.

        Raises InputError for an argument of another shape.
        """
        batch, length = x_BLD.shape[:2]
        inputs = per_position, dict(pairwise or {})
        check_inputs(*inputs, batch, length)
        positions_BL = jnp.broadcast_to(jnp.arange(length), (batch, length))
        at = At(positions_BL, None, valid_BL, {}, dict(handed or {}))

        def process(selection: Selection) -> tuple[jax.Array, Any]:
            x_BKD, per_position = jax.tree.map(
                lambda leaf: gather(leaf, selection.indices_BK), (x_BLD, inputs[0])
            )
            pairwise = jax.tree.map(lambda leaf: gather_pairs(leaf, selection), inputs[1])
            x_BKD = constrain_stream(x_BKD)
            out = self.inner(x_BKD, *per_position, **pairwise, **(whole or {}))  # type: ignore[operator]
            y_BKD = out[0] if isinstance(out, tuple) else out
            update_BKD = self.update(selection.scores_BK, x_BKD, y_BKD)
            return scatter_add(x_BLD, selection.indices_BK, update_BKD), ()

        most = length if slots is None else min(slots, length)
        none_B = jnp.zeros(batch, jnp.int32)
        call = Call(routing=routing, key=key)
        x_BLD, _, record = self.route(x_BLD, at, call, none_B, None, most, process)
        return x_BLD, record
