"""The codec of a tokenizer.json: bytes of tokens, special tokens, prompts."""

import json

import pytest

pytest.importorskip("tokenizers")

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from modjax.data.codecs import tokenizer as module
from modjax.data.codecs.gguf_tokenizer import rebuilt
from modjax.errors import InputError
from tests.data.codecs.small import (
    LINES,
    ODD,
    byte_level,
    fields_of_pieces,
    sentencepiece_model,
)


def codec(tokenizer, **settings) -> module.Tokenizer:
    content = tokenizer if isinstance(tokenizer, str) else tokenizer.to_str()
    return module.Tokenizer(content.encode(), "here", module.Settings(**settings))


def like_sentencepiece(add_space: bool = True) -> Tokenizer:
    model = sentencepiece_model(add_dummy_prefix=add_space)
    return Tokenizer.from_buffer(rebuilt(fields_of_pieces(model, add_space), "here"))


def metaspace() -> Tokenizer:
    """Returns a tokenizer in the newer form of Llama 2's."""
    tokenizer = like_sentencepiece()
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    options = dict(vocab_size=600, unk_token="<unk>", special_tokens=["<unk>", "<s>"])
    trainer = trainers.UnigramTrainer(show_progress=False, **options)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=500, special_tokens=["[UNK]", "[SEP]"], show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def small() -> Tokenizer:
    return byte_level()


@pytest.mark.parametrize("make", [byte_level, like_sentencepiece, metaspace])
def test_the_pieces_of_a_text_spell_it(make):
    tokenizer = make()
    ours = codec(tokenizer)
    tokenizer.encode_special_tokens = True
    for text in [*ODD, *LINES[:300]]:
        ids = ours.encode(text, "text")
        assert ids == tokenizer.encode(text, add_special_tokens=False).ids
        if make is not metaspace or not text.startswith(" "):  # it has one encoding for "x", " x"
            assert b"".join(ours.pieces(ids, begins=True)) == text.encode()
        inside = b"".join(piece for i in ids for piece in ours.pieces([i]))
        assert inside in (text.encode(), b" " + text.encode())
        assert ours.decode(ids) == tokenizer.decode(ids)
    batch = ours.encode_batch(ODD)
    assert batch == [ours.encode(text, "text") for text in ODD]


def test_a_character_may_lie_across_tokens(small):
    ours = codec(small)
    text = "\U0001f469\U0001f680"
    pieces = ours.pieces(ours.encode(text, "text"))
    assert len(pieces) == len(text.encode()) and b"".join(pieces) == text.encode()


def test_a_text_without_a_space_in_front_gets_none_removed():
    ours = codec(like_sentencepiece(add_space=False))
    ids = ours.encode(" x", "text")
    assert b"".join(ours.pieces(ids, begins=True)) == b" x"


def test_nfc_is_part_of_the_vocabulary():
    ours = codec(byte_level("qwen2"))
    assert b"".join(ours.pieces(ours.encode("e\u0301", "text"))) == "\u00e9".encode()


def test_plain_text_cannot_spell_control_tokens_but_a_prompt_can(small):
    small = byte_level()
    small.add_tokens([AddedToken("</end>", rstrip=True), AddedToken("<think>", normalized=False)])
    end, think = small.token_to_id("</end>"), small.token_to_id("<think>")
    ours = codec(small, special={"bos_token": "<s>", "eos_token": "</end>"})
    text = "<s> a</end> b<think><|im_end|>"
    plain = ours.encode(text, "text")
    assert set(plain) & {0, 1, 2, 3, 4, end} == set() and think in plain
    assert b"".join(ours.pieces(plain)) == text.encode()
    assert ours.encode_batch([text]) == [plain]
    prompt = ours.prompt(text, "text")
    assert {0, 4, end, think} <= set(prompt)
    assert ours.pieces([0, 4, end, think]) == [b"", b"", b"", b"<think>"]
    assert ours.encode(text, "text") == plain, "a prompt changes nothing"
    assert (ours.bos_id, ours.eos_ids) == (0, (end,))


