"""Layers that process every k-th position only: Sequence-AltUp and its controls."""

from dataclasses import dataclass

from modjax.specs.fields import Positive
from modjax.specs.layer import Cost, Costs, Layer, Load, Shape, spec
from modjax.specs.layers.dense import DENSE


@dataclass(frozen=True)
class Anchored(Layer):
    """Base class of layers whose `inner` processes every `stride`-th position, the anchors.

    inner: layer that sees the anchors only, at their own rotary angles.
    stride: distance between anchors in positions, greater than 0.

    A position reads anchors of its own document only, and skips the layer before the first one.
    The first position of a row is an anchor. Within MoD, anchors are counted in each document,
    among its selected positions. The document with segment id 1, which begins the row, starts with
    an anchor. The others have their first anchor at the `stride`-th selected position, so that K
    positions have at most ceil(K / stride) anchors.

    flops, more: FLOPs per element of the stream, flops + more / stride, in addition to `inner`.
    params: number of parameters.
    """

    flops, more, params = 1, 1, 0
    inner: Layer = DENSE
    stride: Positive[int] = 4

    def anchors(self, tokens: int) -> int:
        return -(-tokens // self.stride)

    def cost(self, shape: Shape, load: Load) -> Costs:
        k = self.anchors(load.tokens)
        for cost in self.inner.cost(shape, load._replace(tokens=k, keys=k)):
            yield cost._replace(active=cost.active / self.stride)
        numbers = load.tokens * shape.d_model * shape.streams
        yield Cost("anchors", (self.flops + self.more / self.stride) * numbers, self.params)

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        kept = 2 * shape.d_model * shape.streams
        return kept + self.inner.cache_numbers(shape, self.anchors(length), slack)

    def passes_on(self) -> frozenset[str]:
        return frozenset()  # only anchors have such values


@spec
class SequenceAltUp(Anchored):
    """Sequence-AltUp: predicts each position, and corrects it by its anchor (arXiv 2301.13310).

    With a(i) = stride floor(i / stride): yh_i = a1 x_i + a2 x_a(i), and
    y_i = yh_i + b (inner(x)_a(i) - yh_a(i)). The learned a1, a2, b start at 1, 0, 1.
    """

    flops, more, params = 5, 4, 3


@spec
class StrideSkip(Anchored):
    """Control in which the positions between anchors skip the layer."""


@spec
class StridePool(Anchored):
    """Control whose anchors read the mean of the last `stride` positions.

    The update of an anchor is added at all positions up to the next one.
    """

    flops, more = 3, 0
