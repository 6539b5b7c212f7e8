"""The ends of a model: its embedding, its head, and its expansion to several residual streams."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from modjax.specs.fields import Accepts, Positive, Spec
from modjax.specs.layer import Cost, Costs, Load, Shape, spec


class End(Spec):
    """Base class of the parts before and after a model's layers."""

    def cost(self, shape: Shape, load: Load) -> Costs:
        raise NotImplementedError


class Embedding(End):
    """Base class of `ModelSpec.embed`, which turns tokens into the residual stream."""


class Head(End):
    """Base class of `ModelSpec.head`, which turns features into logits.

    tied: the head reads the embedding's table, which then starts at the scale of a head.
    """

    tied: ClassVar[bool] = False


@dataclass(frozen=True)
class Expansion(End):
    """Base class of `ModelSpec.streams`, which turns one residual stream into several and back."""

    streams: Annotated[int, Accepts("must be 2 to 64", lambda streams: 2 <= streams <= 64)]

    def width(self, d_model: int) -> int:
        """Returns the width of the embedding and of the features."""
        return d_model


@spec
class Tokens(Embedding):
    """A table with a row for each token. scale: rows are multiplied by sqrt(width), as in Gemma."""

    scale: bool = False

    def cost(self, shape: Shape, load: Load) -> Costs:
        numbers = shape.vocab_size * shape.width
        yield Cost("embedding", 2.0 * load.tokens * numbers, numbers, role="embedding")


@spec
class Logits(Head):
    """A matrix of its own. softcap: c of c tanh(z / c) on the logits z; None, no cap."""

    softcap: Positive[float | None] = None

    def cost(self, shape: Shape, load: Load) -> Costs:
        numbers = shape.width * shape.vocab_size
        params = 0 if self.tied else numbers
        yield Cost("logits", 2.0 * load.tokens * numbers, params, role="embedding")


@spec
class Tied(Logits):
    """The embedding's table, transposed (arXiv 1608.05859). softcap: as in Logits."""

    tied: ClassVar[bool] = True


@dataclass(frozen=True)
class FinalNorm(End):
    """The RMSNorm of the features that every head reads."""

    def cost(self, shape: Shape, load: Load) -> Costs:
        yield Cost("norm", params=shape.width)
