"""Which vocabulary a corpus is tokenised with, and training one; no TensorFlow here."""

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from modjax.errors import InputError, require

TRAINING_BYTES = 16 * 2**20  # a vocabulary is trained on about this much text
LINE = 4000  # characters; SentencePiece drops longer lines


@dataclass(frozen=True)
class Vocab:
    """A request understood. `name` is what `DataConfig.vocab` calls it.

    size: pieces to train, where it is to be trained. file: the model, where one is given.
    """

    name: str
    size: int | None = None
    file: Path | None = None


def parse_vocab(vocab: str) -> Vocab:
    """Reads "bytes", "sentencepiece:SIZE" or the path of a SentencePiece model.

    Raises InputError for anything else, and for a model that cannot be used.
    """
    if vocab == "bytes":
        return Vocab("bytes")
    kind, _, size = vocab.partition(":")
    if kind == "sentencepiece":
        require(
            size.isdecimal() and len(size) < 10 and int(size) > 0,
            "--vocab",
            vocab,
            "must give a number of pieces, as in sentencepiece:8192",
        )
        return Vocab(f"sentencepiece:{int(size)}", size=int(size))
    require(
        vocab.endswith(".model"),
        "--vocab",
        vocab,
        "must be bytes, sentencepiece:SIZE or a SentencePiece FILE.model",
    )
    import sentencepiece

    path = Path(vocab)
    try:
        model = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes())  # type: ignore[call-arg]
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or "it is not a SentencePiece model"
        raise InputError("--vocab", vocab, f"cannot be read: {reason}") from error
    require(
        model.eos_id() >= 0,
        "--vocab",
        vocab,
        "has no end-of-sequence piece; train it with one (eos_id >= 0)",
    )
    return Vocab(path.name, file=path)


def train_sentencepiece(texts: Iterable[str], size: int) -> bytes:
    """Trains a byte-pair SentencePiece model that loses no text.

    No normalisation, white space kept, rare characters as their bytes: decoding gives the text
    back (but for U+2581, SentencePiece's own mark for a space). Ids 0, 1 and 2 are padding, end
    of sequence and unknown. BPE (Sennrich et al. 2016, arXiv 1508.07909) because it merges by
    counts alone and so comes out the same on every machine. Raises InputError where this text
    cannot give so few or so many pieces.
    """
    import sentencepiece

    sentencepiece.set_min_log_level(2)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(  # type: ignore[attr-defined]
            sentence_iterator=_lines(texts),
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
            minloglevel=3,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2]
        raise InputError(
            "--vocab", f"sentencepiece:{size}", f"cannot be trained on this text: {reason}"
        ) from error
    return model.getvalue()


def _lines(texts: Iterable[str]) -> Iterator[str]:
    left = TRAINING_BYTES
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), LINE):
                yield line[start : start + LINE]
        left -= len(text.encode())
        if left <= 0:
            return


class Codec:
    """Text to token ids and back, with the vocabulary of a prepared corpus.

    Bytes are the ids from 3 on, as seqio numbers them. model: of SentencePiece, or None for bytes.
    """

    BYTES_FROM = 3

    def __init__(self, model: bytes | None):
        self._model = None
        if model is not None:
            import sentencepiece

            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)  # type: ignore[call-arg]

    def encode(self, text: str, field: str) -> list[int]:
        """Raises InputError where the vocabulary has no token for a part of `text`."""
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
        """The bytes of each token; special ones have none."""
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
