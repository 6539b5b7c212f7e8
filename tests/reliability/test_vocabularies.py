"""A damaged vocabulary is harmless or named in one line; it never crashes the process."""

import subprocess
import sys

import numpy as np
import pytest

from modjax.data.vocabulary import train_sentencepiece

pytestmark = pytest.mark.slow

LINES = [f"the cat sat on the mat {i}, and the hat fell  on\n\tthe cat ü\n" for i in range(40)]
# In a process of its own: SentencePiece is C++.
USE = """
import sys
from pathlib import Path
from modjax.data.codecs.codec import Pieces
from modjax.data.vocabulary import parse_vocab
from modjax.errors import InputError
for path in map(Path, sys.argv[1:]):
    for use in (lambda: parse_vocab(str(path)), lambda: Pieces(path.read_bytes(), str(path))):
        try:
            got = use()
            if isinstance(got, Pieces):
                got.pieces(got.encode("the cat, \\u00fc \\u65e5", "--prompt"))
            print("used")
        except InputError as error:
            assert "\\n" not in str(error)
            print("refused")
"""


def damaged(model: bytes, rng: np.random.Generator) -> bytes:
    at = int(rng.integers(len(model)))
    kind = rng.integers(3)
    if kind == 0:
        return model[:at] + bytes([model[at] ^ 1 << int(rng.integers(8))]) + model[at + 1 :]
    return model[:at] if kind == 1 else model[:at] + rng.bytes(8) + model[at + 8 :]


def test_any_damage_of_a_model_is_refused_in_one_line_or_harmless(tmp_path, count):
    model = train_sentencepiece(LINES, 300)
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.model" for i in range(1000)]
    for path in paths:
        path.write_bytes(damaged(model, rng))
    done = subprocess.run([sys.executable, "-c", USE, *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    outcomes = done.stdout.split()
    assert len(outcomes) == 2 * len(paths)
    count("damaged vocabularies refused", outcomes.count("refused"))
    count("damaged vocabularies that still read", outcomes.count("used"))
