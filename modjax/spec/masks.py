"""Masks: which keys a query may see, given the positions of both in their sequence.

A mask knows nothing of documents and padding: whoever uses it hides those as well.
"""

from dataclasses import dataclass
from typing import Any

from modjax.errors import require_positive
from modjax.spec.layer import Spec, named

Reach = tuple[int | None, int | None]


class Mask(Spec):
    """Base of every mask. `seen` and `reach` define one; the rest follows from them.

    `a & b` shows what both show.
    """

    def seen(self, query: Any, key: Any) -> Any:
        """Returns whether each query may see each key, given arrays of positions that broadcast.

        Uses operators only, so that it works on arrays of NumPy and of JAX.
        """
        raise NotImplementedError

    @property
    def reach(self) -> Reach:
        """How many positions a query may see back and ahead at most; None where nothing bounds it.

        Keys beyond it are neither computed nor cached.
        """
        return None, None

    @property
    def causal(self) -> bool:
        """Whether no query sees a later key."""
        return self.reach[1] == 0

    def pairs(self, tokens: int, keys: int) -> int:
        """Returns the pairs that `tokens` queries and `keys` keys count as in FLOPs.

        Every query counts alike, so a causal mask counts the keys that it hides.
        """
        back, ahead = self.reach
        if back is None or ahead is None:
            return tokens * keys
        return tokens * min(keys, back + 1 + ahead)

    def kept(self, length: int) -> int:
        """Returns how many keys a cache of at most `length` positions must keep: the last ones."""
        back, _ = self.reach
        return length if back is None else min(length, back + 1)

    def __and__(self, other: "Mask") -> "Mask":
        if isinstance(other, Both):  # so that equal texts are equal masks
            return self & other.one & other.other
        return Both(self, other) if isinstance(other, Mask) else NotImplemented


@dataclass(frozen=True)
class Both(Mask):
    """The pairs that two masks show."""

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


@named
@dataclass(frozen=True)
class Causal(Mask):
    """Shows the query's own position and those before it."""

    def seen(self, query: Any, key: Any) -> Any:
        return key <= query

    @property
    def reach(self) -> Reach:
        return None, 0


CAUSAL = Causal()


@named
@dataclass(frozen=True)
class Bidirectional(Mask):
    """Shows every position."""

    def seen(self, query: Any, key: Any) -> Any:
        return (key <= query) | (key > query)


@dataclass(frozen=True)
class Sized(Mask):
    """Base of masks that a number of positions defines."""

    size: int

    def __post_init__(self):
        super().__post_init__()
        require_positive(self, type(self).__name__, "size")

    @property
    def reach(self) -> Reach:
        return self.size - 1, self.size - 1

    def __str__(self) -> str:
        return f"{type(self).__name__}({self.size})"


@named
@dataclass(frozen=True)
class Window(Sized):
    """Shows the query's own position and the `size` - 1 next to it on either side."""

    def seen(self, query: Any, key: Any) -> Any:
        return abs(query - key) < self.size


@named
@dataclass(frozen=True)
class Blocks(Sized):
    """Shows the query's own block of `size` positions: a block-diagonal mask."""

    def seen(self, query: Any, key: Any) -> Any:
        return query // self.size == key // self.size


@named
@dataclass(frozen=True)
class Prefix(Sized):
    """Shows the first `size` positions to all, and later ones as Causal() does.

    `Causal() & Prefix(8)` is no prefix any more: it shows what Causal() shows.
    """

    def seen(self, query: Any, key: Any) -> Any:
        return (key <= query) | (key < self.size)

    @property
    def reach(self) -> Reach:
        return None, self.size - 1
