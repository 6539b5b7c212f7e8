"""Pretrained models equal a plain numpy decoder that reads the same files, without torch."""

import json

import jax
import numpy as np
import pytest
from flax import nnx

import modjax
from tests.nn.small import QUICK
from tests.pretrained.models.cases import CASES
from tests.pretrained.models.numpy_decoder import decode
from tests.pretrained.models.small_models import FAMILIES, Case, tokens, write

pytest.importorskip("safetensors", reason="the extra `pretrained`")

SWITCHES = (
    "llama, biases",
    "llama, one key head per head",
    "llama, linear, old",
    "llama, llama3, old",
    "llama, yarn with all fields, old",
    "qwen2, windows, old",
    "gemma3_text, linear, old",
    "gemma3, nested",
    "smollm3, windows, biases",
    "phi3, half turned",
    "phi3, longrope, long, old",
    "olmoe, clipped",
    "qwen3_moe, not renormalised",
    "qwen3_moe, windows, old",
)


@pytest.mark.parametrize("name", (*FAMILIES, *SWITCHES))
def test_logits_equal_those_of_numpy(name, tmp_path):
    case = CASES[name]
    tensors, tokens_BL = write(tmp_path, case), tokens(case)
    found = modjax.from_pretrained(tmp_path)

    def logits(weights):
        return nnx.merge(found.graphdef, weights)(tokens_BL)[0]

    logits_BLV = jax.jit(logits, compiler_options=QUICK)(found.weights)
    config = json.loads((tmp_path / "config.json").read_text())
    expected_BLV = decode(config, tensors, tokens_BL)
    assert 0.8 < np.std(expected_BLV) < 1.3
    np.testing.assert_allclose(logits_BLV, expected_BLV, rtol=0, atol=2e-5)


def test_a_field_that_is_null_says_none_and_an_absent_one_the_default(tmp_path):
    """Holds for Mistral's window, which is longer than the sequences of the other tests."""
    write(tmp_path, Case("mistral", {"sliding_window": None}))
    assert "Window" not in str(modjax.from_pretrained(tmp_path).spec)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["sliding_window"]
    path.write_text(json.dumps(config))
    assert "Window(size=4096)" in str(modjax.from_pretrained(tmp_path).spec)