def test_ends_of_text_and_ids_that_no_token_has(small):
    ours = codec(small, special={"eos_token": "</s>"}, eos_ids=(4, 1, 99_999), bos_id=77_777)
    assert (ours.eos_ids, ours.bos_id) == ((1, 4), None)
    assert codec(small, special={"eos_token": "nowhere"}).eos_ids == ()
    assert ours.pieces([ours.vocab_size, 10**6]) == [b"", b""]


def test_truncation_padding_and_dropout_of_the_file_are_ignored(small):
    expected = codec(small).encode("Hello world " * 20, "text")
    other = byte_level()
    other.enable_truncation(3)
    other.enable_padding(length=500)
    other.model.dropout = 0.5
    ours = codec(other)
    assert [ours.encode("Hello world " * 20, "text") for _ in range(3)] == [expected] * 3
    assert ours.encode_batch(["Hello world " * 20, ""]) == [expected, []]
    assert ours.prompt("Hello world " * 20, "text") == expected


def test_a_prompt_gets_the_tokens_that_the_file_says():
    tokenizer = byte_level()
    plain = codec(tokenizer).encode("Hi", "text")
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert codec(tokenizer).encode("Hi", "text") == plain
    assert codec(tokenizer).prompt("Hi", "text") == [0, *plain]
    assert codec(tokenizer).prompt("Hi", "text", rendered=True) == plain


def test_a_vocabulary_whose_tokens_lose_text_encodes_but_has_no_pieces():
    losing = byte_level()
    losing.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    plain = byte_level()
    plain.decoder = decoders.Fuse()
    for tokenizer in (word_piece(), losing, plain):
        ours = codec(tokenizer)
        assert ours.encode("the cat", "text") == tokenizer.encode("the cat").ids
        with pytest.raises(InputError, match=r"^tokenizer = 'here': has no exact bytes") as caught:
            ours.pieces([5])
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("make", [unigram, word_piece])
def test_a_character_that_the_vocabulary_does_not_know_is_refused(make):
    ours = codec(make())
    with pytest.raises(InputError, match=r"^--prompt = '.*': has characters .* not know"):
        ours.encode("the \u5b57 cat", "--prompt")
    if make is unigram:
        ids = ours.encode("the cat  ate", "--prompt")
        assert b"".join(ours.pieces(ids, begins=True)) == b"the cat  ate"


def test_bytes_of_the_command_line_that_are_not_utf8_are_refused(small):
    text = b"caf\xe9".decode("utf-8", "surrogateescape")
    for use in (codec(small).encode, codec(small).prompt):
        with pytest.raises(InputError, match=r"is not UTF-8 at character 3"):
            use(text, "--prompt")


@pytest.mark.parametrize(
    "content",
    ["", "{}", "nothing", "[]", "null", "\ud800", '{"model": {"type": "Other"}}', "[" * 9999],
)
def test_a_broken_file_is_refused_in_one_line(content):
    data = content.encode(errors="surrogatepass")
    with pytest.raises(InputError, match=r"^tokenizer = 'here': cannot be read: it is") as caught:
        module.Tokenizer(data, "here")
    assert "\n" not in str(caught.value)


def test_a_file_of_another_shape_is_refused(small):
    values = json.loads(small.to_str())
    values["model"]["merges"] = [["no", "such"]]
    with pytest.raises(InputError, match="cannot be read"):
        codec(json.dumps(values))
    with pytest.raises(InputError, match="must have 1 to 16,777,216 token ids, has 0"):
        codec(Tokenizer(models.BPE()))
    with pytest.raises(InputError, match="must have 1 to 16,777,216 token ids, has 16,777,217"):
        codec(Tokenizer(models.BPE({"a": 2**24}, [])))


def test_the_table_of_bytes_is_that_of_tokenizers():
    table = module.byte_table()
    assert sorted(table) == sorted(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(table.values()) == list(range(256))
    for character, byte in table.items():
        if byte < 128:
            assert decoders.ByteLevel().decode([character]) == chr(byte)
