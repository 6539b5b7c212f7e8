"""A family that modjax does not know, registered from outside."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from modjax import InputError, ModelSpec, Tied, Transformer, from_pretrained, save_pretrained
from modjax.pretrained import FAMILIES, Family, register
from modjax.pretrained.families import LLAMA

OWN = Family(
    "own",
    "OwnForCausalLM",
    LLAMA.fields,
    names={"embed.table": "wte.weight", "mlp.w_in": "ff.in.weight"},
    layer_prefix="blocks.",
)


@pytest.fixture
def registered():
    register(OWN)
    yield
    del FAMILIES["own"]


def test_a_family_from_outside_is_written_and_read(registered, tmp_path):
    spec = ModelSpec(40, 16, 2, 2, 1, 24, layers="Dense('swiglu')", head=Tied(), norm_eps=1e-5)
    graphdef, state = nnx.split(Transformer(spec, rngs=nnx.Rngs(0)))
    weights = nnx.to_pure_dict(state)
    save_pretrained(tmp_path / "own", spec, weights, config={"model_type": "own"})
    tensors = load_file(tmp_path / "own" / "model.safetensors")
    assert {"wte.weight", "blocks.1.ff.in.weight", "model.norm.weight"} <= tensors.keys()
    np.testing.assert_array_equal(tensors["wte.weight"], weights["embed"]["table"])
    back = from_pretrained(tmp_path / "own")
    tokens = np.arange(12).reshape(2, 6)
    logits = jax.jit(lambda weights: nnx.merge(graphdef, weights)(tokens)[0])
    np.testing.assert_array_equal(logits(weights), logits(back.weights))
    assert back.spec.blocks() == spec.blocks()


def test_without_it_the_family_is_unknown_and_a_name_is_given_once(registered, tmp_path):
    register(OWN)  # the same again
    with pytest.raises(InputError, match="'llama': is a family already"):
        register(Family("llama", "Other", {}))
    del FAMILIES["own"]
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "own"}))
    with pytest.raises(
        InputError, match="model_type = 'own': unknown family; must be one of llama"
    ):
        from_pretrained(tmp_path)
    register(OWN)
