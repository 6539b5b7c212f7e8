"""Preparing a token cache: resumable, and usable as a whole or not there at all.

Everything is written into a hidden sibling of the cache, `.NAME-VOCAB.partial`, and put in place at
the end. A run that was killed goes on behind its last full shard and ends in the same cache.
A cache for an object store is made in the user's cache folder first, and removed there once it is
uploaded.
"""

import contextlib
import hashlib
import importlib.util
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from modjax.data.cache import cache_dir, open_cache, read_manifest, shown, url
from modjax.data.manifest import SPLITS, Manifest, Split
from modjax.data.prepare.corpus import CORPORA, Corpus, check_corpus, load_tasks, sha256
from modjax.data.prepare.place import begin, locked, put_in_place, tidy
from modjax.data.prepare.upload import check_writable, upload
from modjax.data.prepare.writer import Written, has_tokens, read_journal, write_journal, write_split
from modjax.data.vocabulary import (
    MOST_MODEL,
    TRAINING_BYTES,
    Vocab,
    parse_vocab,
    train_sentencepiece,
)
from modjax.errors import InputError, require
from modjax.files import is_disk_full, read_file, user_cache, write_atomically
from modjax.specs import DataConfig

SECONDS_BETWEEN_LINES = 10.0  # of progress, where there is no terminal


def prepare(
    *,
    name: str | None = None,
    text_files: Sequence[Path] = (),
    tfds_name: str | None = None,
    vocab: str = "bytes",
    data_dir: Path | str,
    force: bool = False,
) -> Path | str:
    """Makes the token cache of a corpus, unless it is there already, and returns its folder.

    The corpus is the user's files, or a TFDS data set, or else the one called `name`: stdlib (the
    default), c4 or lm1b. With files or a data set, `name` is what to call the result.
    vocab: "bytes", "sentencepiece:SIZE" (trained on the corpus) or the path of a SentencePiece
    model. data_dir: a local folder, or a URL that tensorstore can write, such as gs://bucket/folder
    or s3://bucket/folder. force: makes it anew, replacing what is there.

    Raises InputError, before anything is written, for input that cannot be used, and for a full
    disk, where running it again goes on.
    """
    _check_packages()
    wanted = parse_vocab(vocab)
    corpus = check_corpus(name, [Path(file) for file in text_files], tfds_name)
    source = corpus.source
    if wanted.model is not None:
        source += f"; {wanted.name} sha256 {sha256(wanted.model)}"
    final = cache_dir(Path(data_dir), DataConfig(name=corpus.name, vocab=wanted.name))
    bucket = url(final)
    there = read_manifest(final) is not None and not force
    if there:
        cache = open_cache(final)
        _check_same(cache.manifest.source, source, corpus, final)
        if cache.manifest.vocab != "bytes":
            cache.vocabulary_model()  # refuses a damaged one
    if bucket is None:
        if there:
            with contextlib.suppress(InputError), locked(final):
                tidy(final)
        else:
            _make(final, corpus, wanted, source)
        return final
    here = user_cache("upload") / sha256(bucket.encode())[:16] / final.name
    made = _was_made(here, source)
    if there and not made:
        return bucket
    check_writable(bucket)
    if not made:
        _make(here, corpus, wanted, source)
    with locked(here), _reporting(final.name) as report:
        upload(here, bucket, report)
        shutil.rmtree(here.parent)
    return bucket


def _was_made(folder: Path, source: str) -> bool:
    """Returns whether an earlier run made the cache in `folder` and did not upload all of it."""
    try:
        return open_cache(folder).manifest.source == source
    except InputError:
        return False


def _make(final: Path, corpus: Corpus, wanted: Vocab, source: str) -> None:
    """Makes the cache in the local folder `final`, replacing what is there."""
    if corpus.tfds_name is not None:
        load_tasks().download(corpus.tfds_name)
    partial = final.with_name(f".{final.name}.partial")
    where = str(final.parent)
    try:
        final.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("--data-dir", where, f"cannot be made: {error.strerror}") from error
    with locked(final), _reporting(final.name) as report:
        begin(partial, final)
        try:
            _fill(partial, corpus, wanted, source, report)
        except Exception as error:
            if not isinstance(error, InputError) and not is_disk_full(error):
                raise
            if not has_tokens(partial):
                shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # where it holds the cache that was to be replaced
                final.rmdir()
            if isinstance(error, InputError):
                raise
            raise InputError(
                "--data-dir",
                where,
                "no space left on the disk; nothing is lost: free some and run this again",
            ) from error
        put_in_place(partial, final)


def _check_packages() -> None:
    needed = ("seqio", "tensorflow", "tensorflow_datasets", "tensorflow_text", "sentencepiece")
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    require(
        not missing,
        "modjax data prepare",
        ", ".join(missing),
        "missing packages; pip install -e '.[data]'",
    )


