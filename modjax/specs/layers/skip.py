"""Skip: a sublayer or block that a position, or a whole sequence, may skip (arXiv 2410.13184)."""

from typing import Annotated

from modjax.errors import require
from modjax.specs.fields import NotNegative, Positive, Share, Spec, one_of, parts
from modjax.specs.layer import Costs, Layer, Load, Router, Shape, spec
from modjax.specs.layers.attention import Attention
from modjax.specs.layers.dense import Seq
from modjax.specs.layers.mod import cache_slots, selected_tokens
from modjax.specs.layers.sequence import Anchored


@spec
class Zero(Router):
    """Router with a linear score that starts at 0: r = w . h, as MindSkip has it."""


@spec
class Centred(Router):
    """Router r = w . (h - mu) + b, with the running mean mu of its inputs; w and b start at 0.

    The normalised inputs of a pretrained layer share a direction. With `Zero`, one step along it
    makes a layer run at every position, or at none.
    """

    def cost(self, shape: Shape, load: Load, outputs: int = 1) -> Costs:
        for cost in super().cost(shape, load, outputs):
            yield cost._replace(params=cost.params + outputs)


class SkipRule(Spec):
    """Base class of the rules of Skip. Each runs the layer where a score reaches its threshold."""


@spec
class MindSkip(SkipRule):
    """The published rule: the layer runs where sigmoid(r) >= 1/2 (arXiv 2410.13184).

    penalty: weight of the layer's loss, 0 or more.
    excess: whether the loss is max(0, share - capacity), where share is the share of positions at
      which the layer runs; otherwise it is the share.
    """

    penalty: NotNegative[float] = 1.0
    excess: bool = True


@spec
class Quantile(SkipRule):
    """Rule with one threshold for all layers of a model that have it.

    The threshold follows the quantile of all their scores that leaves their mean capacity. So the
    capacity is met over all these layers, and moves between them. Causal routings keep it fixed.
    Layers within MoD, and other layers that select positions, share a threshold of their own.

    rate: share of the distance to the batch's quantile that an update moves the threshold.
    """

    rate: Share = 0.3


class Pool(Spec):
    """Base class of rules that pool the scores of a sequence without looking ahead."""


@spec
class Prompt(Pool):
    """Decides on the mean score of the prompt, for the whole sequence.

    The prompt is what is read first, before tokens are drawn, or what `prompt_BL` marks. Without
    either, training takes the whole row, which looks ahead, and causal routings the first position.
    """


@spec
class RunningMean(Pool):
    """Decides at each position on the mean score of all positions up to it."""


@spec
class First(Pool):
    """Decides on the mean score of the first `size` positions, which always run; greater than 0."""

    size: Positive[int]


@spec
class Skip(Layer):
    """Layer that runs `inner` where a router asks for it, and otherwise leaves the stream as it is.

    Training computes `inner` everywhere and masks it, so that each score gets the straight-through
    gradient of its decision. Causal routings make the same decisions and compute what they need:
    "threshold". Under "all", `inner` runs at every position, as without Skip.

    inner: an attention, an MLP, a block, or any other layer.
    capacity: target for the share of positions that run, in (0, 1].
    unit: "token" decides for each position, "sequence" on the pooled scores of a sequence.
    keys: "all" lets attention see the keys of all positions, "routed" those that run. With "all",
      an attention must come first in `inner`, and be the only one.
    router: scores the normalised input of `inner`'s first sublayer.
    rule: turns scores into decisions.
    causal: pools the scores of a sequence, for the unit "sequence" only.
    """

    inner: Layer = Attention()
    capacity: Share = 0.5
    unit: Annotated[str, one_of("token", "sequence")] = "token"
    keys: Annotated[str, one_of("all", "routed")] = "all"
    router: Router = Centred()
    rule: SkipRule = Quantile()
    causal: Pool = Prompt()

    def check(self, shape: Shape) -> None:
        super().check(shape)
        inner, first = self.inner, self.first
        others = [inner, *parts(inner, deep=True)]
        attentions = [part for part in others if isinstance(part, Attention)]
        alone = not attentions or (attentions == [first] and not attentions[0].received)
        accepted = f"must be routed: {inner} has an attention that is not alone and first"
        require(self.keys == "routed" or alone, "Skip.keys", self.keys, accepted)
        # Training masks positions and decoding leaves them out, so no layer inside may count them.
        counts = any(isinstance(part, Anchored) for part in others)
        accepted = "must have no layer that takes every k-th position: put Skip inside it instead"
        require(not counts, "Skip.inner", str(inner), accepted)
        ahead = self.router.looks_ahead("causal")
        accepted = "must be a router that never looks ahead"
        require(not ahead, "Skip.router", str(self.router), accepted)

    @property
    def first(self) -> Layer:
        """The first sublayer of `inner`."""
        return self.inner.parts[0] if isinstance(self.inner, Seq) else self.inner

    @property
    def sees_all(self) -> bool:
        """True if an attention in `inner` sees the keys of all positions."""
        return self.keys == "all" and isinstance(self.first, Attention)

    @property
    def pool(self) -> Pool | None:
        """The rule that pools scores; None for tokens."""
        return self.causal if self.unit == "sequence" else None

    def cost(self, shape: Shape, load: Load) -> Costs:
        k = selected_tokens(self.capacity, load.tokens)
        whole = load.trains or (self.unit == "sequence" and self.keys == "routed")
        share = self.capacity if whole and not load.trains else 1.0
        keys = load.keys if self.keys == "all" else k
        inside = load if whole else load._replace(tokens=k, keys=keys)
        for cost in self.inner.cost(shape, inside):
            active = cost.active * self.capacity
            yield cost._replace(forward=share * cost.forward, active=active)
        yield from self.router.cost(shape._replace(streams=1), load)

    def looks_ahead(self, routing: str) -> bool:
        pools_ahead = routing == "trained" and isinstance(self.pool, Prompt)
        return pools_ahead or super().looks_ahead(routing)

    def causal_rules(self) -> tuple[str, ...]:
        return ("threshold", "all")

    def routed(self) -> int:
        return 1 + super().routed()

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        slots = self.slots(length, slack)
        found = self.inner.cache_numbers(shape, slots, slack)
        if self.sees_all:
            first = self.first.cache_numbers
            found += first(shape, length, slack) - first(shape, slots, slack)
        return found + self.router.cache_numbers(shape._replace(streams=1), length, slack)

    def slots(self, length: int, slack: float | None) -> int:
        """Returns the cache slots for `length` positions: all, if a sequence may take them all."""
        return length if self.pool else cache_slots(self.capacity, length, slack)

    def passes_on(self) -> frozenset[str]:
        return frozenset()  # a skipped position has no such values
