"""Small tokenizers, trained here, and texts that are hard to encode."""

import argparse
import io
import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = Path(argparse.__file__).read_text().splitlines(keepends=True)
LINES += ["In 2024 日本 had 1234567 users; ü and é!\n\n", "don't DON'T we'll   \t x\r\n"] * 20
LINES += [f"20 2024 123 1234 {i * 37 % 100}\n" for i in range(200)]
# Emoji split over tokens, Chinese, tabs, leading spaces, digits, empty lines, special tokens.
ODD = (
    "",
    " ",
    "Hello  world\n\n\t x 123 4.5",
    "日本語 ü \U0001f469\u200d\U0001f469\u200d\U0001f467 x",
    "   lead and trail   ",
    "<s>a</s> <|im_start|>user\n<|im_end|><unk><0x0A>",
    "don't DON'T I'LL we've",
    "\r\n \r\n\t\n",
    "\n\n\n",
    "1234567 ٣٤٥ Ⅷ 1.000.000",
    "x" + " " * 9 + "y",
    "\U0001f600\U0001f680 \u4e2d\u6587\u5b57",
    "a\u00a0b \u2028 c",
)
SPECIAL = ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>")
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def split_at(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def whole() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


# As the models' own files have them.
PRE_TOKENIZERS = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": lambda: pre_tokenizers.Sequence([split_at(LLAMA3), whole()]),
    "qwen2": lambda: pre_tokenizers.Sequence([split_at(LLAMA3.replace("{1,3}", "")), whole()]),
    "default": lambda: pre_tokenizers.Sequence(
        [
            split_at(r"[\p{P}$+<=>^~|]+"),
            split_at(GPT2),
            split_at(r"\p{N}+"),
            split_at("[0-9][0-9][0-9]"),
            whole(),
        ]
    ),
}


def byte_level(pre: str = "gpt-2", size: int = 700) -> Tokenizer:
    """Returns byte-level BPE that splits text as `pre` says.

    It is trained on whole lines: its merges cross words, so that every split shows.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = whole()
    tokenizer.decoder = decoders.ByteLevel()
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    if pre == "llama-bpe":
        tokenizer.model.ignore_merges = True
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]()
    return tokenizer


def sentencepiece_model(lines=LINES, size=1200, **options: Any) -> Any:
    """Returns a SentencePiece model as Llama 2's: byte fallback, digits apart, a space in front."""
    model = io.BytesIO()
    settings = dict(
        model_type="bpe",
        vocab_size=size,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        num_threads=1,
        minloglevel=3,
    )
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, **settings | options
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def fields_of_pieces(model: Any, add_space: bool = True) -> dict[str, Any]:
    """Returns the fields of a GGUF file with this SentencePiece model."""
    ids = range(model.vocab_size())

    def kind(i: int) -> int:
        return (
            2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1
        )

    return {
        "ggml.model": "llama",
        "ggml.tokens": [model.id_to_piece(i) for i in ids],
        "ggml.scores": [model.get_score(i) for i in ids],
        "ggml.token_type": [kind(i) for i in ids],
        "ggml.bos_token_id": 1,
        "ggml.eos_token_id": 2,
        "ggml.unknown_token_id": 0,
        "ggml.add_space_prefix": add_space,
    }


def fields_of_bytes(tokenizer: Tokenizer, pre: str) -> dict[str, Any]:
    """Returns the fields of a GGUF file with this byte-level BPE."""
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return {
        "ggml.model": "gpt2",
        "ggml.pre": pre,
        "ggml.tokens": tokens,
        "ggml.token_type": [3 if token in SPECIAL else 1 for token in tokens],
        "ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "ggml.bos_token_id": 0,
        "ggml.eos_token_id": 1,
        "ggml.eot_token_id": 4,
        "ggml.add_bos_token": False,
        "chat_template": "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}",
    }


def write_gguf(path: Path, fields: dict[str, Any]) -> Path:
    """Writes a GGUF file with these fields and no tensor."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    for name, value in fields.items():
        name = f"tokenizer.{name}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        else:
            writer.add_string(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path