def _check_same(made_from: str, source: str, corpus: Corpus, final: Path) -> None:
    where, other = shown(final), f"prepared from other input ({made_from})"
    if corpus.name in CORPORA:
        require(
            made_from == source,
            "--data-dir",
            shown(final.parent),
            f"holds {final.name}, {other}; replace it with --force, or choose another --data-dir",
        )
    require(
        made_from == source,
        "--name",
        corpus.name,
        f"{where} was {other}; choose another --name, or replace it with --force",
    )


def _fill(
    partial: Path, corpus: Corpus, wanted: Vocab, source_name: str, report: Callable[[str], None]
) -> None:
    """Brings `partial` to a whole cache, manifest last."""
    made = partial / "vocabulary.model"
    state = corpus.scan.state if corpus.scan is not None else ""

    def request() -> str:
        """Names all that the tokens depend on: a later run goes on only where that is the same."""
        return f"{source_name}; files {state}; vocabulary {sha256(model)}"

    model = read_file(made, MOST_MODEL) if made.exists() else b""
    written = read_journal(partial, request())
    if not made.exists():  # it was for other input
        model = b""
    write_journal(partial, request(), written)
    report("loading TensorFlow")
    tasks = load_tasks()
    scratch = partial / "scratch"
    scratch.mkdir(exist_ok=True)  # gone where the journal was of other input
    report("reading the text")
    if corpus.scan is not None:
        source = tasks.TextSource(corpus.files, corpus.scan)
    elif corpus.tfds_name is not None:
        source = tasks.tfds_source(corpus.tfds_name)
    else:
        source = tasks.stdlib_source(scratch / "tfds")
        now = check_corpus(corpus.name, [], None).source
        require(now == corpus.source, "data", corpus.name, "changed while it was read; run again")

    if wanted.name != "bytes" and not model:
        report(f"making the vocabulary {wanted.name}")
        model = _model(tasks, source, wanted, corpus)
        write_atomically(made, model)
        write_journal(partial, request(), written)
    vocabulary = tasks.make_vocabulary(model, scratch)
    dtype = np.dtype(np.uint16 if vocabulary.vocab_size <= 2**16 else np.uint32)

    for split in SPLITS:
        if written[split].done:
            continue

        def save(now: Written, split: str = split) -> None:
            written[split] = now
            write_journal(partial, request(), written)

        start = written[split]
        task = tasks.make_task("modjax", source, vocabulary, skip=start.documents)
        total = source.num_input_examples(split)
        documents = _counted(tasks.tokenized(task, split), split, start.documents, total, report)
        save(write_split(partial / split, documents, dtype, start, save))
        require(written[split].bytes > 0, "data", corpus.name, f"its {split} split has no text")

    shutil.rmtree(scratch)
    fingerprint = hashlib.sha256(model)
    for split in SPLITS:
        fingerprint.update(f"{split} {written[split].tokens} {written[split].digest}".encode())
    manifest = Manifest(
        name=corpus.name,
        vocab=wanted.name,
        vocab_size=vocabulary.vocab_size,
        eos_id=vocabulary.eos_id,
        source=source_name,
        fingerprint=fingerprint.hexdigest(),
        splits={s: Split(w.documents, w.tokens, w.bytes) for s, w in written.items()},
        vocab_sha256=sha256(model) if model else None,
    )
    write_atomically(partial / "manifest.json", manifest.to_json())


def _model(tasks: Any, source: Any, wanted: Vocab, corpus: Corpus) -> bytes:
    """Returns the SentencePiece model that is given, or else trained on the corpus."""
    if wanted.model is not None:
        return wanted.model
    assert wanted.size is not None
    # A TFDS data set is in random order, so its beginning will do; files are sampled evenly.
    every = 1 if corpus.scan is None else max(1, corpus.scan.bytes // TRAINING_BYTES)
    texts = tasks.texts(source, every)
    model = train_sentencepiece(texts, wanted.size)
    if corpus.scan is not None:
        for _ in texts:  # read on, since only the end tells whether a file has changed
            pass
    return model


def _counted(
    batches: Iterator[Any], split: str, done: int, total: int, report: Callable[[str], None]
) -> Iterator[tuple[np.ndarray, int]]:
    """Yields documents one by one, and reports how many there have been."""
    for batch in batches:
        yield from zip(batch.tokens, batch.bytes, strict=True)
        done += len(batch.tokens)
        report(f"{split}: {done:,} of {total:,} documents")


@contextlib.contextmanager
def _reporting(what: str) -> Iterator[Callable[[str], None]]:
    """Shows one live line of progress on a terminal; prints a line now and then elsewhere."""
    console = Console(stderr=True)
    if console.is_terminal:
        with console.status(f"{what}: starting") as status:
            yield lambda text: status.update(f"{what}: {text}")
        return
    last = -SECONDS_BETWEEN_LINES

    def report(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= SECONDS_BETWEEN_LINES:
            last = time.monotonic()
            print(f"modjax: {what}: {text}", file=sys.stderr, flush=True)

    yield report
