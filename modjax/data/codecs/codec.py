"""Codecs: vocabularies that turn text into tokens, and tokens into bytes.

A codec is `Bytes`, `Pieces` (a SentencePiece model) or `Tokenizer` (a tokenizer.json). Callers need
not know which. This module does not need TensorFlow.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING

from modjax.errors import InputError, require

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

SPACE = "\u2581"  # SentencePiece's mark for a space


class Codec(ABC):
    """Base class of codecs.

    content: bytes of the vocabulary's file; `Bytes` has none.
    vocab_size: number of token ids.
    eos_ids: tokens that end a text. The first ends the documents of a token cache.
    """

    content: bytes
    vocab_size: int
    eos_ids: tuple[int, ...]

    def encode(self, text: str, field: str) -> list[int]:
        """Returns the tokens of plain text. Text that spells a special token stays plain text.

        Raises InputError for `field` if the text is not UTF-8, or if no token covers a part of it.
        """
        check_utf8(text, field)
        ids = self._ids(text)
        known = self._unknown_id() not in ids
        require(known, field, text, "has characters that the vocabulary does not know")
        return ids

    def pieces(self, ids: Iterable[int], *, begins: bool = False) -> list[bytes]:
        """Returns the bytes of each token; those of a special token are b"".

        begins: whether the tokens begin a text. If so, removes the space that some vocabularies
            put before each text.
        """
        found = [self._piece(int(i)) for i in ids]
        if begins and self._adds_space():
            first = next((n for n, piece in enumerate(found) if piece), None)
            if first is not None:
                found[first] = found[first].removeprefix(b" ")
        return found

    def _adds_space(self) -> bool:
        return any(self._piece(i).startswith(b" ") for i in self._ids("a")[:1])

    @abstractmethod
    def _ids(self, text: str) -> list[int]:
        """Returns the tokens of plain text in UTF-8."""

    @abstractmethod
    def _piece(self, i: int) -> bytes:
        """Returns the bytes of a token."""

    def _unknown_id(self) -> int | None:
        """Returns the id of the token for unknown text, or None if there is no such token."""
        return None


def check_utf8(text: str, field: str) -> None:
    """Raises InputError for `field` unless UTF-8 can express the text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
        raise InputError(field, text, f"is not UTF-8 at character {error.start}") from error


class Bytes(Codec):
    """Codec of bytes: byte b has the id b + 3, as in seqio."""

    FIRST = 3
    content = b""
    vocab_size = FIRST + 256
    eos_ids = (1,)

    def _ids(self, text: str) -> list[int]:
        return [byte + self.FIRST for byte in text.encode()]

    def _piece(self, i: int) -> bytes:
        return bytes([i - self.FIRST]) if self.FIRST <= i < self.vocab_size else b""


class Pieces(Codec):
    """Codec of a SentencePiece model.

    where: place of the model, for errors.
    """

    def __init__(self, content: bytes, where: str = "vocabulary.model"):
        self._model = load_model(content, "data", where)
        self.content = content
        self.vocab_size = self._model.vocab_size()
        self.eos_ids = (self._model.eos_id(),)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._model.encode(text)  # type: ignore[assignment]
        return ids

    def _unknown_id(self) -> int | None:
        return self._model.unk_id()

    def _piece(self, i: int) -> bytes:
        if self._model.is_control(i) or self._model.is_unknown(i):
            return b""
        piece = self._model.id_to_piece(i)
        return byte_of(piece) if self._model.is_byte(i) else piece.replace(SPACE, " ").encode()


def byte_of(piece: str) -> bytes:
    """Returns the byte that a token such as "<0x0A>" stands for."""
    return bytes([int(piece[3:-1], 16)])


def load_model(content: bytes, field: str, value: object) -> "SentencePieceProcessor":
    """Loads a SentencePiece model. Raises InputError for `field` if `content` is not one."""
    import sentencepiece

    try:
        if not content:  # SentencePiece takes it for a model without pieces
            raise ValueError("empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=content)  # type: ignore[call-arg]
        model.id_to_piece(list(range(model.vocab_size())))  # fails if a piece is not UTF-8
    except (RuntimeError, ValueError) as error:
        reason = "cannot be read: it is not a SentencePiece model, or damaged"
        raise InputError(field, value, reason) from error
    return model
