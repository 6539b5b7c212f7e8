"""Token caches made from arrays, so that most tests do not need TensorFlow."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from modjax.data.manifest import Manifest, Split
from modjax.data.prepare.writer import Written, write_split

EOS = 1


@pytest.fixture
def make_cache(tmp_path) -> Callable[..., Path]:
    """Writes a cache whose splits hold the given token arrays, and returns its folder."""

    def make(
        train, validation, name="toy", vocab_size=259, dtype=np.uint16, fingerprint="0" * 64
    ) -> Path:
        path = tmp_path / f"{name}-bytes"
        folder = path / fingerprint[:16]
        splits = {}
        for split, tokens in {"train": train, "validation": validation}.items():
            tokens = np.asarray(tokens, dtype)
            documents = max(1, int((tokens == EOS).sum()))
            (folder / split).mkdir(parents=True)
            list(write_split(folder / split, [(tokens, len(tokens))], np.dtype(dtype), Written()))
            splits[split] = Split(documents, len(tokens), max(1, len(tokens) - documents))
        manifest = Manifest(name, "bytes", vocab_size, EOS, "a test", fingerprint, splits)
        (path / "manifest.json").write_text(manifest.to_json())
        return path

    return make


@pytest.fixture(scope="module")
def tensorflow(tmp_path_factory):
    """The tensorflow module, loaded once per test file with a TFDS folder of its own."""
    kept = os.environ.get("TFDS_DATA_DIR")
    os.environ["TFDS_DATA_DIR"] = str(tmp_path_factory.mktemp("tfds"))
    import modjax.data.prepare.seqio_tasks

    yield modjax.data.prepare.seqio_tasks.tf
    os.environ.pop("TFDS_DATA_DIR")
    if kept is not None:
        os.environ["TFDS_DATA_DIR"] = kept


@pytest.fixture(scope="session")
def repository_corpora() -> Path:
    """The folder of English text that lies beside the repository on some machines."""
    path = Path(__file__).parents[2].parent / "shared" / "corpora"
    if not path.is_dir():
        pytest.skip("needs the English corpora in ../shared/corpora")
    return path
