"""A damaged tokenizer.json is harmless or named in one line; it never crashes the process."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from tests.data.codecs.small import byte_level
from tests.data.codecs.test_tokenizer import like_sentencepiece, unigram

pytestmark = pytest.mark.slow

# In a process of its own: tokenizers is Rust.
USE = """
import sys
from pathlib import Path
from modjax.data.codecs.tokenizer import Settings, Tokenizer
from modjax.errors import InputError
for path in map(Path, sys.argv[1:]):
    try:
        found = Tokenizer(path.read_bytes(), str(path), Settings({"eos_token": "</s>"}))
        found.pieces(found.encode("the cat, \\u00fc \\u65e5", "--prompt"))
        found.prompt("<s> the cat", "--prompt")
        print("used")
    except InputError as error:
        assert "\\n" not in str(error)
        print("refused")
"""


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(min(len(content), 4000)))  # the structure lies before the tokens
    kind = rng.integers(4)
    if kind < 2:
        return content[:at] + bytes([content[at] ^ 1 << int(rng.integers(7))]) + content[at + 1 :]
    return (
        content[:at] + (b"" if kind == 2 else b"%d" % rng.integers(-5, 10**6)) + content[at + 1 :]
    )


def test_any_damage_of_a_tokenizer_is_refused_in_one_line_or_harmless(tmp_path, count):
    models = [make().to_str().encode() for make in (byte_level, like_sentencepiece, unigram)]
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.json" for i in range(1000)]
    for i, path in enumerate(paths):
        path.write_bytes(damaged(models[i % 3], rng))
    done = subprocess.run([sys.executable, "-c", USE, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = done.stdout.split()
    assert len(outcomes) == len(paths) and done.stderr == ""
    count("damaged tokenizers refused", outcomes.count("refused"))
    count("damaged tokenizers that still read", outcomes.count("used"))
