"""Self-attention as a layer of the residual stream, and the placement of norms."""

from typing import Annotated

from modjax.errors import require
from modjax.specs.fields import Positive, one_of
from modjax.specs.layer import Cost, Costs, Layer, Load, Shape, spec
from modjax.specs.masks import Causal, Mask
from modjax.specs.rope import Rope

Norm = Annotated[str, one_of("before", "after", "both")]


def norm_params(norm: str, d_model: int) -> int:
    return d_model * (2 if norm == "both" else 1)


@spec
class Attention(Layer):
    """Self-attention with grouped queries and rotary positions, added to the stream.

    norm: place of the RMSNorm: "before" the sublayer, "after" it, or "both".
    rope: rotary positions, or None for none.
    mask: which keys a query may see, such as Causal() & Window(512).
    softcap: c, which turns each score s into c tanh(s / c) (arXiv 2408.00118, section 2), or None.
    received: whether to pass the attention that each position received to later layers, for the
      router `Received`.
    qk_norm: RMSNorm of queries and keys before rotation: "head" for each head, "all" for all heads
      together, or None (arXiv 2010.04245, section 3, and 2302.05442, section 2).
    bias: "qkv" adds biases to queries, keys and values, "all" also to the output, None nowhere.
    clip: bound on the absolute values of queries, keys and values, before rotation, or None.
    scale: factor of the scores; None means 1 / sqrt(head_dim).

    Raises InputError unless the number of rotated dims is even and num_kv_heads divides num_heads.
    """

    norm: Norm = "before"
    rope: Rope | None = Rope()
    mask: Mask = Causal()
    softcap: Positive[float | None] = None
    received: bool = False
    qk_norm: Annotated[str | None, one_of("head", "all")] = None
    bias: Annotated[str | None, one_of("qkv", "all")] = None
    clip: Positive[float | None] = None
    scale: Positive[float | None] = None

    def check(self, shape: Shape) -> None:
        super().check(shape)
        heads, groups = shape.num_heads, shape.num_kv_heads
        if self.rope is not None:
            width = self.rope.width(shape.head_dim)
            accepted = "must be even, for rotary positions (left out, it is d_model / num_heads)"
            if self.rope.share < 1:
                accepted = f"{self.rope} turns {width} of its dims: must be even, and 2 or more"
            require(width > 0 and width % 2 == 0, "model.head_dim", shape.head_dim, accepted)
            self.rope.check(width)
        accepted = f"must divide model.num_heads = {heads}"
        require(heads % groups == 0, "model.num_kv_heads", groups, accepted)

    def cost(self, shape: Shape, load: Load) -> Costs:
        d, h, heads = shape.d_model, shape.head_dim, shape.num_heads
        pairs = self.mask.pairs(load.tokens, load.keys) * heads
        w_q, w_kv = d * heads * h, 2 * d * shape.num_kv_heads * h
        per_head = heads + shape.num_kv_heads if self.qk_norm == "all" else 2
        b_qkv = (heads + 2 * shape.num_kv_heads) * h if self.bias else 0
        norms = norm_params(self.norm, d) + (per_head * h if self.qk_norm else 0)
        yield Cost("norm", params=norms)
        yield Cost("qkv", 2.0 * (load.tokens * w_q + load.keys * w_kv), w_q + w_kv + b_qkv)
        yield Cost("scores", 2.0 * pairs * h)
        yield Cost("softmax", 3.0 * pairs)
        yield Cost("values", 2.0 * pairs * h)
        yield Cost("output", 2.0 * load.tokens * w_q, w_q + (d if self.bias == "all" else 0))

    def looks_ahead(self, routing: str) -> bool:
        _, ahead = self.mask.reach
        return ahead != 0

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        return 2 * shape.num_kv_heads * shape.head_dim * self.mask.kept(length)

    def ropes(self) -> frozenset[Rope]:
        return frozenset() if self.rope is None else frozenset({self.rope})

    def passes_on(self) -> frozenset[str]:
        return frozenset({"received"} if self.received else ())
