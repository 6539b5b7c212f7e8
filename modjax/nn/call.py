"""The one call of every layer: `layer(x, at, call, cache) -> Out`.

It serves training, reading a prompt, extending a filled cache, and decoding one position.

Legend: B batch, L positions, D model width, H head width.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from modjax.nn.records import Record


class At(NamedTuple):
    """Per-position context; every selection gathers all of it.

    positions_BL: the position of each token in its sequence.
    segments_BL: attention stays within equal ids; None means one segment.
    valid_BL: False marks padding, which is never routed, written or counted; None means none.
    ropes: text of a specs.Rope -> cos and sin, each (B or 1, L, H/2) for the H dims that turn.
    passed: arrays (B, L, ...) that earlier layers passed on, by name.
    sequences_BL: the id of each position's sequence, which seeds random routing. A row that moves
      within its batch keeps its id. None forbids random routing.
    prompt_BL: True marks the prompt, on which Skip may decide for a whole sequence.
    """

    positions_BL: jax.Array
    segments_BL: jax.Array | None
    valid_BL: jax.Array | None
    ropes: Mapping[str, tuple[jax.Array, jax.Array]]
    passed: Mapping[str, jax.Array]
    sequences_BL: jax.Array | None = None
    prompt_BL: jax.Array | None = None

    def count(self, batch: int, length: int) -> jax.Array:
        """Returns the number of valid positions of each row, (B,), of `length`."""
        if self.valid_BL is None:
            return jnp.full(batch, length, jnp.int32)
        return jnp.sum(self.valid_BL, axis=1, dtype=jnp.int32)


def number_rows(batch: int, length: int) -> jax.Array:
    """Returns `At.sequences_BL` for a batch whose rows are separate sequences."""
    return jnp.broadcast_to(jnp.arange(batch)[:, None], (batch, length))


class Call(NamedTuple):
    """The settings of a call. All fields but the key are static.

    routing: "trained" selects as in training. "causal" lets each layer use its own rule that never
      looks ahead. The name of such a rule selects it in every layer that has it.
    slack: in a causal routing, a routed layer processes at most the first slack * capacity * L
      requested positions of a row. A cache has as many slots. L includes padding. None processes
      all.
    key: the PRNG key of random routing.
    fresh: the caches are empty, so nothing has to be read from them.
    selected: the positions were selected by content. The index of a position in the selection then
      depends on other documents, so no layer may use it.
    layer_loop, remat: how the stack runs its layers, see specs.Execution.
    layout: what is known of At.positions_BL and valid_BL, for kernels. "whole": the positions are
      0, 1, ..., and those that are not valid come last. "part": the valid ones ascend, and come
      first. "masked": the valid ones ascend, and lie anywhere.
    """

    routing: str = "trained"
    slack: float | None = None
    key: jax.Array | None = None
    fresh: bool = False
    selected: bool = False
    layer_loop: str = "auto"
    remat: str = "none"
    layout: str = "whole"

    def inside(self, index: int | jax.Array) -> "Call":
        """Returns the call for layer number `index` within another, with its own key."""
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        return self._replace(key=key)


class Out(NamedTuple):
    """The output of a layer.

    x: (B, L, ...).
    write: the update of the cache; () without a cache.
    records: what the layer reports, by the paths of its modules; "" is its own record.
    passed: arrays (B, L, ...) that are passed to later layers, by name.
    depth_BL: how many selections took each position; 0 for a layer that selects none.
    """

    x: jax.Array
    write: Any = ()
    records: Mapping[str, Record] = MappingProxyType({})
    passed: Mapping[str, jax.Array] = MappingProxyType({})
    depth_BL: Any = 0


def under(path: str, records: Mapping[str, Record]) -> dict[str, Record]:
    """Returns a layer's records with its `path` within another layer before their names."""
    return {f"{path}/{name}" if name else path: record for name, record in records.items()}
