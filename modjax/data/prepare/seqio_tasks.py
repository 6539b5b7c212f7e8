"""seqio data sources of text, and the seqio tasks that turn it into tokens.

Importing this module registers the tasks modjax_stdlib, modjax_c4 and modjax_lm1b (as bytes) with
seqio. It loads TensorFlow, which takes about ten seconds; training never does.
"""

import contextlib
import hashlib
import itertools
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modjax.data.codecs.codec import Bytes
from modjax.data.codecs.tokenizer import Tokenizer
from modjax.data.manifest import SPLITS
from modjax.data.prepare.documents import TextScan, scanned_documents
from modjax.data.vocabulary import Vocab, make_codec, stderr_into
from modjax.errors import InputError, describe, require


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Discards stderr: some C++ code logs its start and has no option against it."""
    with open(os.devnull, "w", encoding="utf-8") as nowhere, stderr_into(nowhere.fileno()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield


os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
with _silent():
    import absl.logging
    import seqio
    import tensorflow as tf
    import tensorflow_datasets as tfds

    import modjax.data.prepare.builders.stdlib  # noqa: F401  registers the data set with TFDS

    tf.config.set_visible_devices([], "GPU")

absl.logging.set_verbosity(absl.logging.ERROR)
logging.getLogger("urllib3").setLevel(logging.ERROR)

DOCUMENTS_AT_ONCE = 64
STDLIB = "stdlib:1.0.0"
C4 = "c4/en:3.1.0"
LM1B = "lm1b:1.1.0"


class Tokenized(NamedTuple):
    """A batch of documents.

    tokens: one array per document, each ending in eos.
    bytes: size of each text in UTF-8.
    """

    tokens: list[np.ndarray]
    bytes: np.ndarray


class TextSource(seqio.FunctionDataSource):
    """Data source of the user's files, split by `scan`.

    failure: the error that ended the reading; TensorFlow keeps only its text.
    """

    def __init__(self, files: Sequence[Path], scan: TextScan):
        self.failure: Exception | None = None

        def dataset(split: str, shuffle_files: bool, seed: int | None = None) -> tf.data.Dataset:
            del shuffle_files, seed

            def documents() -> Iterator[dict[str, str]]:
                try:
                    for document in scanned_documents(files, scan):
                        if scan.split(document.text) == split:
                            yield document._asdict()
                except Exception as error:
                    self.failure = error
                    raise

            scalar = tf.TensorSpec((), tf.string)
            return tf.data.Dataset.from_generator(
                documents, output_signature={"id": scalar, "text": scalar}
            )

        super().__init__(dataset, SPLITS, num_input_examples=scan.documents)


def stdlib_source(tfds_dir: Path | None = None) -> seqio.DataSource:
    """Returns the standard library, built in `tfds_dir`; by default read from TFDS's own folder."""
    if tfds_dir is not None:
        tfds.disable_progress_bar()
        with contextlib.redirect_stdout(None):
            tfds.builder(STDLIB, data_dir=tfds_dir).download_and_prepare()
        return seqio.TfdsDataSource(STDLIB, tfds_data_dir=os.fspath(tfds_dir), splits=SPLITS)
    return seqio.TfdsDataSource(STDLIB, splits=SPLITS)


def resolve_tfds(name: str) -> str:
    """Returns the full name, with configuration and version, of a TFDS data set of text.

    Raises InputError if no data set has this name, or if it has no "text" feature.
    """
    try:
        info = tfds.builder(name).info
    except Exception as error:  # TFDS raises many kinds
        accepted = f"must be a data set that TFDS knows: {describe(error)}"
        raise InputError("--tfds", name, accepted) from error
    features = info.features
    has_text = (
        isinstance(features, tfds.features.FeaturesDict)
        and "text" in features
        and features["text"].dtype == tf.string
    )
    require(has_text, "--tfds", name, 'must have a feature named "text" that holds a string')
    dataset, _, version = info.full_name.rpartition("/")
    return f"{dataset}:{version}"


def download(name: str) -> None:
    """Downloads a TFDS data set by its full name, unless it exists, with TFDS's progress bars.

    Raises InputError if it cannot be downloaded or made.
    """
    if not sys.stderr.isatty():
        tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(sys.stderr):
            tfds.builder(name).download_and_prepare()
    except Exception as error:  # anything from a lost connection to a missing Beam runner
        accepted = f"could not be downloaded: {describe(error)}"
        raise InputError("--tfds", name, accepted) from error


def tfds_source(name: str) -> seqio.DataSource:
    """Returns a TFDS data set by its full name.

    Its validation split is its own, else its test split, else the first 5% of train.
    """
    found = tfds.builder(name).info.splits
    held_out = next((split for split in ("validation", "test") if split in found), None)
    splits = {"train": "train", "validation": held_out}
    if held_out is None:
        splits = {"train": "train[5%:]", "validation": "train[:5%]"}
    return seqio.TfdsDataSource(name, splits=splits)


