"""Softmax attention of queries over the keys that a mask shows to them.

Legend: B batch, L positions, M key positions, N heads, G kv heads, H head width.
"""

import jax

from modjax.kernels import cudnn, plain, splash
from modjax.kernels.scoring import Scoring, Side
from modjax.kernels.target import target
from modjax.sharding import takes_kernels

FUSED = {"tpu": splash, "gpu": cudnn}


@jax.named_scope("attention")
def attend(
    q_BNLH: jax.Array,
    k_BGMH: jax.Array,
    v_BGMH: jax.Array,
    scoring: Scoring,
    queries: Side,
    keys: Side | None = None,
    places_BL: jax.Array | None = None,
    *,
    layout: str = "masked",
) -> jax.Array:
    """Returns softmax attention (arXiv 1706.03762, Eq. 1), (B, N, L, H).

    A query that sees no key gets 0. N is a multiple of G. Scores and softmax are float32; the
    products take the dtype of the inputs. A fused kernel of the platform computes it where one
    applies. Unless the layout is "masked", the output of a query that is not valid is then
    unspecified.

    keys: None means the queries' own positions, which ascend.
    places_BL: the place of each query's own key; those that count ascend, and so do the positions
      of the keys. Keys that the mask hides by their place are then left out, but there is no
      gradient.
    layout: what is known of the queries' positions, see modjax.nn.Call.
    """
    fused = FUSED.get(target()) if takes_kernels() else None
    if keys is None and fused is not None and fused.applies(q_BNLH, scoring, queries, layout):
        return fused.attend(q_BNLH, k_BGMH, v_BGMH, scoring, queries, layout)
    return plain.attend(q_BNLH, k_BGMH, v_BGMH, scoring, queries, keys, places_BL)
