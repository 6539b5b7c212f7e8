"""The requested text and vocabulary, checked before anything is made."""

import hashlib
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modjax.data.prepare.documents import TextScan, scan_text, stdlib_documents
from modjax.data.vocabulary import Vocab
from modjax.errors import require, require_plain_name

CORPORA = ("stdlib", "c4", "lm1b")


@dataclass(frozen=True)
class Corpus:
    """A checked corpus.

    source: description of the text for the manifest, with its hash unless it is a TFDS data set.
    files, scan: the user's files, if any, and the result of their first pass.
    tfds_name: full name of a TFDS data set, or None.
    """

    name: str
    source: str
    files: tuple[Path, ...] = ()
    scan: TextScan | None = None
    tfds_name: str | None = None


@dataclass(frozen=True)
class CacheRequest:
    """A checked request for a cache."""

    corpus: Corpus
    vocab: Vocab

    @property
    def source(self) -> str:
        """Returns the description of the text, and of the given vocabulary if there is one."""
        name, content, eos_id = self.vocab.name, self.vocab.content, self.vocab.eos_id
        given = f"; {name} sha256 {sha256(content)}" if content is not None else ""
        end = f", end of document {eos_id}" if eos_id is not None else ""
        return self.corpus.source + given + end

    def inputs(self, vocabulary: bytes) -> str:
        """Returns a description of everything that the tokens depend on.

        A killed preparation resumes only if this is unchanged. vocabulary: its file, or b"" for
        bytes.
        """
        scan = self.corpus.scan
        files = scan.state if scan is not None else ""
        return f"{self.source}; files {files}; vocabulary {sha256(vocabulary)}"


def check_corpus(name: str | None, files: list[Path], tfds_name: str | None) -> Corpus:
    """Returns the requested corpus: the user's files, a TFDS data set or one of `CORPORA`.

    Raises InputError if it does not exist, cannot be read or has the name of a built-in corpus.
    """
    require(tfds_name != "", "--tfds", tfds_name, "is empty: name a data set, or leave it out")
    require(not (files and tfds_name), "--tfds", tfds_name, "cannot be combined with --text")
    if tfds_name in CORPORA and name in (None, tfds_name):
        name, tfds_name = tfds_name, None
    if files or tfds_name:
        if name is None:
            name = "text" if files else re.sub(r"[^\w.-]", "-", tfds_name or "")
        require(name not in CORPORA, "--name", name, "is a built-in corpus; choose another name")
    if name is None:
        name = CORPORA[0]
    require_plain_name("--name", name)
    if files:
        scan = scan_text(files)
        return Corpus(name, f"text sha256 {scan.digest}", tuple(files), scan)
    known = f"unknown corpus; must be one of {', '.join(CORPORA)}, or come with --text or --tfds"
    require(tfds_name is not None or name in CORPORA, "--name", name, known)
    if name == "stdlib":
        digest = sha256("\0".join(f"{d.id}\0{d.text}" for d in stdlib_documents()).encode())
        return Corpus(name, f"stdlib of Python {platform.python_version()} sha256 {digest}")
    tasks = load_tasks()
    full_name = tasks.resolve_tfds(tfds_name or {"c4": tasks.C4, "lm1b": tasks.LM1B}[name])
    return Corpus(name, f"tfds {full_name}", tfds_name=full_name)


def load_tasks() -> Any:
    """Imports and returns `seqio_tasks`. It loads TensorFlow, so check all input first."""
    from modjax.data.prepare import seqio_tasks

    return seqio_tasks


def sha256(content: bytes) -> str:
    """Returns the hash of `content` in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
