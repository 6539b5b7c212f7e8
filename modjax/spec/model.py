"""A decoder's spec: a shape, its layers, an embedding and a head."""

from dataclasses import dataclass
from typing import Any

from modjax.errors import require, require_one_of, require_positive
from modjax.spec import text
from modjax.spec.ends import Embedding, End, Expansion, FinalNorm, Head
from modjax.spec.layer import NAMES, Layer, Repeat, Shape

DTYPES = ("float32", "bfloat16")
# The fields that hold an end: its type, and how an error names the accepted ones.
ENDS = {
    "embed": (Embedding, "Tokens()"),
    "head": (Head, "Logits() or Tied()"),
    "streams": (Expansion | None, "Recycled(2), or None"),
}


@dataclass(frozen=True)
class ModelSpec:
    """A decoder of `num_layers` layers.

    layers: a pattern that repeats over the depth, such as (Dense(), MoD(Dense())), or segments
      `Repeat(..., times=...)`, of which one may leave `times` open. May be given as text.
    head_dim: None takes d_model / num_heads.
    imports: files and modules that register layers which are not modjax's. A spec imports none of
      them: whoever trusts them has imported them before the text of `layers` is read.
    embed, head: the embedding and the head, such as Tied(); may be given as text.
    streams: residual streams in place of one, such as Recycled(2); may be given as text.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    layers: Any = "Dense()"
    head_dim: int | None = None
    norm_eps: float = 1e-6
    dtype: str = "float32"
    imports: tuple[str, ...] = ()
    streams: Any = None
    embed: Any = "Tokens()"
    head: Any = "Logits()"

    def __post_init__(self):
        require_positive(
            self,
            "model",
            "vocab_size",
            "d_model",
            "num_layers",
            "num_heads",
            "num_kv_heads",
            "d_ff",
            "norm_eps",
        )
        require(
            self.head_dim is not None or self.d_model % self.num_heads == 0,
            "model.d_model",
            self.d_model,
            f"must be a multiple of model.num_heads = {self.num_heads}",
        )
        require(
            self.head_dim is None or self.head_dim > 0,
            "model.head_dim",
            self.head_dim,
            "must be greater than 0, or None",
        )
        require_one_of("model.dtype", self.dtype, DTYPES)
        object.__setattr__(self, "layers", read_layers(self.layers))
        for name in ENDS:
            object.__setattr__(self, name, read_end(name, getattr(self, name)))
        for segment in self.segments:  # raises where the depth does not fit
            handed: frozenset[str] = frozenset()
            for layer in segment.parts:
                layer.check(self.shape)
                lacking = layer.needs() - handed
                require(
                    not lacking,
                    "model.layers",
                    str(layer),
                    f"needs a layer before it, in its segment, that hands on {', '.join(lacking)}",
                )
                handed |= layer.hands_on()

    @property
    def shape(self) -> Shape:
        """The numbers that the parts share."""
        head_dim = self.head_dim or self.d_model // self.num_heads
        return Shape(
            self.d_model,
            self.num_layers,
            self.num_heads,
            self.num_kv_heads,
            head_dim,
            self.d_ff,
            self.norm_eps,
            self.streams.streams if self.streams else 1,
            self.vocab_size,
            self.streams.width(self.d_model) if self.streams else self.d_model,
            self.head.tied,
        )

    @property
    def ends(self) -> tuple[tuple[End, ...], tuple[End, ...]]:
        """The parts before and after the layers, in order."""
        return (self.embed, *filter(None, [self.streams])), (FinalNorm(), self.head)

    @property
    def segments(self) -> tuple[Repeat, ...]:
        """The layers as segments, of which none is open."""
        open_segment = () if any(isinstance(p, Repeat) for p in self.layers) else self.layers
        segments = (Repeat(*open_segment),) if open_segment else self.layers
        fixed = sum(len(s.parts) * s.times for s in segments if s.times is not None)
        still_open = [s for s in segments if s.times is None]
        left = self.num_layers - fixed
        require(
            len(still_open) <= 1,
            "model.layers",
            ", ".join(map(str, self.layers)),
            "must leave `times` open in one segment at most",
        )
        if not still_open:
            require(
                left == 0,
                "model.num_layers",
                self.num_layers,
                f"must be {fixed}, the sum of its segments",
            )
            return segments
        (segment,) = still_open
        length = len(segment.parts)
        require(
            left > 0 and left % length == 0,
            "model.num_layers",
            self.num_layers,
            f"must be a multiple of the pattern's length, {length}"
            if fixed == 0
            else f"must be {fixed} and a multiple of {length}, the open segment's length",
        )
        return tuple(s if s.times else Repeat(*s.parts, times=left // length) for s in segments)

    def repeated(self) -> list[tuple[Layer, int]]:
        """Every layer of the segments' patterns, and how often it comes."""
        return [(part, s.times) for s in self.segments for part in s.parts if s.times]

    def routed(self) -> int:
        """How many selections lie on a token's way through the model; 0 for a dense one."""
        return sum(times * layer.routed() for layer, times in self.repeated())

    def looks_ahead(self, routing: str) -> bool:
        """Returns whether some layer looks ahead. routing: "trained" or "causal"."""
        return any(layer.looks_ahead(routing) for layer, _ in self.repeated())

    def rules(self) -> frozenset[str]:
        """Returns the names of the causal rules that a call can ask for."""
        return frozenset().union(*(layer.rules() for layer, _ in self.repeated()))

    def own_rules(self) -> frozenset[str]:
        """Returns the names of the rules that "causal" routing uses."""
        return frozenset().union(*(layer.own_rules() for layer, _ in self.repeated()))

    def used_rules(self, routing: str) -> frozenset[str]:
        """Returns the names of the rules that some layer uses under a routing."""
        return self.own_rules() if routing == "causal" else self.rules() & {routing}

    @property
    def routings(self) -> tuple[str, ...]:
        """The routings that a call can ask for."""
        if self.looks_ahead("causal"):
            return ("trained",)
        return ("trained", "causal", *sorted(self.rules()))

    def check_routing(self, routing: str, field: str) -> None:
        """Raises InputError where a model of this spec cannot select by `routing`."""
        if routing != "trained":
            for layer, _ in self.repeated():
                require(
                    not layer.looks_ahead("causal"),
                    field,
                    routing,
                    f"{layer} has no rule that never looks ahead: MoD has causal=Predictor(), "
                    "experts have TokenChoice() and ExpertThreshold()",
                )
        require_one_of(field, routing, self.routings)

    def causal_routing(self) -> str | None:
        """Returns the routing of this model's honest loss.

        "trained" where nothing is selected and nothing looks ahead; None without a causal rule.
        """
        if self.looks_ahead("causal"):
            return None
        return "causal" if self.own_rules() or self.looks_ahead("trained") else "trained"


def read_end(name: str, value: Any) -> End | None:
    """Returns the end that a field of ENDS holds, from text or as it is."""
    kind, accepted = ENDS[name]
    field = f"model.{name}"
    found = text.read(value, NAMES, field) if isinstance(value, str) else (value,)
    shown = value if isinstance(value, int) else str(value)  # str refuses very long ones
    fits = len(found) == 1 and isinstance(found[0], kind)
    require(fits, field, shown, f"must be such as {accepted}")
    return found[0]


def read_layers(layers: Any, field: str = "model.layers") -> tuple[Any, ...]:
    """Returns layers and segments from such, or from text. Raises InputError for anything else."""
    given = [layers] if isinstance(layers, str) or not isinstance(layers, list | tuple) else layers
    found: list[Any] = []
    for item in given:
        found += text.read(item, NAMES, field) if isinstance(item, str) else [item]
    require(len(found) > 0, field, layers, "must name a layer")
    mixed = len({isinstance(item, Repeat) for item in found}) > 1
    fits = all(isinstance(item, Layer | Repeat) for item in found) and not mixed
    require(fits, field, layers, "must be layers, or all of them Repeat(...)")
    return tuple(found)
