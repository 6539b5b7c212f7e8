"""Plain layers: attention and MLP, each added to the residual stream, and sequences of layers."""

from typing import Annotated

from modjax.errors import require
from modjax.specs.fields import Positive, one_of
from modjax.specs.layer import Cost, Costs, Layer, Load, Shape, check_parts, named, spec
from modjax.specs.layers.masks import Causal, Mask

GATED = ("geglu", "swiglu")
Activation = Annotated[str, one_of("gelu", "silu", "relu2", *GATED)]
Norm = Annotated[str, one_of("before", "after", "both")]


def matrices(activation: str) -> int:
    """Returns the number of weight matrices of an MLP: 3 with a gated activation, else 2."""
    return 3 if activation in GATED else 2


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

    def hands_on(self) -> frozenset[str]:
        return frozenset({"received"} if self.received else ())


@spec
class MLP(Layer):
    """MLP of two weight matrices, or of three with a gated activation, added to the stream.

    activation: "gelu", "silu" or "relu2"; gated: "geglu" or "swiglu".
    norm: place of the RMSNorm: "before" the sublayer, "after" it, or "both".
    """

    activation: Activation = "gelu"
    norm: Norm = "before"

    def cost(self, shape: Shape, load: Load) -> Costs:
        params = matrices(self.activation) * shape.d_model * shape.d_ff
        yield Cost("norm", params=norm_params(self.norm, shape.d_model))
        yield Cost("mlp", 2.0 * load.tokens * params, params)


@spec
class Seq(Layer):
    """Layers one after another, as one layer."""

    parts: tuple[Layer, ...]

    def __init__(self, *parts: Layer):
        object.__setattr__(self, "parts", parts)
        check_parts("Seq", parts)

    def cost(self, shape: Shape, load: Load) -> Costs:
        for part in self.parts:
            yield from part.cost(shape, load)

    def __str__(self) -> str:
        match self.parts:
            case (Attention(), MLP(activation=name)) if self == Dense(name):
                return f"Dense({repr(name) if self != Dense() else ''})"
        return super().__str__()


@named
def Dense(activation: str = "gelu") -> Seq:
    """Returns a transformer block: Attention, then MLP."""
    return Seq(Attention(), MLP(activation))


DENSE = Dense()
