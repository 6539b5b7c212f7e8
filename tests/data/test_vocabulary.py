"""Vocabularies: training one, and encoding and decoding text with it."""

import io
import sys

import numpy as np
import pytest
import sentencepiece

from modjax.data import vocabulary
from modjax.data.codecs.codec import Bytes, Pieces
from modjax.data.vocabulary import make_codec, train_sentencepiece
from modjax.errors import InputError

TEXT = "The cat,  the hat\n\tand 日本 — ü: 2024!\n"
CORPUS = [f"the cat sat on the mat {i}, and the hat fell  on\n\tthe cat\n" for i in range(40)]


@pytest.fixture(scope="module")
def pieces_codec():
    return Pieces(train_sentencepiece(CORPUS, 300))


def test_bytes_are_numbered_from_3_and_come_back():
    codec = Bytes()
    assert codec.encode("aü", "--prompt") == [ord("a") + 3, 0xC3 + 3, 0xBC + 3]
    ids = codec.encode(TEXT, "--prompt")
    assert b"".join(codec.pieces(ids)).decode() == TEXT
    assert codec.pieces([0, 1, 2, 3, 258, 259]) == [b"", b"", b"", b"\x00", b"\xff", b""]


def test_sentencepiece_comes_back_piece_by_piece(pieces_codec):
    ids = pieces_codec.encode(TEXT, "--prompt")
    pieces = pieces_codec.pieces(ids)
    assert b"".join(pieces).decode() == TEXT
    assert len(ids) < len(TEXT.encode()), "it merges"
    assert any(len(piece) > 2 for piece in pieces)
    assert pieces_codec.pieces([0, 1, 2]) == [b"", b"", b""], "padding, end and unknown"


def test_a_character_that_the_vocabulary_does_not_know_is_refused():
    model = io.BytesIO()
    options = dict(vocab_size=30, model_type="bpe", minloglevel=3)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **options
    )
    codec = Pieces(model.getvalue())
    assert b"".join(codec.pieces(codec.encode("the cat", "--prompt"))).strip() == b"the cat"
    with pytest.raises(
        InputError, match=r"^--prompt = 'the 日本': has characters that .* not know"
    ):
        codec.encode("the 日本", "--prompt")


def test_bytes_of_the_command_line_that_are_not_utf8_are_refused(pieces_codec):
    text = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads its arguments
    for codec in (Bytes(), pieces_codec):
        with pytest.raises(InputError, match=r"is not UTF-8 at character 3") as caught:
            codec.encode(text, "--prompt")
        assert str(caught.value).isascii() and "\n" not in str(caught.value)


RNG = np.random.default_rng(0)
ODDS = 1 / np.arange(1, 201)
HAN = ["".join(map(chr, 0x4E00 + RNG.integers(0, 99, RNG.integers(1, 4)))) for _ in range(200)]
DRAWN = RNG.choice(HAN, 10_000, p=ODDS / ODDS.sum())
LATIN = "\n".join("".join(map(chr, RNG.integers(97, 123, 8))) for _ in range(500))


def han(line: int, end: str) -> str:
    """Returns the drawn words with `end` after every `line` of them."""
    return end.join("".join(DRAWN[i : i + line]) for i in range(0, len(DRAWN), line))


def tokens_after_training_on(text: str) -> int:
    """Returns the number of tokens of a Han text, after training on `text`."""
    codec = Pieces(train_sentencepiece([LATIN, text], 500))
    return len(codec.encode("".join(DRAWN[:2000]), "--prompt"))


@pytest.mark.parametrize(
    "text", [han(len(DRAWN), ""), han(1400, "\n"), han(20, "\u2585\n"), han(20, "\u2585")]
)
def test_a_vocabulary_sees_text_that_sentencepiece_would_skip(text):
    """SentencePiece skips lines of more than 4192 bytes, and lines with U+2585."""
    in_short_lines = tokens_after_training_on(han(20, "\n"))
    assert in_short_lines < 0.8 * tokens_after_training_on(LATIN), "it learns from Han text"
    assert tokens_after_training_on(text) < 1.03 * in_short_lines


@pytest.mark.parametrize(
    "text", ["", "a", "\u00fc" * 5000, "a" + "\u65e5" * 4000, "\U0001f600" * 1001]
)
def test_lines_are_cut_below_the_limit_of_sentencepiece_and_lose_nothing(text):
    parts = list(vocabulary._lines([text]))
    assert "".join(parts) == text
    assert all(3990 < len(part.encode()) <= 4192 for part in parts[:-1])


def test_what_sentencepiece_warns_of_is_said_in_clean_lines(monkeypatch, caplog, capfd):
    monkeypatch.setattr(vocabulary, "LINE", 5000)
    train_sentencepiece([*CORPUS, "ab" * 3000, "cd" * 3000], 300)
    messages = [record.getMessage() for record in caplog.records]
    assert "modjax: SentencePiece: Found too long line (5000 > 4192)." in messages
    assert len(messages) == len(set(messages)) <= 3, "each is said once"
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("damage", ["one bit", "half", "empty", "text"])
def test_a_damaged_model_is_refused_in_one_line(damage):
    good = train_sentencepiece(CORPUS, 300)
    at = good.index(b"the")
    flipped = good[: at - 1] + bytes([good[at - 1] ^ 0x80]) + good[at:]
    bad = {"one bit": flipped, "half": good[: len(good) // 2], "empty": b"", "text": b"no model"}
    with pytest.raises(InputError, match=r"^data = 'here': .* not a SentencePiece model") as caught:
        Pieces(bad[damage], "here")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("vocab", "package", "extra"),
    [("sentencepiece:290", "sentencepiece", "data"), ("x.json", "tokenizers", "pretrained")],
)
def test_a_vocabulary_needs_its_package(vocab, package, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=rf"^{package}.*pip install -e '.\[{extra}\]'"):
        make_codec(vocab, b"", 1, "here")


@pytest.mark.parametrize(("texts", "size"), [(CORPUS, 1), (CORPUS, 100), (CORPUS, 9999), ([], 300)])
def test_a_vocabulary_that_cannot_be_trained_is_refused_with_a_reason(texts, size):
    with pytest.raises(InputError, match=rf"sentencepiece:{size}': cannot be .* this text: \w+"):
        train_sentencepiece(texts, size)
