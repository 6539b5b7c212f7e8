"""The ends of a model: its embedding, its head, and residual streams in place of one.

Their costs read two fields of the shape: `vocab_size`, and `width`, which is the size of a row of
the embedding and of the features that the head reads.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from modjax.errors import require
from modjax.spec.layer import Cost, Load, Shape, Spec, named

MOST_STREAMS = 64


class End(Spec):
    """Base of what stands before and after a model's layers."""

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        raise NotImplementedError


class Embedding(End):
    """Base of `ModelSpec.embed`, which turns tokens into the residual stream."""


class Head(End):
    """Base of `ModelSpec.head`, which turns features into logits.

    tied: the head reads the embedding's table, which then starts at the scale of a head.
    """

    tied: ClassVar[bool] = False


@dataclass(frozen=True)
class Expansion(End):
    """Base of `ModelSpec.streams`, which turns one residual stream into `streams` and back."""

    streams: int

    def __post_init__(self):
        super().__post_init__()
        fits = 2 <= self.streams <= MOST_STREAMS
        name = f"{type(self).__name__}.streams"
        require(fits, name, self.streams, f"must be 2 to {MOST_STREAMS}")

    def width(self, d_model: int) -> int:
        """Returns the size of a row of the embedding and of the features."""
        return d_model


@named
@dataclass(frozen=True)
class Tokens(Embedding):
    """A table with a row for each token. scale: rows are multiplied by sqrt(width), as in Gemma."""

    scale: bool = False

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        numbers = shape.vocab_size * shape.width
        yield Cost("embedding", 2.0 * load.tokens * numbers, numbers, role="embedding")


@named
@dataclass(frozen=True)
class Logits(Head):
    """A matrix of its own. softcap: c of c tanh(z / c) on the logits z; None, no cap."""

    softcap: float | None = None

    def __post_init__(self):
        super().__post_init__()
        fits = self.softcap is None or self.softcap > 0
        name = f"{type(self).__name__}.softcap"
        require(fits, name, self.softcap, "must be greater than 0, or None")

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        numbers = shape.width * shape.vocab_size
        params = 0 if self.tied else numbers
        yield Cost("logits", 2.0 * load.tokens * numbers, params, role="embedding")


@named
@dataclass(frozen=True)
class Tied(Logits):
    """The embedding's table, transposed (arXiv 1608.05859). softcap: as in Logits."""

    tied: ClassVar[bool] = True


@dataclass(frozen=True)
class FinalNorm(End):
    """The RMSNorm of the features that every head reads."""

    def cost(self, shape: Shape, load: Load) -> Iterator[Cost]:
        yield Cost("norm", params=shape.width)
