"""8 fake devices, strict numerics, and a tiny real token cache that needs no TensorFlow."""

from pathlib import Path

import jax
import numpy as np
import pytest

from modjax.config import DataConfig
from modjax.data.cache import Manifest, Split, cache_dir
from modjax.data.writer import Written, write_split

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

# Modules of the standard library, as bytes shifted by 3; 1 ends a document.
SOURCES = {"train": ("argparse", "ast", "inspect"), "validation": ("enum", "typing")}
TINY_DATA = DataConfig(name="tiny")


@pytest.fixture(scope="session")
def tiny_data_dir(tmp_path_factory) -> Path:
    """A data folder that holds the corpus of TINY_DATA."""
    data_dir = tmp_path_factory.mktemp("data")
    folder = cache_dir(data_dir, TINY_DATA)
    splits = {}
    for split, modules in SOURCES.items():
        texts = [Path(__import__(module).__file__).read_bytes() for module in modules]
        documents = [
            (np.append(np.frombuffer(text, np.uint8).astype(np.uint16) + 3, 1), len(text))
            for text in texts
        ]
        (folder / split).mkdir(parents=True)
        written = write_split(
            folder / split, documents, np.dtype(np.uint16), Written(), lambda _: None
        )
        splits[split] = Split(written.documents, written.tokens, written.bytes)
    manifest = Manifest(
        name="tiny", vocab="bytes", vocab_size=259, eos_id=1, source="standard library",
        fingerprint="tiny-1", splits=splits,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return data_dir
