"""Vocabularies: parsing requests, training SentencePiece, and opening that of a token cache.

This module does not need TensorFlow.
"""

import contextlib
import importlib.util
import io
import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.data.codecs.codec import Bytes, Codec, Pieces, load_model
from modjax.data.codecs.files import open_tokenizer, tokenizer_name
from modjax.data.codecs.tokenizer import MOST_CONTENT, Settings, Tokenizer
from modjax.errors import InputError, require, require_name
from modjax.files import read_file

logger = logging.getLogger(__name__)

TRAINING_BYTES = 16 * 2**20  # a vocabulary is trained on about this much text
MOST_PIECES = 1_000_000  # SentencePiece takes a minute to refuse a thousand times as many
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
    content: the given SentencePiece model or tokenizer.json, or None.
    eos_id: token that ends a document, for a tokenizer.json; other vocabularies define their own.
    """

    name: str
    size: int | None = None
    content: bytes | None = None
    eos_id: int | None = None


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
        content = read_file(path, MOST_CONTENT)
    except OSError as error:
        raise InputError("--vocab", vocab, f"cannot be read: {error.strerror}") from error
    has_eos = load_model(content, "--vocab", vocab).eos_id() >= 0
    accepted = "has no end-of-sequence piece; train it with one (eos_id >= 0)"
    require(has_eos, "--vocab", vocab, accepted)
    return Vocab(path.name, content=content)


def parse_tokenizer(path: Path | str) -> Vocab:
    """Returns the tokenizer of a pretrained model as a vocabulary with the name NAME.json.

    path: see `open_tokenizer`. NAME is the name of the folder, or of the file without its suffix.
    Raises InputError if the tokenizer cannot be used, or has no token that ends a document.
    """
    tokenizer = open_tokenizer(path)
    name = f"{tokenizer_name(path)}.json"
    require_name("--tokenizer", name)
    accepted = (
        "has no end-of-sequence token: its folder must name one, as eos_token in "
        "tokenizer_config.json or eos_token_id in config.json"
    )
    require(len(tokenizer.eos_ids) > 0, "--tokenizer", str(path), accepted)
    return Vocab(name, content=tokenizer.content, eos_id=tokenizer.eos_ids[0])


def file_of(vocab: str) -> str | None:
    """Returns the name of the file that holds a vocabulary in a token cache; None for bytes."""
    if vocab == "bytes":
        return None
    return "tokenizer.json" if vocab.endswith(".json") else "vocabulary.model"


def make_codec(vocab: str, content: bytes, eos_id: int | None, where: str) -> Codec:
    """Returns the codec of a token cache's vocabulary.

    vocab: as in `DataConfig.vocab`.
    content: the file of the vocabulary, or b"" for bytes.
    eos_id: token that ends a document, for a tokenizer.json.
    where: place of the cache, for errors.
    Raises InputError if `content` is damaged or a package is missing.
    """
    if vocab == "bytes":
        return Bytes()
    if vocab.endswith(".json"):
        ends = () if eos_id is None else (eos_id,)
        return Tokenizer(content, where, Settings(eos_ids=ends))
    installed = importlib.util.find_spec("sentencepiece") is not None
    require(installed, "sentencepiece", None, "missing package; pip install -e '.[data]'")
    return Pieces(content, where)


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
