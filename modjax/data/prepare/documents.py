"""Documents of the two corpora that need no download: the standard library and the user's files.

This module does not need TensorFlow, so bad input is found before TensorFlow is loaded.
"""

import contextlib
import gzip
import hashlib
import io
import json
import lzma
import os
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from modjax.errors import InputError, require
from modjax.files import open_file, reason

PIECE = 65_536  # characters; plain text is cut into documents of about this size
LONGEST_LINE = 64 * 2**20  # characters of a line of JSON; it is read as a whole
VALIDATION_SHARE = 0.05
STDLIB_VALIDATION_MODULES = 0.065  # of the modules; in Python 3.11 they hold 6% of the text
BUCKETS = 65_536  # number of values of `bucket`

# The library's tests, installed packages, and files that differ between builds of one version.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata")


class Document(NamedTuple):
    id: str
    text: str


def bucket(text: str) -> int:
    """Returns a hash of `text` in [0, BUCKETS), the same on every machine."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:2], "big")


def stdlib_documents() -> Iterator[Document]:
    """Yields the source files of the running Python's standard library, sorted by path."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if LEFT_OUT.intersection(relative.parts[:-1]):
            continue
        if relative.parts[0].startswith(LEFT_OUT_PREFIXES):
            continue
        try:
            with tokenize.open(path) as file:
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield Document(relative.as_posix(), text)


def stdlib_split(document_id: str) -> str:
    """Returns the split of a document, chosen by the hash of its top-level module's name."""
    module = document_id.split("/")[0].removesuffix(".py")
    return "validation" if bucket(module) < STDLIB_VALIDATION_MODULES * BUCKETS else "train"


def text_documents(files: Sequence[Path]) -> Iterator[Document]:
    """Yields the documents of the user's files, in order.

    Files are UTF-8, plain or compressed with xz or gzip. In a file named .jsonl, .ndjson or .json
    (before .xz or .gz), each line of at most LONGEST_LINE characters is an object with a "text".
    Any other file is plain text of any length, cut at blank lines into documents of about PIECE
    characters. Raises InputError for an unusable file, and names the line if it is JSON.
    """
    for path in files:
        suffixes = [s.lower() for s in path.suffixes if s.lower() not in (".xz", ".gz")]
        is_json = suffixes[-1:] in ([".jsonl"], [".ndjson"], [".json"])
        for number, text in _json_texts(path) if is_json else _plain_pieces(path):
            if text.strip():
                yield Document(f"{path.name}:{number}", text)


@contextlib.contextmanager
def _opened(path: Path, field: str) -> Iterator[IO[str]]:
    """Opens a user's text file. Turns errors of opening and reading it into InputError."""
    try:
        with open_file(path) as raw, _decoded(path, raw) as file:
            yield file
    except UnicodeDecodeError as error:
        raise InputError(field, str(path), f"must be UTF-8 text ({error.reason})") from error
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(field, str(path), f"cannot be read: {reason(error)}") from error


def _decoded(path: Path, raw: IO[bytes]) -> IO[str]:
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix.lower())
    content = raw if opener is None else opener(raw)
    return io.TextIOWrapper(content, encoding="utf-8", newline="\n")  # type: ignore[arg-type]


def json_lines(path: Path, field: str) -> Iterator[tuple[int, Any]]:
    """Yields the line number, from 1, and the value of each line of JSON that is not blank."""
    with _opened(path, field) as file:
        number = 0
        while line := file.readline(LONGEST_LINE + 1):
            number += 1
            where = f"{path}:{number}"
            accepted = f"a line of JSON may have up to {LONGEST_LINE:,} characters"
            require(len(line) <= LONGEST_LINE, field, where, accepted)
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                why = getattr(error, "msg", None) or str(error)
                raise InputError(field, where, f"is not JSON ({why})") from error
            yield number, value


