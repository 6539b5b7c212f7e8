"""Inputs of attention beside queries, keys and values.

Legend: B batch, L positions, H head width. B may be 1 in a Side.
"""

import math
from typing import NamedTuple

import jax

from modjax.specs.masks import Mask

# Logical axes of queries (B, N, L, H), and of keys and values (B, G, L, H).
QUERY_AXES, KEY_AXES = (("batch", heads, None, None) for heads in ("heads", "kv_heads"))


class Side(NamedTuple):
    """Queries or keys of attention.

    positions_BL: their positions in the sequence.
    segments_BL: a query sees the keys of its own segment; None means one segment.
    valid_BL: a key that is not valid is hidden; None means that all are valid.
    """

    positions_BL: jax.Array
    segments_BL: jax.Array | None = None
    valid_BL: jax.Array | None = None

    def part(self, places: slice) -> "Side":
        return jax.tree.map(lambda leaf: leaf[:, places], self)


class Scoring(NamedTuple):
    """Scores of pairs of query and key: scale q . k, capped, where the mask shows the key.

    scale: None takes 1 / sqrt(H).
    softcap: replaces scores s by c tanh(s / c) with this c; None means no cap.
    """

    mask: Mask
    scale: float | None = None
    softcap: float | None = None

    def factor(self, head_dim: int) -> float:
        """Returns the scale of the scores."""
        return 1 / math.sqrt(head_dim) if self.scale is None else self.scale
