"""Preparation of token caches.

A cache is made in a hidden folder beside its place, `.NAME-VOCAB.partial`, and moved there when it
is whole. A killed preparation resumes after its last full shard and makes the same cache. A cache
for an object store is made in the user's cache folder, uploaded, and removed there.
"""

import contextlib
import hashlib
import importlib.util
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from modjax.bucket import shown, url
from modjax.data.codecs.tokenizer import MOST_CONTENT
from modjax.data.manifest import SPLITS, Manifest, Split
from modjax.data.prepare.corpus import (
    CORPORA,
    CacheRequest,
    Corpus,
    check_corpus,
    load_tasks,
    sha256,
)
from modjax.data.prepare.replace import begin, locked, put_in_place, tidy
from modjax.data.prepare.upload import check_writable, upload
from modjax.data.prepare.writer import Written, has_tokens, read_journal, write_journal, write_split
from modjax.data.progress import say
from modjax.data.token_cache import cache_dir, open_cache, read_manifest
from modjax.data.vocabulary import (
    TRAINING_BYTES,
    file_of,
    parse_tokenizer,
    parse_vocab,
    train_sentencepiece,
)
from modjax.errors import InputError, require
from modjax.files import is_disk_full, read_file, user_cache, write_atomically
from modjax.specs import DataConfig

Report = Callable[[str], None]  # shows the progress


def prepare(
    *,
    name: str | None = None,
    text_files: Sequence[Path] = (),
    tfds_name: str | None = None,
    vocab: str | None = None,
    tokenizer: Path | str | None = None,
    data_dir: Path | str,
    force: bool = False,
) -> Path | str:
    """Makes the token cache of a corpus, unless it exists, and returns its folder.

    The corpus is the user's files, or a TFDS data set, or the corpus called `name`: stdlib (the
    default), c4 or lm1b. For files or a data set, `name` names the result.

    vocab: "bytes" (the default), "sentencepiece:SIZE" (trained on the corpus) or the path of a
        SentencePiece model.
    tokenizer: the tokenizer of a pretrained model instead: its folder, a tokenizer.json or a GGUF
        file. The vocabulary is then called NAME.json, by the name of the folder or file.
    data_dir: a local folder, or a URL that tensorstore can write, such as gs://bucket/folder or
        s3://bucket/folder.
    force: makes the cache anew, replacing an existing one.

    Raises InputError, before anything is written, for input that cannot be used. Raises it for a
    full disk too; running this again then resumes.
    """
    _check_packages()
    accepted = "cannot be combined with --tokenizer"
    require(vocab is None or tokenizer is None, "--vocab", vocab, accepted)
    if tokenizer is not None:
        vocabulary = parse_tokenizer(tokenizer)
    else:
        vocabulary = parse_vocab("bytes" if vocab is None else vocab)
    corpus = check_corpus(name, [Path(file) for file in text_files], tfds_name)
    request = CacheRequest(corpus, vocabulary)
    final = cache_dir(Path(data_dir), DataConfig(name=corpus.name, vocab=vocabulary.name))
    exists = read_manifest(final) is not None and not force
    if exists:
        _check_same(final, request)
    remote = url(final)
    if remote is not None:
        _make_remote(remote, final.name, request, exists)
        return remote
    if exists:
        with contextlib.suppress(InputError), locked(final):
            tidy(final)
    else:
        _make(final, request)
    return final


def _check_packages() -> None:
    needed = ("seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text", "sentencepiece")
    missing = ", ".join(name for name in needed if importlib.util.find_spec(name) is None)
    remedy = "missing packages; pip install -e '.[data]'"
    require(not missing, "modjax data prepare", missing, remedy)


def _check_same(final: Path, request: CacheRequest) -> None:
    """Raises InputError unless the cache `final` is whole and was made from the requested input."""
    cache = open_cache(final)
    made_from, name = cache.manifest.source, request.corpus.name
    if made_from != request.source:
        other = f"prepared from other input ({made_from})"
        if name in CORPORA:  # no other --name is possible
            remedy = "replace it with --force, or choose another --data-dir"
            accepted = f"holds {final.name}, {other}; {remedy}"
            raise InputError("--data-dir", shown(final.parent), accepted)
        remedy = "choose another --name, or replace it with --force"
        raise InputError("--name", name, f"{shown(final)} was {other}; {remedy}")
    cache.vocabulary()  # raises InputError if it is damaged


def _make_remote(remote: str, name: str, request: CacheRequest, exists: bool) -> None:
    """Makes the cache in the user's cache folder, then moves it to the URL `remote`.

    Does nothing if the remote cache exists, unless an earlier upload of it was stopped.
    """
    here = user_cache("upload") / sha256(remote.encode())[:16] / name
    try:
        made = open_cache(here).manifest.source == request.source
    except InputError:
        made = False
    if exists and not made:
        return
    check_writable(remote)
    if not made:
        _make(here, request)
    with locked(here), _reporting(name) as report:
        upload(here, remote, report)
        shutil.rmtree(here.parent)


