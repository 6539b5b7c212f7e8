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
    """Counts of a split: bytes of UTF-8 text, and tokens including one eos per document."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class Manifest:
    """Description of a cache.

    vocab: as in `DataConfig.vocab`.
    source: describes the text and any given vocabulary, with hashes where known.
    fingerprint: sha256 that identifies the token streams and the vocabulary.
    vocab_sha256: hash of the vocabulary's file. None for bytes, and in caches of earlier versions,
        whose file is not checked.
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
        """Returns the name of the folder, beside the manifest, that holds the tokens."""
        return self.fingerprint[:16]

    @classmethod
    def from_json(cls, text: str | bytes) -> "Manifest":
        """Returns the manifest in a JSON text.

        Raises InputError, ValueError or RecursionError if `text` is not a manifest.
        """
        values = json.loads(text)
        require(isinstance(values, dict), "manifest", values, "must be a group of fields")
        accepted = f"this version reads format {FORMAT}"
        require(values.get("format") == FORMAT, "manifest.format", values.get("format"), accepted)
        manifest = from_dict(cls, values, "manifest.")
        accepted = f"must describe {' and '.join(SPLITS)}"
        require(set(manifest.splits) == set(SPLITS), "manifest.splits", manifest.splits, accepted)
        is_name = re.fullmatch(r"[\w-]+", manifest.fingerprint) is not None
        require(is_name, "manifest.fingerprint", manifest.fingerprint, "must be a hash")
        return manifest

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"


def bits_per_byte(manifest: Manifest, loss: float) -> float:
    """Returns a mean validation loss in nats per token as bits per UTF-8 byte of text.

    The result is loss * tokens / bytes / ln 2. Tokens include the one eos of each document, since
    the loss does: knowing where a text ends is part of predicting it. Bytes are those of the text
    alone. Every vocabulary adds the same eos, so results compare across vocabularies.
    """
    counts = manifest.splits["validation"]
    return loss * counts.tokens / counts.bytes / math.log(2)
