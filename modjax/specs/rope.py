"""Rotary positions of attention, and scalings of their frequencies for longer contexts."""

import math

from modjax.errors import require
from modjax.specs.fields import Positive, Share, Spec
from modjax.specs.layer import spec


class Scaling(Spec):
    """Base class of scalings. A scaling multiplies the frequencies f_i = base^(-2i/width).

    magnitude: factor of cos and sin, greater than 0.
    """

    magnitude = 1.0

    def multipliers(self, base: float, width: int, length: int) -> tuple[float, ...]:
        """Returns the multiplier of each of the width / 2 frequencies.

        length: positions of the call's longest row, or `max_length` of `Transformer.reader`.
        """
        raise NotImplementedError


@spec
class Rope(Spec):
    """Rotary positions (arXiv 2104.09864, Eq. 34): dim pair i turns by position * base^(-2i/width).

    base: greater than 0.
    share: share of a head's dims that turn, in (0, 1]. The first `width` dims turn.
    scaling: multiplies the frequencies, such as Interpolated(4.0), or None.
    """

    base: Positive[float] = 10_000.0
    share: Share = 1.0
    scaling: Scaling | None = None

    def check(self, width: int) -> None:
        """Raises InputError for a scaling that does not fit `width` dims."""
        if isinstance(self.scaling, Divided):
            fits, accepted = 2 * len(self.scaling.short) == width, f"must be {width // 2} numbers"
            require(fits, "Divided.short", len(self.scaling.short), accepted)

    def width(self, head_dim: int) -> int:
        """Returns the number of dims of a head that turn."""
        return int(head_dim * self.share)


@spec
class Interpolated(Scaling):
    """Scaling that divides all frequencies by a factor greater than 0 (arXiv 2306.15595, Eq. 4)."""

    factor: Positive[float]

    def multipliers(self, base: float, width: int, length: int) -> tuple[float, ...]:
        return (1 / self.factor,) * (width // 2)


@spec
class ByWavelength(Scaling):
    """Scaling that divides low frequencies by a factor and keeps high ones, as in Llama 3.

    A frequency f makes t = context * f / (2 pi) turns within the context. It stays if t > high, and
    is divided if t < low. In between, the two are interpolated linearly in t.

    factor, low, high: greater than 0, and low < high.
    context: positions that the model was first trained on, greater than 0.
    """

    factor: Positive[float]
    low: Positive[float]
    high: Positive[float]
    context: Positive[int]

    def __post_init__(self):
        super().__post_init__()
        accepted = f"must be less than high = {self.high}"
        require(self.low < self.high, "ByWavelength.low", self.low, accepted)

    def multipliers(self, base: float, width: int, length: int) -> tuple[float, ...]:
        turns = _turns(base, width, self.context)
        kept = (min(1.0, max(0.0, (t - self.low) / (self.high - self.low))) for t in turns)
        return tuple(share + (1 - share) / self.factor for share in kept)


@spec
class Yarn(Scaling):
    """Scaling that divides low frequencies and keeps high ones (arXiv 2309.00071, section 3.2).

    In between, the two are interpolated linearly in the index of the frequency.

    factor: greater than 0.
    context: positions that the model was first trained on, greater than 0.
    fast, slow: a frequency stays with `fast` or more turns within the context, and is divided with
      `slow` or fewer; greater than 0.
    magnitude: factor of cos and sin, greater than 0; the paper's is 0.1 ln(factor) + 1.
    whole: whether to round the first index of the interpolation down, and the last up.
    """

    factor: Positive[float]
    context: Positive[int]
    magnitude: Positive[float]
    fast: Positive[float] = 32.0
    slow: Positive[float] = 1.0
    whole: bool = True

    def multipliers(self, base: float, width: int, length: int) -> tuple[float, ...]:
        def index(turns: float) -> float:  # of the frequency that turns so often
            return width * math.log(self.context / (2 * math.pi * turns)) / (2 * math.log(base))

        first, last = index(self.fast), index(self.slow)
        if self.whole:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, width - 1)
        span = max(last - first, 0.001)
        divided = (min(1.0, max(0.0, (i - first) / span)) for i in range(width // 2))
        return tuple(1 - share + share / self.factor for share in divided)


@spec
class Divided(Scaling):
    """Scaling that divides each frequency by its own number (arXiv 2402.13753).

    short, long: one divisor for each frequency, greater than 0. `long` applies if the `length` of
      Scaling.multipliers is more than `context`, and `short` otherwise.
    magnitude: factor of cos and sin, greater than 0.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    context: Positive[int]
    magnitude: Positive[float] = 1.0

    def __post_init__(self):
        super().__post_init__()
        for name in ("short", "long"):
            divisors = getattr(self, name)
            fits = all(type(n) is float and n > 0 for n in divisors)
            require(fits, f"Divided.{name}", divisors, "must be numbers greater than 0")
        fits = len(self.short) == len(self.long)
        require(fits, "Divided.long", len(self.long), f"must be {len(self.short)} numbers")

    def multipliers(self, base: float, width: int, length: int) -> tuple[float, ...]:
        return tuple(1 / n for n in (self.long if length > self.context else self.short))


def _turns(base: float, width: int, context: int) -> list[float]:
    """Returns how often each frequency turns within `context` positions."""
    return [context * base ** (-2 * i / width) / (2 * math.pi) for i in range(width // 2)]
