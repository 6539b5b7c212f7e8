"""Reads, trains and applies vocabularies. No TensorFlow here."""

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
from typing import TYPE_CHECKING

from modjax.errors import InputError, require, require_name
from modjax.files import read_file

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

logger = logging.getLogger(__name__)

TRAINING_BYTES = 16 * 2**20  # a vocabulary is trained on about this much text
MOST_PIECES = 1_000_000  # SentencePiece takes a minute to refuse a thousand times as many
MOST_MODEL = 64 * 2**20  # bytes of a model that are read; that of 262,144 pieces has 5 MB
# SentencePiece skips a line of more than 4192 bytes, and one that has its mark for the unknown.
LINE = 4000  # bytes
LINE_ENDS = re.compile("[\n\u2585]")
# A line of its log that is a warning or an error: W0000 00:00:1795975149.258 7506 file.cc:419] text
WARNING = re.compile(r"[WEF]\d{4} \S+ +\d+ \S+?:\d+\] (.*)")


@dataclass(frozen=True)
class Vocab:
    """A vocabulary that is asked for.

    name: as in `DataConfig.vocab`.
    size: the number of pieces to train, or None.
    model: the content of the given SentencePiece model, or None.
    """

    name: str
    size: int | None = None
    model: bytes | None = None


def parse_vocab(vocab: str) -> Vocab:
    """Reads "bytes", "sentencepiece:SIZE" or the path of a SentencePiece model.

    Raises InputError for anything else, and for a model that cannot be used.
    """
    if vocab == "bytes":
        return Vocab("bytes")
    kind, _, size = vocab.partition(":")
    if kind == "sentencepiece":
        digits = size.isascii() and size.isdecimal() and len(size) < 10
        require(
            digits and 0 < int(size) <= MOST_PIECES,
            "--vocab",
            vocab,
            f"must give a number of pieces up to {MOST_PIECES:,}, as in sentencepiece:8192",
        )
        return Vocab(f"sentencepiece:{int(size)}", size=int(size))
    require(
        vocab.endswith(".model"),
        "--vocab",
        vocab,
        "must be bytes, sentencepiece:SIZE or a SentencePiece FILE.model",
    )
    path = Path(vocab)
    require_name("--vocab", path.name)
    try:
        content = read_file(path, MOST_MODEL)
    except OSError as error:
        raise InputError("--vocab", vocab, f"cannot be read: {error.strerror}") from error
    require(
        load_model(content, "--vocab", vocab).eos_id() >= 0,
        "--vocab",
        vocab,
        "has no end-of-sequence piece; train it with one (eos_id >= 0)",
    )
    return Vocab(path.name, model=content)


def load_model(content: bytes, field: str, value: object) -> "SentencePieceProcessor":
    """Loads a SentencePiece model. Raises InputError for `field` where `content` is none."""
    import sentencepiece

    try:
        if not content:  # SentencePiece takes it for a model without pieces
            raise ValueError("empty")
        model = sentencepiece.SentencePieceProcessor(model_proto=content)  # type: ignore[call-arg]
        model.id_to_piece(list(range(model.vocab_size())))  # a piece may be no UTF-8
    except (RuntimeError, ValueError) as error:
        reason = "cannot be read: it is not a SentencePiece model, or damaged"
        raise InputError(field, value, reason) from error
    return model


@contextlib.contextmanager
def stderr_into(target: int) -> Iterator[None]:
    """Sends what C++ writes to stderr into the open file descriptor `target`."""
    if sys.stderr is not None:
        sys.stderr.flush()
    kept = os.dup(2)
    os.dup2(target, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def train_sentencepiece(texts: Iterable[str], size: int) -> bytes:
    """Trains a byte-pair SentencePiece model that loses no text.

    No normalisation, white space kept, rare characters as their bytes: decoding gives the text
    back (but for U+2581, SentencePiece's own mark for a space). Ids 0, 1 and 2 are padding, end
    of sequence and unknown. BPE (Sennrich et al. 2016, arXiv 1508.07909) because it merges by
    counts alone and so comes out the same on every machine. Raises InputError where this text
    cannot give so few or so many pieces.
    """
    import sentencepiece

    lines = list(_lines(texts))  # an error in `texts` must not pass through C++
    model = io.BytesIO()
    # SentencePiece logs to file descriptor 2, whatever Python's sys.stderr is.
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            with stderr_into(log.fileno()):
                sentencepiece.set_min_log_level(1)
                sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
                    sentence_iterator=iter(lines),
                    model_writer=model,
                    model_type="bpe",
                    vocab_size=size,
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
        except RuntimeError as error:
            reason = str(error).rpartition("] ")[2] or "too few pieces, or nothing to learn from"
            raise InputError(
                "--vocab", f"sentencepiece:{size}", f"cannot be trained on this text: {reason}"
            ) from error
        finally:
            log.seek(0)
            for warning in dict.fromkeys(WARNING.findall(log.read())):
                logger.warning("modjax: SentencePiece: %s", warning)
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Yields lines that SentencePiece does not skip, of about TRAINING_BYTES in all."""
    left = TRAINING_BYTES
    for text in texts:
        for line in LINE_ENDS.split(text):
            yield from _parts(line.encode())
        left -= len(text.encode())
        if left <= 0:
            return


def _parts(line: bytes) -> Iterator[str]:
    """Cuts UTF-8 into parts of at most LINE bytes, each at the beginning of a character."""
    start = 0
    while start < len(line):
        stop = start + LINE
        while stop < len(line) and line[stop] & 0xC0 == 0x80:  # within a character
            stop -= 1
        yield line[start:stop].decode()
        start = stop


class Codec:
    """Text to token ids and back, with the vocabulary of a prepared corpus.

    model: the content of a SentencePiece model, or None for bytes, which seqio numbers from 3 on.
    where: the place of the model, for the message where it is damaged.
    """

    BYTES_FROM = 3

    def __init__(self, model: bytes | None, where: str = "vocabulary.model"):
        self._model = None if model is None else load_model(model, "data", where)

    def encode(self, text: str, field: str) -> list[int]:
        """Returns token ids. Raises InputError where the vocabulary has no token for a part."""
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
