"""Layers that only every k-th position runs through: Sequence-AltUp and its controls."""

from collections.abc import Iterator
from dataclasses import dataclass

from modjax.errors import require
from modjax.spec.layer import Cost, Layer, Load, Shape, named
from modjax.spec.layers import DENSE


@dataclass(frozen=True)
class Anchored(Layer):
    """Base: every `stride`-th position, an anchor, runs through `inner`.

    Anchors keep their rotary angles. No position looks at an anchor of another document: those of a
    document before its first anchor pass the layer by.

    Of a row every `stride`-th position is an anchor, from the first on. Of the positions that MoD
    selects around this layer, every `stride`-th of each document: from the first on in the document
    with segment id 1, which begins the row, and from the `stride`-th on in those packed behind it.
    So no row has more than ceil(K / stride) anchors of K positions, whatever is selected.
    """

    inner: Layer = DENSE
    stride: int = 4

    def __post_init__(self):
        super().__post_init__()
        name = f"{type(self).__name__}.stride"
        require(self.stride > 0, name, self.stride, "must be greater than 0")

    def inside(self) -> tuple[Layer, ...]:
        return (self.inner,)

    def anchors(self, tokens: int) -> int:
        return -(-tokens // self.stride)

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        k = self.anchors(load.tokens)
        for cost in self.inner.cost(shape, Load(k, k)):
            yield cost._replace(active=cost.active / self.stride)
        flops, params = self.own()
        numbers = load.tokens * shape.d_model * shape.streams
        yield Cost("anchors", flops * numbers, params)

    def own(self) -> tuple[float, int]:
        """FLOPs beside the inner layer for each number of the stream, and what is learned."""
        return 1 + 1 / self.stride, 0

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        kept = 2 * shape.d_model * shape.streams
        return kept + self.inner.cache_numbers(shape, self.anchors(length), slack)

    def hands_on(self) -> frozenset[str]:
        return frozenset()  # of some positions only


@named
@dataclass(frozen=True)
class SequenceAltUp(Anchored):
    """The others are predicted from themselves and their anchor, and corrected with what the layer
    made of it (Sequence-AltUp, arXiv 2301.13310).

    With a(i) = stride floor(i / stride): yh_i = a1 x_i + a2 x_a(i), and y_i = yh_i +
    b (inner(x)_a(i) - yh_a(i)); three learned numbers, 1, 0 and 1 at first.
    """

    def own(self) -> tuple[float, int]:
        return 5 + 4 / self.stride, 3


@named
@dataclass(frozen=True)
class StrideSkip(Anchored):
    """A control: the others pass the layer by."""


@named
@dataclass(frozen=True)
class StridePool(Anchored):
    """A control: the layer reads the mean of the last `stride` positions, and each position up to
    the next anchor receives what it changed.
    """

    def own(self) -> tuple[float, int]:
        return 3.0, 0
