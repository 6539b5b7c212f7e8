"""Layers on S residual streams in place of one, and expansions of the embedding to S streams."""

from dataclasses import dataclass

from modjax.errors import require
from modjax.specs.layer import Cost, Costs, Layer, Load, Shape, spec
from modjax.specs.layers.dense import DENSE
from modjax.specs.layers.ends import Expansion

SINKHORN_ROUNDS = 20


@spec
class Recycled(Expansion):
    """Recycled-AltUp: copies of the embedding, and the mean of all streams (arXiv 2301.13310).

    The paper takes their sum; the final norm removes the factor.
    """

    def cost(self, shape: Shape, load: Load) -> Costs:
        yield Cost("streams", load.tokens * self.streams * shape.d_model)


@spec
class Full(Expansion):
    """AltUp: an embedding and a head that are `streams` times as wide (arXiv 2301.13310)."""

    def width(self, d_model: int) -> int:
        return self.streams * d_model

    def cost(self, shape: Shape, load: Load) -> Costs:
        yield Cost("streams")


@spec
class Projected(Expansion):
    """Gemma 3n's expansion: the embedding and learned projections of it.

    Other projections lead back to one width, and the head reads their mean. Each projection is
    scaled to the size of the first stream.
    """

    def cost(self, shape: Shape, load: Load) -> Costs:
        numbers = 2 * (self.streams - 1) * shape.d_model**2
        yield Cost("streams", 2.0 * load.tokens * numbers, numbers)


@dataclass(frozen=True)
class Streams(Layer):
    """Base class of layers on S residual streams, around a layer on one stream.

    inner: layer on one stream of the model's width.
    active: index of the stream that the layer computes, 0 to S - 1.

    With u = sum_j read_j x_j and y = inner(u), stream i becomes
    sum_j mix_ij x_j + write_i (y - sum_j base_j x_j). On streams that are copies, an untrained
    layer equals the inner layer.

    Raises InputError for a model without streams.
    """

    inner: Layer = DENSE
    active: int = 0

    def check(self, shape: Shape) -> None:
        accepted = "needs model.streams, such as Recycled(2), around the model's layers"
        require(shape.streams > 1, "model.layers", str(self), accepted)
        name, fits = f"{type(self).__name__}.active", 0 <= self.active < shape.streams
        require(fits, name, self.active, f"must be 0 to {shape.streams - 1}")
        self.inner.check(shape._replace(streams=1))

    def cost(self, shape: Shape, load: Load) -> Costs:
        yield from self.inner.cost(shape._replace(streams=1), load)
        s, d = shape.streams, shape.d_model
        flops, params = self.weights(s, d)
        flops += 2.0 * s * d * (s + 1)  # of mix and write
        yield Cost("streams", load.tokens * flops, params)

    def weights(self, s: int, d: int) -> tuple[float, int]:
        """Returns the FLOPs per position of the coefficients and of u, and the parameter count."""
        raise NotImplementedError

    def cache_numbers(self, shape: Shape, length: int, slack: float | None) -> int:
        return self.inner.cache_numbers(shape._replace(streams=1), length, slack)


@spec
class AltUp(Streams):
    """Alternating Updates: predicts all streams, computes one, corrects all (arXiv 2301.13310).

    With learned p (S, S) and g (S), and j = active: read = e_j, mix = p, base = p_j, write = g.
    Let `active` alternate from layer to layer; one `active` for all layers is the paper's "same".
    Around MoD, skipped positions are predicted too, and change unless p = I. Within MoD, they keep
    all streams.
    learned: False keeps p = I and g = 1, so that every stream gets the sum of the updates.
    """

    learned: bool = True

    def weights(self, s: int, d: int) -> tuple[float, int]:
        return 0.0, s * s + s if self.learned else 0


@spec
class SimplifiedAltUp(Streams):
    """AltUp that reads a learned sum of all streams, and writes S times its update to one.

    With a learned r (S), 1 / S at first: read = base = r, mix = I, write = S e_active.
    """

    def weights(self, s: int, d: int) -> tuple[float, int]:
        return 2.0 * s * d, s


@spec
class HyperConnection(Streams):
    """Hyper-connections (arXiv 2409.19606), meant around one sublayer.

    With learned A_m (S), A_r (S, S) and B (S): read = base = A_m, mix = A_r transposed, write = B.
    A_m starts as e_active.
    dynamic: whether each position adds s tanh(norm(x_j) W) to these weights; W starts at 0.
    """

    dynamic: bool = False

    def weights(self, s: int, d: int) -> tuple[float, int]:
        flops, params = 2.0 * s * d, s * s + 2 * s
        if not self.dynamic:
            return flops, params
        return flops + s * (4.0 * d + 2 * d * (s + 2)), params + d * (s + 2) + d + 2


@spec
class ManifoldHyperConnection(Streams):
    """Hyper-connections with positive weights and a doubly stochastic mix (mHC, arXiv 2512.24880).

    norm(all x) W has three parts v, each with its own a and b: read = base = sigmoid(a v + b),
    write = 2 sigmoid(a v + b), and mix = exp(a v + b), made doubly stochastic and transposed.
    W starts at 0, mix at 0.9 of each stream in itself, read at 0.9 of the active stream.
    """

    def weights(self, s: int, d: int) -> tuple[float, int]:
        made = s * (s + 2)
        return (2.0 * made + 6) * s * d + 4.0 * SINKHORN_ROUNDS * s * s, (s * d + 1) * made + 3


@spec
class Gemma3nAltUp(Streams):
    """Gemma 3n's AltUp, whose coefficients depend on the position; it reads the predicted stream.

    With m(x) = tanh(W (norm(x) / d)) and j = active: mix = I + sum_m m(x_j)_m P_m,
    read = base = mix_j, write = 1 + m(y) C. P (S, S, S) and C (S, S) start at 0.
    """

    def weights(self, s: int, d: int) -> tuple[float, int]:
        flops = 2.0 * s * d + 2 * (2.0 * d * s + 4 * d) + 2.0 * s**3 + 2.0 * s * s
        return flops, d * s + d + s**3 + s * s
