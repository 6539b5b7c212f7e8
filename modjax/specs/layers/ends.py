"""Ends of a model: its embedding, its head, and its expansion to several residual streams."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from modjax.specs.fields import Accepts, Positive, Spec
from modjax.specs.layer import Cost, Costs, Load, Shape, spec


class End(Spec):
    """Base class of the parts before and after the layers of a model."""

    def cost(self, shape: Shape, load: Load) -> Costs:
        raise NotImplementedError


class Embedding(End):
    """Base class of embeddings, `ModelSpec.embed`: from tokens to the residual stream."""


class Head(End):
    """Base class of heads, `ModelSpec.head`: from features to logits.

    tied: whether the head reads the table of the embedding, which then starts at a head's scale.
    """

    tied: ClassVar[bool] = False


@dataclass(frozen=True)
class Expansion(End):
    """Base class of expansions, `ModelSpec.streams`: from one residual stream to several and back.

    streams: the number of residual streams, 2 to 64.
    """

    streams: Annotated[int, Accepts("must be 2 to 64", lambda streams: 2 <= streams <= 64)]

    def width(self, d_model: int) -> int:
        """Returns the width of the embedding and of the features."""
        return d_model


@spec
class Tokens(Embedding):
    """Embedding table with a row for each token.

    scale: whether to multiply rows by sqrt(width).
    """

    scale: bool = False

    def cost(self, shape: Shape, load: Load) -> Costs:
        numbers = shape.vocab_size * shape.width
        yield Cost("embedding", 2.0 * load.tokens * numbers, numbers, role="embedding")


@spec
class Logits(Head):
    """Head with a weight matrix of its own.

    softcap: c of c tanh(z / c) on the logits z, or None.
    """

    softcap: Positive[float | None] = None

    def cost(self, shape: Shape, load: Load) -> Costs:
        numbers = shape.width * shape.vocab_size
        params = 0 if self.tied else numbers
        yield Cost("logits", 2.0 * load.tokens * numbers, params, role="embedding")


@spec
class Tied(Logits):
    """Head that reads the transposed table of the embedding (arXiv 1608.05859).

    softcap: as for Logits.
    """

    tied: ClassVar[bool] = True


@dataclass(frozen=True)
class FinalNorm(End):
    """RMSNorm between the layers and the head."""

    def cost(self, shape: Shape, load: Load) -> Costs:
        yield Cost("norm", params=shape.width)
