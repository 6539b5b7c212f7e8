"""Layers that only every k-th position runs through: Sequence-AltUp and its controls."""

from dataclasses import dataclass

from modjax.specs.fields import Positive
from modjax.specs.layer import Cost, Costs, Layer, Load, Shape, spec
from modjax.specs.layers.dense import DENSE


@dataclass(frozen=True)
class Anchored(Layer):
    """Base class of layers where every `stride`-th position, an anchor, runs through `inner`.

    Anchors keep their rotary angles. A position uses the anchors of its own document only; before
    the first, it passes the layer by.

    A row's first position is an anchor. Within MoD, the selected positions of each document are
    counted apart: the document with segment id 1, which begins the row, starts with an anchor, the
    others have theirs from the `stride`-th on. So K positions have at most ceil(K / stride).

    flops + more / stride: FLOPs beside `inner` for a number of the stream. params: learned numbers.
    """

    flops, more, params = 1, 1, 0
    inner: Layer = DENSE
    stride: Positive[int] = 4

    def anchors(self, tokens: int) -> int:
        return -(-tokens // self.stride)

    def cost(self, shape: Shape, load: Load) -> Costs:
        k = self.anchors(load.tokens)
        for cost in self.inner.cost(shape, Load(k, k)):
            yield cost._replace(active=cost.active / self.stride)
        numbers = load.tokens * shape.d_model * shape.streams
        yield Cost("anchors", (self.flops + self.more / self.stride) * numbers, self.params)

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        kept = 2 * shape.d_model * shape.streams
        return kept + self.inner.cache_numbers(shape, self.anchors(length), slack)

    def hands_on(self) -> frozenset[str]:
        return frozenset()  # of some positions only


@spec
class SequenceAltUp(Anchored):
    """Predicts each position from itself and its anchor, and corrects it by the anchor's update.

    Sequence-AltUp (arXiv 2301.13310). With a(i) = stride floor(i / stride): yh_i = a1 x_i +
    a2 x_a(i), and y_i = yh_i + b (inner(x)_a(i) - yh_a(i)); learned a1, a2, b start at 1, 0, 1.
    """

    flops, more, params = 5, 4, 3


@spec
class StrideSkip(Anchored):
    """A control: positions between anchors pass the layer by."""


@spec
class StridePool(Anchored):
    """A control: reads the mean of the last `stride` positions, and updates all up to the next."""

    flops, more = 3, 0