def _make(final: Path, request: CacheRequest) -> None:
    """Makes the cache in the local folder `final`, replacing an existing one."""
    if request.corpus.tfds_name is not None:
        load_tasks().download(request.corpus.tfds_name)
    partial = final.with_name(f".{final.name}.partial")
    where = str(final.parent)
    try:
        final.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--data-dir", where, f"cannot be made: {error.strerror}") from error
    with locked(final), _reporting(final.name) as report:
        begin(partial, final)
        try:
            with _full_disk_as_input_error(where):
                _fill(partial, request, report)
        except InputError:
            if not has_tokens(partial):
                shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # it is not empty if it holds an older cache
                final.rmdir()
            raise
        put_in_place(partial, final)


@contextlib.contextmanager
def _full_disk_as_input_error(where: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if isinstance(error, InputError) or not is_disk_full(error):
            raise
        remedy = "no space left on the disk; nothing is lost: free some and run this again"
        raise InputError("--data-dir", where, remedy) from error


def _fill(partial: Path, request: CacheRequest, report: Report) -> None:
    """Completes the cache in the folder `partial`, writing the manifest last."""
    vocab, name = request.vocab, file_of(request.vocab.name)
    path = partial / name if name is not None else None
    content = read_file(path, MOST_CONTENT) if path is not None and path.exists() else b""
    written = read_journal(partial, request.inputs(content))
    if path is not None and not path.exists():  # the journal was of other input
        content = b""
    report("loading TensorFlow")
    tasks = load_tasks()
    scratch = partial / "scratch"
    scratch.mkdir(exist_ok=True)  # read_journal may have removed it
    report("reading the text")
    source = _open_source(tasks, request.corpus, scratch)
    if path is not None and not content:
        report(f"making the vocabulary {vocab.name}")
        content = vocab.content or _train_vocabulary(tasks, source, request)
        write_atomically(path, content)
    vocabulary = tasks.make_vocabulary(vocab, content, scratch)
    dtype = np.dtype(np.uint16 if vocabulary.vocab_size <= 2**16 else np.uint32)

    inputs = request.inputs(content)
    write_journal(partial, inputs, written)
    for split in SPLITS:
        start = written[split]
        if start.done:
            continue
        batches = tasks.tokenized(source, vocabulary, split, skip=start.documents)
        total = source.num_input_examples(split)
        documents = _counted(batches, split, start.documents, total, report)
        for now in write_split(partial / split, documents, dtype, start):
            written[split] = now
            write_journal(partial, inputs, written)
        has_text = written[split].bytes > 0
        require(has_text, "data", request.corpus.name, f"its {split} split has no text")
    shutil.rmtree(scratch)
    manifest = _manifest(request, content, vocabulary, written)
    write_atomically(partial / "manifest.json", manifest.to_json())


def _open_source(tasks: Any, corpus: Corpus, scratch: Path) -> Any:
    """Returns the seqio data source of a corpus. TFDS builds the standard library in `scratch`."""
    if corpus.scan is not None:
        return tasks.TextSource(corpus.files, corpus.scan)
    if corpus.tfds_name is not None:
        return tasks.tfds_source(corpus.tfds_name)
    source = tasks.stdlib_source(scratch / "tfds")
    now = check_corpus(corpus.name, [], None).source
    require(now == corpus.source, "data", corpus.name, "changed while it was read; run again")
    return source


def _train_vocabulary(tasks: Any, source: Any, request: CacheRequest) -> bytes:
    """Returns a SentencePiece model trained on the corpus."""
    assert request.vocab.size is not None
    scan = request.corpus.scan
    # A TFDS data set is in random order, so its beginning will do; files are sampled evenly.
    every = 1 if scan is None else max(1, scan.bytes // TRAINING_BYTES)
    texts = tasks.texts(source, every)
    model = train_sentencepiece(texts, request.vocab.size)
    if scan is not None:
        for _ in texts:  # read on: only the end tells whether a file has changed
            pass
    return model


def _counted(
    batches: Iterator[Any], split: str, done: int, total: int, report: Report
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields the tokens and the bytes of text of each document, and reports progress.

    done, total: numbers of documents, for the report.
    """
    for batch in batches:
        yield from zip(batch.tokens, batch.bytes, strict=True)
        done += len(batch.tokens)
        report(f"{split}: {done:,} of {total:,} documents")


def _manifest(
    request: CacheRequest, content: bytes, vocabulary: Any, written: dict[str, Written]
) -> Manifest:
    fingerprint = hashlib.sha256(content)
    for split in SPLITS:
        fingerprint.update(f"{split} {written[split].tokens} {written[split].digest}".encode())
    return Manifest(
        name=request.corpus.name,
        vocab=request.vocab.name,
        vocab_size=vocabulary.vocab_size,
        eos_id=vocabulary.eos_id,
        source=request.source,
        fingerprint=fingerprint.hexdigest(),
        splits={s: Split(w.documents, w.tokens, w.bytes) for s, w in written.items()},
        vocab_sha256=sha256(content) if content else None,
    )


@contextlib.contextmanager
def _reporting(what: str) -> Iterator[Report]:
    """Yields a function that shows progress, preceded by `what`, on stderr.

    It updates one line on a terminal, else prints a line now and then.
    """
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{what}: starting") as status:
            yield lambda text: status.update(f"{what}: {text}")
        return
    said = -math.inf

    def report(text: str) -> None:
        nonlocal said
        said = say(said, f"{what}: {text}")

    yield report
