"""The tokenizer inside a GGUF file, rebuilt as a tokenizer.json."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from modjax.data.codecs.codec import SPACE
from modjax.data.codecs.tokenizer import Settings
from modjax.data.gguf_header import read_header
from modjax.errors import require

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # token types; 5 unused, 6 a byte

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
# The patterns that split a text before byte-level BPE, each within the parts of those before.
SPLITS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "qwen2": (rf"{_WORDS}|\p{{N}}|{_REST}",),
    "llama-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
}
NORMALIZERS = {"qwen2": {"type": "NFC"}}  # as Qwen's own tokenizer.json; GGUF has no key for it
WHOLE_WORDS = ("llama-bpe",)  # a word that is a token is one token, whatever the merges
BEGINS = ("llama-bpe",)  # prompts begin with a token, unless the file says otherwise

KEYS = ("ggml.", "chat_template")


def read_fields(path: Path) -> dict[str, Any]:
    """Returns the fields of a GGUF file's tokenizer, by their keys without "tokenizer.".

    Raises InputError if the file cannot be read.
    """
    keys, _ = read_header(path)
    named = {key.removeprefix("tokenizer."): keys[key] for key in keys if "tokenizer." in key}
    return {name: value for name, value in named.items() if name.startswith(KEYS)}


def settings_of(fields: Mapping[str, Any]) -> Settings:
    """Returns the special tokens and the chat template in the result of `read_fields`."""
    tokens, ids = fields["ggml.tokens"], _special_ids(fields)
    names = {"bos": "bos", "eos": "eos", "unknown": "unk", "padding": "pad"}
    template = fields.get("chat_template")
    return Settings(
        special={f"{names[name]}_token": tokens[i] for name, i in ids.items() if name in names},
        eos_ids=tuple(ids[name] for name in ("eos", "eot", "eom") if name in ids),
        bos_id=ids.get("bos"),
        template=template if isinstance(template, str) else None,
    )


def _special_ids(fields: Mapping[str, Any]) -> dict[str, int]:
    """Returns the ids of the special tokens by name, such as "bos"."""
    names = ("bos", "eos", "eot", "eom", "unknown", "padding")
    ids = {name: fields.get(f"ggml.{name}_token_id") for name in names}
    size = len(fields["ggml.tokens"])
    return {name: i for name, i in ids.items() if isinstance(i, int) and 0 <= i < size}


def rebuilt(fields: Mapping[str, Any], where: str) -> bytes:
    """Returns the bytes of a tokenizer.json, made from the result of `read_fields`.

    where: place of the GGUF file, for errors.
    Raises InputError for a kind of tokenizer that cannot be rebuilt exactly.
    """
    kind, tokens = fields.get("ggml.model"), _list(fields, "ggml.tokens", str)
    types = _list(fields, "ggml.token_type", int) or [NORMAL] * len(tokens)
    whole = len(tokens) == len(types) > 0
    require(whole, "tokenizer", where, "has no list of tokens with their types")
    makers = {"gpt2": _byte_level, "llama": _sentencepiece}
    known = isinstance(kind, str) and kind in makers
    accepted = f"cannot be rebuilt; must be one of {', '.join(makers)}"
    require(known, f"tokenizer.ggml.model of {where}", kind, accepted)
    added = [
        {"id": i, "content": token, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": kind_of_token != USER_DEFINED}
        for i, (token, kind_of_token) in enumerate(zip(tokens, types, strict=True))
        if kind_of_token in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    made = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added}
    made |= makers[str(kind)](fields, tokens, types, where)
    made["post_processor"] = _template(fields)
    return json.dumps(made, ensure_ascii=False, separators=(",", ":")).encode()


def _list(fields: Mapping[str, Any], key: str, kind: type) -> list[Any]:
    """Returns the list under a key, or [] unless it is a list of `kind`."""
    found = fields.get(key)
    usable = isinstance(found, list) and all(isinstance(value, kind) for value in found)
    return found if usable else []  # type: ignore[return-value]


def _template(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the post-processor that puts special tokens around a prompt."""
    tokens, ids = fields["ggml.tokens"], _special_ids(fields)
    begins = fields["ggml.model"] == "llama" or fields.get("ggml.pre") in BEGINS
    first = ["bos"] if fields.get("ggml.add_bos_token", begins) else []
    last = ["eos"] if fields.get("ggml.add_eos_token", False) else []
    special = {name: {"id": name, "ids": [i], "tokens": [tokens[i]]} for name, i in ids.items()}

    def around(*texts: str) -> list[dict[str, Any]]:
        parts = [*first, *texts, *last]
        return [
            {"SpecialToken" if part in special else "Sequence": {"id": part, "type_id": 0}}
            for part in parts
            if part in special or part in texts
        ]

    both = {"single": around("A"), "pair": around("A", "B"), "special_tokens": special}
    return {"type": "TemplateProcessing"} | both


def _bpe(tokens: Sequence[str], merges: Sequence[Sequence[str]], **options: Any) -> dict[str, Any]:
    vocab = {token: i for i, token in reversed(list(enumerate(tokens)))}  # the first of two stays
    return {"type": "BPE", **options, "vocab": vocab, "merges": merges}


def _byte_level(
    fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str
) -> dict[str, Any]:
    """Returns the parts of byte-level BPE. "ggml.pre" names the patterns that split a text."""
    pre = fields.get("ggml.pre", "default")
    accepted = f"is unknown; must be one of {', '.join(SPLITS)}"
    require(isinstance(pre, str) and pre in SPLITS, f"tokenizer.ggml.pre of {where}", pre, accepted)
    merges = [merge.split(" ") for merge in _list(fields, "ggml.merges", str)]
    require(len(merges) > 0, "tokenizer", where, "has no merges")
    splits = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in SPLITS[pre]
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level |= {"use_regex": False}
    return {
        "normalizer": NORMALIZERS.get(pre),
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*splits, byte_level]},
        "decoder": byte_level,
        "model": _bpe(tokens, merges, ignore_merges=pre in WHOLE_WORDS),
    }


def _sentencepiece(
    fields: Mapping[str, Any], tokens: Sequence[str], types: Sequence[int], where: str
) -> dict[str, Any]:
    """Returns the parts of a BPE that merges in the same order as SentencePiece.

    SentencePiece next merges the two neighbours whose token has the best score. BPE needs a list of
    pairs. The list has every pair that makes a token, ordered by the score of that token.
    Raises InputError if two such tokens have equal scores, which leaves their order unknown.
    """
    scores = _list(fields, "ggml.scores", float)
    require(len(scores) == len(tokens), "tokenizer", where, "has no scores for its tokens")
    score = {t: s for t, s, kind in zip(tokens, scores, types, strict=True) if kind == NORMAL}
    made = sorted((token for token in score if len(token) > 1), key=lambda token: -score[token])
    pairs = [
        (token[:at], token[at:])
        for token in made
        for at in range(1, len(token))
        if token[:at] in score and token[at:] in score
    ]
    merged = list(dict.fromkeys(left + right for left, right in pairs))
    accepted = "has several tokens of one score, so that the order of its merges is unknown"
    require(len({score[token] for token in merged}) == len(merged), "tokenizer", where, accepted)
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == UNKNOWN), None)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    decoders: list[dict[str, Any]] = [back, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizers: list[dict[str, Any]] = [replace]
    if fields.get("ggml.add_space_prefix", True):
        normalizers.insert(0, {"type": "Prepend", "prepend": SPACE})
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    options = {"unk_token": unknown, "fuse_unk": True, "byte_fallback": True}
    return {
        "normalizer": {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": _bpe(tokens, pairs, **options),
    }