def _json_texts(path: Path) -> Iterator[tuple[int, str]]:
    for number, value in json_lines(path, "--text"):
        text = value.get("text") if isinstance(value, dict) else None
        if not isinstance(text, str):
            accepted = 'every line must be an object with a string "text"'
            raise InputError("--text", f"{path}:{number}", accepted)
        # JSON can spell half of a surrogate pair, which UTF-8 cannot.
        yield number, text.encode("utf-8", "replace").decode()


def _plain_pieces(path: Path) -> Iterator[tuple[int, str]]:
    """Yields the ordinal, from 1, and the text of each document in plain text."""
    piece: list[str] = []
    size = number = 0
    with _opened(path, "--text") as file:
        while line := file.readline(PIECE):
            piece.append(line)
            size += len(line)
            if size >= PIECE and (not line.strip() or size >= 4 * PIECE):
                number += 1
                yield number, "".join(piece)
                piece, size = [], 0
        yield number + 1, "".join(piece)


@dataclass(frozen=True)
class TextScan:
    """Result of a first pass over the user's files.

    digest: sha256 of all texts.
    bytes: size of all texts in UTF-8.
    documents: number of documents in each split.
    validation_bucket: highest `bucket` of a text in the validation split.
    state: identifies the files on this machine; any write to them changes it.
    """

    digest: str
    bytes: int
    documents: dict[str, int]
    validation_bucket: int
    state: str = field(compare=False)

    def split(self, text: str) -> str:
        return "validation" if bucket(text) <= self.validation_bucket else "train"


def scan_text(files: Sequence[Path]) -> TextScan:
    """Reads the user's files once and chooses their validation split.

    The split takes whole buckets in ascending order until it holds 5% of the text; one bucket is
    always left for training. Raises InputError if a file cannot be used, or if the documents fall
    into fewer than two buckets.
    """
    require(len(files) > 0, "--text", [], "must name a file")
    state = _state(files)
    digest = hashlib.sha256()
    sizes = np.zeros(BUCKETS, np.int64)
    counts = np.zeros(BUCKETS, np.int64)
    for document in text_documents(files):
        place = bucket(document.text)
        sizes[place] += _add(digest, document)
        counts[place] += 1
    names = ", ".join(map(str, files))
    buckets = np.flatnonzero(counts)
    require(len(buckets) > 0, "--text", names, "holds no text")
    accepted = (
        "holds fewer than two distinct documents, and the validation split needs one of its own; "
        f"give more text (plain text is cut at about {PIECE} characters)"
    )
    require(len(buckets) > 1, "--text", names, accepted)
    wanted = np.searchsorted(np.cumsum(sizes), VALIDATION_SHARE * sizes.sum())
    last = int(min(wanted, buckets[-2]))
    documents = {
        "train": int(counts[last + 1 :].sum()),
        "validation": int(counts[: last + 1].sum()),
    }
    return TextScan(digest.hexdigest(), int(sizes.sum()), documents, last, state)


def scanned_documents(files: Sequence[Path], scan: TextScan) -> Iterator[Document]:
    """Yields the documents of the user's files, as `text_documents` does.

    Raises InputError after the last one if a file has changed since `scan`.
    """
    digest = hashlib.sha256()
    for document in text_documents(files):
        _add(digest, document)
        yield document
    remedy = "changed while it was read; run this again, on a copy if it keeps changing"
    require(digest.hexdigest() == scan.digest, "--text", ", ".join(map(str, files)), remedy)


def _add(digest: Any, document: Document) -> int:
    """Adds the text of a document to a hash and returns its size in bytes."""
    data = document.text.encode()
    digest.update(len(data).to_bytes(8, "big") + data)
    return len(data)


def _state(files: Sequence[Path]) -> str:
    states = []
    for path in files:
        with contextlib.suppress(OSError):  # reading the file gives the error
            found = os.stat(path)
            states.append(f"{found.st_dev}-{found.st_ino}-{found.st_size}-{found.st_ctime_ns}")
    return " ".join(states)
