"""Text to ids and back."""

import io

import pytest
import sentencepiece

from modjax.data.vocabulary import Codec, train_sentencepiece
from modjax.errors import InputError

TEXT = "The cat,  the hat\n\tand 日本 — ü: 2024!\n"
CORPUS = [f"the cat sat on the mat {i}, and the hat fell  on\n\tthe cat\n" for i in range(40)]


@pytest.fixture(scope="module")
def pieces_codec():
    return Codec(train_sentencepiece(CORPUS, 300))


def test_bytes_are_numbered_from_3_and_come_back():
    codec = Codec(None)
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
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, vocab_size=30, model_type="bpe",
        minloglevel=3,
    )  # fmt: skip
    codec = Codec(model.getvalue())
    assert b"".join(codec.pieces(codec.encode("the cat", "--prompt"))).strip() == b"the cat"
    with pytest.raises(
        InputError, match=r"^--prompt = 'the 日本': has characters that .* not know"
    ):
        codec.encode("the 日本", "--prompt")


def test_bytes_of_the_command_line_that_are_not_utf8_are_refused(pieces_codec):
    text = b"caf\xe9".decode("utf-8", "surrogateescape")  # as Python reads its arguments
    for codec in (Codec(None), pieces_codec):
        with pytest.raises(InputError, match=r"is not UTF-8 at character 3") as caught:
            codec.encode(text, "--prompt")
        assert str(caught.value).isascii() and "\n" not in str(caught.value)
