"""Logits of models read from GGUF files, against transformers with the tensors that were written.

Legend: B batch, L positions.
"""

import jax
import numpy as np
import pytest
from flax import nnx

pytest.importorskip("gguf")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
from modjax import from_pretrained  # noqa: E402
from tests.pretrained.models import small_gguf as written  # noqa: E402

# An olmoe of transformers cannot have heads of a width of their own, as these models have.
CASES = [(family, {}, False) for family in written.FAMILIES if family != "olmoe"] + [
    ("llama", written.LINEAR, False),
    ("llama", written.YARN, False),
    ("gemma3_text", written.LINEAR, False),
    ("llama", {}, True),
]


@pytest.mark.parametrize(("family", "more", "scaled"), CASES)
def test_logits_of_a_gguf_file_equal_those_of_transformers(family, more, scaled, tmp_path):
    from safetensors.numpy import save_file

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    arch, keys, _ = written.FAMILIES[family]
    tensors = written.drawn(family)
    for tensor in tensors.values():
        tensor *= tensor.shape[-1] ** -0.5 if tensor.ndim > 1 else 1
    stored = written.converted(family, tensors)
    if scaled:
        stored["rope_freqs.weight"] = written.llama3_divisors(32.0, 8192)
    written.write(tmp_path / "model.gguf", arch, written.KEYS | keys | more, stored)
    found = from_pretrained(tmp_path / "model.gguf")

    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    special = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    transformers.AutoConfig.for_model(**found.config | special).save_pretrained(tmp_path)
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(tmp_path, attn_implementation="eager", dtype=torch.float32)
    tokens_BL = np.random.default_rng(1).integers(0, written.V, (2, 40))  # longer than windows
    with torch.no_grad():
        expected = model.eval()(torch.tensor(tokens_BL)).logits.numpy()

    ours = nnx.merge(found.graphdef, found.weights)
    with jax.numpy_rank_promotion("allow"):  # the biases and norms of heads need it
        features, _ = ours.features(tokens_BL)
        np.testing.assert_allclose(ours.head(features), expected, atol=2e-5, rtol=0)