class TokenizerVocabulary(seqio.Vocabulary):
    """seqio's view of a tokenizer.json. `encode_tf` takes a batch of texts."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        super().__init__()

    @property
    def eos_id(self) -> int:
        return self.tokenizer.eos_ids[0]

    @property
    def unk_id(self) -> int | None:
        return None

    @property
    def _base_vocab_size(self) -> int:
        return self.tokenizer.text_size

    def _encode(self, s: str) -> Sequence[int]:
        return self.tokenizer.encode(s, "text")

    def _decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def _encode_tf(self, s: Any) -> Any:
        def encode(texts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            decoded = [text.decode(errors="replace") for text in texts]
            rows = [np.array(ids, np.int32) for ids in self.tokenizer.encode_batch(decoded)]
            return np.concatenate(rows), np.array([len(row) for row in rows], np.int64)

        flat, lengths = tf.numpy_function(encode, [s], (tf.int32, tf.int64))
        flat, lengths = tf.ensure_shape(flat, [None]), tf.ensure_shape(lengths, [None])
        return tf.RaggedTensor.from_row_lengths(flat, lengths)  # type: ignore[attr-defined]

    def _decode_tf(self, ids: Any) -> Any:
        return tf.numpy_function(lambda ids: self._decode(ids.tolist()), [ids], tf.string)

    def __eq__(self, other: object) -> bool:
        same = isinstance(other, TokenizerVocabulary)
        return same and other.tokenizer.content == self.tokenizer.content


def make_vocabulary(vocab: Vocab, content: bytes, folder: Path) -> seqio.Vocabulary:
    """Returns the requested vocabulary.

    content: its file, or b"" for bytes.
    folder: where a SentencePiece model is written, since seqio reads a file.
    """
    codec = make_codec(vocab.name, content, vocab.eos_id, vocab.name)
    if isinstance(codec, Bytes):
        return seqio.ByteVocabulary()
    if isinstance(codec, Tokenizer):
        return TokenizerVocabulary(codec)
    # seqio caches models by their path for the life of the process.
    path = folder / f"{hashlib.sha256(content).hexdigest()}.model"
    path.write_bytes(content)
    return seqio.SentencePieceVocabulary(os.fspath(path))


def _tokenize_batches(dataset: Any, output_features: Mapping[str, Any]) -> Any:
    """Tokenises as `seqio.preprocessors.tokenize` does, but many documents at once."""
    vocabulary = output_features["targets"].vocabulary

    def tokenize(batch: dict[str, Any]) -> dict[str, Any]:
        text = batch["targets"]
        return {"targets": vocabulary.encode_tf(text), "targets_pretokenized": text}

    return dataset.batch(DOCUMENTS_AT_ONCE).map(tokenize).unbatch()


def make_task(
    name: str, source: seqio.DataSource, vocabulary: seqio.Vocabulary, skip: int = 0
) -> seqio.Task:
    """Returns the task that tokenises "text" into "targets", after the first `skip` documents."""
    in_batches = isinstance(vocabulary, TokenizerVocabulary)
    return seqio.Task(
        name,
        source=source,
        preprocessors=[
            lambda dataset: dataset.skip(skip),
            seqio.map_over_dataset(lambda example: {"targets": example["text"]}),
            _tokenize_batches if in_batches else seqio.preprocessors.tokenize,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(vocabulary, add_eos=True)},
    )


def tokenized(
    source: seqio.DataSource, vocabulary: seqio.Vocabulary, split: str, skip: int
) -> Iterator[Tokenized]:
    """Yields the documents of a split in a fixed order, in batches, after the first `skip`."""
    task = make_task("modjax", source, vocabulary, skip)
    dataset = task.get_dataset(None, split, shuffle=False, try_in_mem_cache=False)
    dataset = dataset.map(
        lambda example: (
            example["targets"],
            tf.strings.length(example["targets_pretokenized"], unit="BYTE"),
        )
    )
    batches = iter(dataset.ragged_batch(DOCUMENTS_AT_ONCE))
    with _failures_of(source):
        with _silent():
            first = list(itertools.islice(batches, 1))
        for tokens, size in itertools.chain(first, batches):
            ends = tokens.row_splits.numpy()[1:-1]
            yield Tokenized(np.split(tokens.flat_values.numpy(), ends), size.numpy())


def texts(source: seqio.DataSource, every: int) -> Iterator[str]:
    """Yields the text of each `every`-th training document."""
    dataset = source.get_dataset("train", shuffle=False).shard(every, 0)
    with _failures_of(source):
        for text in dataset.map(lambda example: example["text"]).as_numpy_iterator():
            yield text.decode()


@contextlib.contextmanager
def _failures_of(source: seqio.DataSource) -> Iterator[None]:
    """Raises the error that ended the reading of the user's files instead of TensorFlow's."""
    try:
        yield
    except tf.errors.OpError as error:
        raise getattr(source, "failure", None) or error from None


for _name, _source in {
    "modjax_stdlib": stdlib_source(),
    "modjax_c4": seqio.TfdsDataSource(C4, splits=SPLITS),
    "modjax_lm1b": seqio.TfdsDataSource(LM1B, splits={"train": "train", "validation": "test"}),
}.items():
    seqio.TaskRegistry.add_provider(_name, make_task(_name, _source, seqio.ByteVocabulary()))
