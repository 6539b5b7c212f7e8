"""Masks: which keys a query may see, by the positions of both in their sequence.

A mask knows nothing of documents and padding. Attention hides those as well.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from modjax.specs.fields import Positive, Spec
from modjax.specs.layer import spec

Reach = tuple[int | None, int | None]


class Mask(Spec):
    """Base class of masks. A mask defines `seen` and `reach`; `a & b` is their intersection.

    reach: how many positions a query sees back and ahead at most, None for no bound. Keys beyond
      reach are not cached.
    """

    reach: ClassVar[Reach] = None, None

    def seen(self, query: Any, key: Any) -> Any:
        """Returns whether queries may see keys. Both are NumPy or JAX arrays of positions."""
        raise NotImplementedError

    def pairs(self, tokens: int, keys: int) -> int:
        """Returns the number of query-key pairs for FLOPs, hidden keys within reach included."""
        back, ahead = self.reach
        if back is None or ahead is None:
            return tokens * keys
        return tokens * min(keys, back + 1 + ahead)

    def kept(self, length: int) -> int:
        """Returns how many of the latest keys a cache for at most `length` positions keeps."""
        back, _ = self.reach
        return length if back is None else min(length, back + 1)

    def __and__(self, other: "Mask") -> "Mask":
        if isinstance(other, Both):  # left to right, so that equal texts are equal masks
            return self & other.one & other.other
        return Both(self, other) if isinstance(other, Mask) else NotImplemented


@dataclass(frozen=True)
class Both(Mask):
    """Intersection of two masks."""

    one: Mask
    other: Mask

    def seen(self, query: Any, key: Any) -> Any:
        return self.one.seen(query, key) & self.other.seen(query, key)

    @property
    def reach(self) -> Reach:
        back, ahead = (
            min((side for side in sides if side is not None), default=None)
            for sides in zip(self.one.reach, self.other.reach, strict=True)
        )
        return back, ahead

    def pairs(self, tokens: int, keys: int) -> int:
        each = (mask.pairs(tokens, keys) for mask in (self.one, self.other))
        return min(super().pairs(tokens, keys), *each)

    def kept(self, length: int) -> int:
        return min(self.one.kept(length), self.other.kept(length))

    def __str__(self) -> str:
        return f"{self.one} & {self.other}"


@spec
class Causal(Mask):
    """Mask that shows the query's own position and those before it."""

    reach = None, 0

    def seen(self, query: Any, key: Any) -> Any:
        return key <= query


@spec
class Bidirectional(Mask):
    """Mask that shows every position."""

    def seen(self, query: Any, key: Any) -> Any:
        return (key <= query) | (key > query)


@dataclass(frozen=True)
class Sized(Mask):
    """Base class of masks with a size. size: positions, greater than 0."""

    size: Positive[int]

    @property
    def reach(self) -> Reach:
        return self.size - 1, self.size - 1

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.size})"


@spec
class Window(Sized):
    """Mask that shows the query's own position and the `size` - 1 next to it on either side."""

    def seen(self, query: Any, key: Any) -> Any:
        return abs(query - key) < self.size


@spec
class Blocks(Sized):
    """Block-diagonal mask: it shows the query's own block of `size` positions."""

    def seen(self, query: Any, key: Any) -> Any:
        return query // self.size == key // self.size


@spec
class Prefix(Sized):
    """Causal mask that also shows the first `size` positions to all; `Causal() &` would undo it."""

    def seen(self, query: Any, key: Any) -> Any:
        return (key <= query) | (key < self.size)

    @property
    def reach(self) -> Reach:
        return None, self.size - 1
