"""Vocabularies: parsing what is requested, training one, and turning text into tokens and back.

This module does not need TensorFlow.
"""

import contextlib
import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modjax.errors import InputError, require, require_name
from modjax.files import read_file

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

logger = logging.getLogger(__name__)

TRAINING_BYTES = 16 * 2**20  # a vocabulary is trained on about this much text
MOST_PIECES = 1_000_000  # SentencePiece takes a minute to refuse a thousand times as many
MOST_MODEL = 64 * 2**20  # bytes of a model that are read; one of 262,144 pieces has 5 MB
# SentencePiece skips lines of more than 4192 bytes, and lines with U+2585, its mark for unknown.
LINE = 4000  # bytes
LINE_ENDS = re.compile("[\n\u2585]")
# A warning or an error in its log, such as "W0000 00:00:1795975149.258 7506 file.cc:419] text".
WARNING = re.compile(r"[WEF]\d{4} \S+ +\d+ \S+?:\d+\] (.*)")
# These options lose no text: no normalisation, white space kept, rare characters as their bytes.
# Decoding returns the text (except U+2581, SentencePiece's own mark for a space). BPE (Sennrich et
# al. 2016, arXiv 1508.07909) merges by counts alone, so every machine gets the same vocabulary.
TRAINER_OPTIONS: dict[str, Any] = dict(
    model_type="bpe",
    pad_id=0,
    eos_id=1,
    unk_id=2,
    bos_id=-1,
    byte_fallback=True,
    character_coverage=0.9999,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
    user_defined_symbols=["\n"],
    num_threads=1,
    minloglevel=1,
)


@dataclass(frozen=True)
class Vocab:
    """A requested vocabulary.

    name: as in `DataConfig.vocab`.
    size: number of pieces to train, or None.
    model: content of the given SentencePiece model, or None.
    """

    name: str
    size: int | None = None
    model: bytes | None = None


def parse_vocab(vocab: str) -> Vocab:
    """Parses "bytes", "sentencepiece:SIZE" or the path of a SentencePiece model.

    Raises InputError for anything else, and for a model that cannot be used.
    """
    if vocab == "bytes":
        return Vocab("bytes")
    kind, _, size = vocab.partition(":")
    if kind == "sentencepiece":
        is_number = size.isascii() and size.isdecimal() and len(size) < 10
        pieces = int(size) if is_number else 0
        accepted = f"must give a number of pieces up to {MOST_PIECES:,}, as in sentencepiece:8192"
        require(0 < pieces <= MOST_PIECES, "--vocab", vocab, accepted)
        return Vocab(f"sentencepiece:{pieces}", size=pieces)
    accepted = "must be bytes, sentencepiece:SIZE or a SentencePiece FILE.model"
    require(vocab.endswith(".model"), "--vocab", vocab, accepted)
    path = Path(vocab)
    require_name("--vocab", path.name)
    try:
        content = read_file(path, MOST_MODEL)
    except OSError as error:
        raise InputError("--vocab", vocab, f"cannot be read: {error.strerror}") from error
    has_eos = load_model(content, "--vocab", vocab).eos_id() >= 0
    accepted = "has no end-of-sequence piece; train it with one (eos_id >= 0)"
    require(has_eos, "--vocab", vocab, accepted)
    return Vocab(path.name, model=content)


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


@contextlib.contextmanager
def stderr_into(target: int) -> Iterator[None]:
    """Redirects file descriptor 2, which C++ code logs to, into the open descriptor `target`."""
    if sys.stderr is not None:
        sys.stderr.flush()
    original = os.dup(2)
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(original, 2)
        os.close(original)


def train_sentencepiece(texts: Iterable[str], size: int) -> bytes:
    """Trains a SentencePiece model of `size` pieces. Ids 0, 1 and 2 are padding, eos and unknown.

    Raises InputError if this text cannot give that number of pieces.
    """
    import sentencepiece

    lines = list(_lines(texts))  # an error in `texts` must not pass through C++
    model = io.BytesIO()
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            with stderr_into(log.fileno()):
                sentencepiece.set_min_log_level(1)
                sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
                    sentence_iterator=iter(lines),
                    model_writer=model,
                    vocab_size=size,
                    **TRAINER_OPTIONS,
                )
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2] or "too few pieces, or nothing to learn from"
            accepted = f"cannot be trained on this text: {reason}"
            raise InputError("--vocab", f"sentencepiece:{size}", accepted) from error
        finally:
            log.seek(0)
            for warning in dict.fromkeys(WARNING.findall(log.read())):
                logger.warning("modjax: SentencePiece: %s", warning)
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields about TRAINING_BYTES of text in lines that SentencePiece does not skip."""
    left = TRAINING_BYTES
    for text in texts:
        for line in LINE_ENDS.split(text):
            yield from _parts(line.encode())
        left -= len(text.encode())
        if left <= 0:
            return


def _parts(line: bytes) -> Iterator[str]:
    """Cuts UTF-8 into parts of at most LINE bytes, between characters."""
    start = 0
    while start < len(line):
        stop = start + LINE
        while stop < len(line) and line[stop] & 0xC0 == 0x80:  # within a character
            stop -= 1
        yield line[start:stop].decode()
        start = stop


class Codec:
    """Encoder and decoder with the vocabulary of a prepared corpus.

    model: content of a SentencePiece model, or None for bytes, which seqio numbers from 3.
    where: place of the model, for the message if it is damaged.
    """

    BYTES_FROM = 3

    def __init__(self, model: bytes | None, where: str = "vocabulary.model"):
        self._model = None if model is None else load_model(model, "data", where)

    def encode(self, text: str, field: str) -> list[int]:
        """Returns token ids. Raises InputError for `field` if a part of the text has no token."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:  # bytes of the command line that are not UTF-8
            raise InputError(field, text, f"is not UTF-8 at character {error.start}") from error
        if self._model is None:
            return [byte + self.BYTES_FROM for byte in data]
        ids: list[int] = self._model.encode(text)  # type: ignore[assignment]
        unknown = self._model.unk_id()
        require(unknown not in ids, field, text, "has characters that the vocabulary does not know")
        return ids

    def pieces(self, ids: Iterable[int]) -> list[bytes]:
        """Returns the bytes of each token; special tokens have none."""
        if self._model is None:
            return [bytes([i - self.BYTES_FROM]) if 3 <= i < 259 else b"" for i in ids]
        return [self._piece(int(i)) for i in ids]

    def _piece(self, i: int) -> bytes:
        assert self._model is not None
        if self._model.is_control(i) or self._model.is_unknown(i):
            return b""
        piece = self._model.id_to_piece(i)
        if self._model.is_byte(i):  # "<0x0A>"
            return bytes([int(piece[3:-1], 16)])
        return piece.replace("\u2581", " ").encode()
