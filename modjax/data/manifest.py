"""The manifest of a token cache: its source, its vocabulary and the counts of its splits."""

import dataclasses
import json
import math
import re
from dataclasses import dataclass

from modjax.errors import require
from modjax.specs import from_dict

FORMAT = 2
SPLITS = ("train", "validation")


@dataclass(frozen=True)
class Split:
    """Counts of a split: `bytes` of UTF-8 text; `tokens` with the one eos of each document."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Describes a cache.

    vocab: as in `DataConfig.vocab`.
    source: where the text came from, with a hash of it.
    fingerprint: sha256 over the token streams and the vocabulary; equal exactly when those are.
    vocab_sha256: hash of vocabulary.model. None for bytes, and in a cache of an earlier version,
        whose vocabulary.model is assumed to be the one that it was made with.
    """

    name: str
    vocab: str
    vocab_size: int
    eos_id: int
    source: str
    fingerprint: str
    splits: dict[str, Split]
    format: int = FORMAT
    vocab_sha256: str | None = None

    @property
    def folder(self) -> str:
        """The folder beside the manifest that holds the tokens."""
        return self.fingerprint[:16]

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Raises InputError, ValueError or RecursionError where `text` is no such manifest."""
        values = json.loads(text)
        require(isinstance(values, dict), "manifest", values, "must be a group of fields")
        require(
            values.get("format") == FORMAT,
            "manifest.format",
            values.get("format"),
            f"this version reads format {FORMAT}",
        )
        splits = values.pop("splits", None)
        require(
            isinstance(splits, dict) and set(splits) == set(SPLITS),
            "manifest.splits",
            splits,
            f"must describe {' and '.join(SPLITS)}",
        )
        for split in SPLITS:
            require(isinstance(splits[split], dict), split, splits[split], "must be counts")
        named = {name: from_dict(Split, splits[name], f"{name}.") for name in SPLITS}
        manifest = from_dict(cls, {**values, "splits": named})
        require(
            re.fullmatch(r"[\w-]+", manifest.fingerprint) is not None,
            "manifest.fingerprint",
            manifest.fingerprint,
            "must be a hash",
        )
        return manifest

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def bits_per_byte(manifest: Manifest, loss: float, split: str = "validation") -> float:
    """A mean loss in nats per token, as bits per UTF-8 byte of text: loss * tokens / bytes / ln 2.

    Tokens include the one eos of each document, since the loss does: knowing where a text ends
    is part of predicting it. Bytes are those of the text alone. The extra token is the same for
    every vocabulary, so figures compare across vocabularies.
    """
    counts = manifest.splits[split]
    return loss * counts.tokens / counts.bytes / math.log(2)
