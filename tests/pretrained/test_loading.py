"""Loading takes little memory beside the model, and changes no number."""

import json
import subprocess
import sys

import numpy as np
import pytest

import modjax
from tests.pretrained.models.small_models import FAMILIES, SMALL, Case, drawn, shapes, write

pytest.importorskip("safetensors", reason="the extra `pretrained`")

SHARDS = 4
CHILD = """
import sys, resource, jax, modjax
modjax.from_pretrained  # what importing takes is no part of loading
jax.block_until_ready(jax.numpy.zeros(3) + 1)
def kilobytes(field):
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith(field))
small = modjax.from_pretrained(sys.argv[1], dtype="bfloat16")  # libraries that are imported late
before = kilobytes("VmRSS")
found = modjax.from_pretrained(sys.argv[2], dtype="bfloat16")
jax.block_until_ready(found.weights)
peak = kilobytes("VmHWM")
held = sum(leaf.nbytes for leaf in jax.tree.leaves(found.weights))
print((peak - before) * 1024, held)
"""


def write_large(folder, config):
    """Writes a random model in bfloat16, in shards."""
    import ml_dtypes
    from safetensors.numpy import save_file

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    rng, index = np.random.default_rng(0), {}
    names = sorted(shapes(config))
    for number in range(SHARDS):
        part = {
            name: drawn(name, shapes(config)[name], "llama", rng).astype(ml_dtypes.bfloat16)
            for name in names[number::SHARDS]
        }
        file = f"model-{number + 1:05}-of-{SHARDS:05}.safetensors"
        save_file(part, folder / file, {"format": "pt"})
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_read_is_written_with_equal_bytes(family, dtype, tmp_path):
    from safetensors.numpy import load_file

    (tmp_path / "in").mkdir()
    tensors = write(tmp_path / "in", Case(family, dtype=dtype))
    found = modjax.from_pretrained(tmp_path / "in")
    assert found.spec.dtype == dtype
    modjax.save_pretrained(tmp_path / "out", found.spec, found.weights, config=found.config)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert written[name].dtype == tensor.dtype
        np.testing.assert_array_equal(written[name], tensor, err_msg=name)


@pytest.mark.slow
def test_the_peak_of_memory_is_little_more_than_the_model(tmp_path):
    small = SMALL | FAMILIES["llama"] | {"model_type": "llama", "dtype": "bfloat16"}
    large = small | {
        "vocab_size": 16_384,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 14,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 64,
    }
    write_large(tmp_path / "small", small)
    write_large(tmp_path / "large", large)
    command = [sys.executable, "-c", CHILD, str(tmp_path / "small"), str(tmp_path / "large")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, held = map(int, result.stdout.split())
    numbers = sum(int(np.prod(shape)) for shape in shapes(large).values())
    assert held == 2 * numbers > 350e6
    assert peak / held <= 1.3
