"""Attention, added to the residual stream, and the places of its norm."""

from typing import Annotated

from modjax.errors import require
from modjax.specs.fields import Positive, one_of
from modjax.specs.layer import Cost, Costs, Layer, Load, Shape, spec
from modjax.specs.layers.masks import Causal, Mask

Norm = Annotated[str, one_of("before", "after", "both")]


def norm_params(norm: str, d_model: int) -> int:
    return d_model * (2 if norm == "both" else 1)


@spec
class Attention(Layer):
    """Self-attention with grouped queries and rotary positions, added to the stream.

    norm: place of the RMSNorm: "before" the sublayer, "after" it, or "both".
    rope: base of the rotary angles, greater than 0.
    mask: which keys a query may see, such as Causal() & Window(512).
    softcap: c of c tanh(s / c) on the scores s (arXiv 2408.00118, section 2), or None.
    received: whether to pass the attention that each position received to later layers, for the
      router `Received`.

    Raises InputError unless head_dim is even and num_kv_heads divides num_heads.
    """

    norm: Norm = "before"
    rope: Positive[float] = 10_000.0
    mask: Mask = Causal()
    softcap: Positive[float | None] = None
    received: bool = False

    def check(self, shape: Shape) -> None:
        super().check(shape)
        even, heads, groups = shape.head_dim % 2 == 0, shape.num_heads, shape.num_kv_heads
        accepted = "must be even, for rotary positions (left out, it is d_model / num_heads)"
        require(even, "model.head_dim", shape.head_dim, accepted)
        accepted = f"must divide model.num_heads = {heads}"
        require(heads % groups == 0, "model.num_kv_heads", groups, accepted)

    def cost(self, shape: Shape, load: Load) -> Costs:
        d, h, heads = shape.d_model, shape.head_dim, shape.num_heads
        pairs = self.mask.pairs(load.tokens, load.keys) * heads
        w_q, w_kv = d * heads * h, 2 * d * shape.num_kv_heads * h
        yield Cost("norm", params=norm_params(self.norm, d))
        yield Cost("qkv", 2.0 * (load.tokens * w_q + load.keys * w_kv), w_q + w_kv)
        yield Cost("scores", 2.0 * pairs * h)
        yield Cost("softmax", 3.0 * pairs)
        yield Cost("values", 2.0 * pairs * h)
        yield Cost("output", 2.0 * load.tokens * w_q, w_q)

    def looks_ahead(self, routing: str) -> bool:
        _, ahead = self.mask.reach
        return ahead != 0

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        return 2 * shape.num_kv_heads * shape.head_dim * self.mask.kept(length)

    def ropes(self) -> frozenset[float]:
        return frozenset({self.rope})

    def passes_on(self) -> frozenset[str]:
        return frozenset({"received"} if self.received else ())
