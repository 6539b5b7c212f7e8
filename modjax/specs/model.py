"""Spec of a decoder: its shape, layers, embedding and head."""

from dataclasses import dataclass
from typing import Annotated, Any

from modjax.errors import require
from modjax.specs import text
from modjax.specs.fields import Positive, check, one_of, parts
from modjax.specs.layer import NAMES, Layer, Repeat, Shape
from modjax.specs.layers.ends import Embedding, End, Expansion, FinalNorm, Head

# The fields with an end: its type, and the accepted values in errors.
ENDS = {
    "embed": (Embedding, "Tokens()"),
    "head": (Head, "Logits() or Tied()"),
    "streams": (Expansion | None, "Recycled(2), or None"),
}


@dataclass(frozen=True)
class ModelSpec:
    """Decoder with a shape, layers and ends. Layers and ends may be given as text.

    vocab_size, d_model, num_layers, num_heads, num_kv_heads, d_ff: sizes, greater than 0.
    layers: a pattern that repeats over the depth, such as (Dense(), MoD(Dense())), or segments
      `Repeat(..., times=...)`, of which one may leave `times` open.
    head_dim: greater than 0; None takes d_model / num_heads.
    norm_eps: added to the mean square in every RMSNorm, greater than 0.
    norm_offset: added to the scale of every RMSNorm: x / rms(x) * (norm_offset + scale).
    dtype: "float32" or "bfloat16", in which layers compute.
    imports: files and modules from outside modjax that register layers. A spec does not import
      them. A caller that trusts them does, before the text of `layers` is read.
    streams: an expansion, such as Recycled(2), or None for one residual stream.
    embed: an embedding, such as Tokens().
    head: a head, such as Logits() or Tied().

    Raises InputError for an invalid field, or an invalid combination of fields.
    """

    vocab_size: Positive[int]
    d_model: Positive[int]
    num_layers: Positive[int]
    num_heads: Positive[int]
    num_kv_heads: Positive[int]
    d_ff: Positive[int]
    layers: Any = "Dense()"
    head_dim: Positive[int | None] = None
    norm_eps: Positive[float] = 1e-6
    dtype: Annotated[str, one_of("float32", "bfloat16")] = "float32"
    imports: tuple[str, ...] = ()
    streams: Any = None
    embed: Any = "Tokens()"
    head: Any = "Logits()"
    norm_offset: float = 0.0

    def __post_init__(self):
        check(self, "model")
        fits = self.head_dim is not None or self.d_model % self.num_heads == 0
        accepted = f"must be a multiple of model.num_heads = {self.num_heads}"
        require(fits, "model.d_model", self.d_model, accepted)
        object.__setattr__(self, "layers", read_layers(self.layers))
        for name in ENDS:
            object.__setattr__(self, name, read_end(name, getattr(self, name)))
        for segment in self.segments:  # raises for a depth that does not fit
            passed: frozenset[str] = frozenset()
            for layer in segment.parts:
                layer.check(self.shape)
                missing = ", ".join(sorted(layer.needs() - passed))
                accepted = f"needs an earlier layer of its segment that passes on {missing}"
                require(not missing, "model.layers", str(layer), accepted)
                passed |= layer.passes_on()

    @property
    def shape(self) -> Shape:
        streams, d_model = self.streams, self.d_model
        heads = self.num_heads, self.num_kv_heads, self.head_dim or d_model // self.num_heads
        width = streams.width(d_model) if streams else d_model
        ends = streams.streams if streams else 1, self.vocab_size, width, self.head.tied
        sizes = d_model, self.num_layers, *heads, self.d_ff
        return Shape(*sizes, self.norm_eps, *ends, self.norm_offset)

    @property
    def ends(self) -> tuple[tuple[End, ...], tuple[End, ...]]:
        """The parts before and after the layers, in order."""
        before = (self.embed,) if self.streams is None else (self.embed, self.streams)
        return before, (FinalNorm(), self.head)

    @property
    def segments(self) -> tuple[Repeat, ...]:
        """The layers as segments, each with its number of repetitions."""
        depth, given = self.num_layers, self.layers
        segments = given if isinstance(given[0], Repeat) else (Repeat(*given),)
        fixed = sum(len(s.parts) * s.times for s in segments if s.times)
        still_open = [len(s.parts) for s in segments if s.times is None]
        accepted = "must leave `times` open in one segment at most"
        require(len(still_open) <= 1, "model.layers", ", ".join(map(str, given)), accepted)
        if not still_open:
            accepted = f"must be {fixed}, the sum of its segments"
            require(depth == fixed, "model.num_layers", depth, accepted)
            return segments
        length, left = still_open[0], depth - fixed
        accepted = f"must be a multiple of the pattern's length, {length}"
        if fixed:
            accepted = f"must be {fixed} and a multiple of {length}, the open segment's length"
        require(left > 0 and left % length == 0, "model.num_layers", depth, accepted)
        return tuple(s if s.times else Repeat(*s.parts, times=left // length) for s in segments)

    def repeated(self) -> list[tuple[Layer, int]]:
        """Returns every layer of the patterns with its number of repetitions."""
        return [(part, s.times) for s in self.segments for part in s.parts if s.times]

    def blocks(self) -> list[Layer]:
        """Returns every layer, in order."""
        return [part for s in self.segments for _ in range(s.times or 0) for part in s.parts]

    def routed(self) -> int:
        """Returns the largest number of routed layers that can process one token."""
        return sum(times * layer.routed() for layer, times in self.repeated())

    def looks_ahead(self, routing: str) -> bool:
        """Returns whether any layer looks ahead. routing: "trained" or "causal"."""
        return any(layer.looks_ahead(routing) for layer, _ in self.repeated())

    def rules(self, routing: str | None = None) -> frozenset[str]:
        """Returns the names of the causal rules that `routing` uses, or of all for None."""
        each = [part.causal_rules() for part in parts(self, deep=True) if isinstance(part, Layer)]
        if routing == "causal":
            return frozenset(names[0] for names in each if names)
        known = frozenset(name for names in each for name in names)
        return known if routing is None else known & {routing}

    @property
    def routings(self) -> tuple[str, ...]:
        """The routings that a call may request."""
        if self.looks_ahead("causal"):
            return ("trained",)
        return ("trained", "causal", *sorted(self.rules()))

    def check_routing(self, routing: str, field: str) -> None:
        """Raises InputError for a routing that this model does not support."""
        for layer, _ in self.repeated():
            fits = routing == "trained" or not layer.looks_ahead("causal")
            accepted = f"{layer} has no rule that never looks ahead: MoD has causal=Predictor(), "
            accepted += "experts have TokenChoice() and ExpertThreshold()"
            require(fits, field, routing, accepted)
        accepted = f"must be one of {', '.join(self.routings)}"
        require(routing in self.routings, field, routing, accepted)

    def causal_routing(self) -> str | None:
        """Returns the routing for the causal loss, or None if the model has none.

        This is "causal", or "trained" for a model that selects nothing.
        """
        if self.looks_ahead("causal"):
            return None
        return "causal" if self.rules("causal") or self.looks_ahead("trained") else "trained"


def read_end(name: str, value: Any) -> End | None:
    """Returns the end for a field of ENDS, from text or from a spec."""
    (kind, accepted), found = ENDS[name], _read(value, f"model.{name}")
    shown = value if isinstance(value, int) else str(value)  # str refuses very long ones
    fits = len(found) == 1 and isinstance(found[0], kind)
    require(fits, f"model.{name}", shown, f"must be such as {accepted}")
    return found[0]


def read_layers(layers: Any, field: str = "model.layers") -> tuple[Any, ...]:
    """Returns layers or segments, from text or from specs. Raises InputError for others."""
    given = layers if isinstance(layers, list | tuple) else [layers]
    found = tuple(spec for item in given for spec in _read(item, field))
    require(len(found) > 0, field, layers, "must name a layer")
    fits = any(all(isinstance(spec, kind) for spec in found) for kind in (Layer, Repeat))
    require(fits, field, layers, "must be layers, or all of them Repeat(...)")
    return found


def _read(value: Any, field: str) -> tuple[Any, ...]:
    return text.read(value, NAMES, field) if isinstance(value, str) else (value,)
