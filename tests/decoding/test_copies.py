"""A step of decoding writes into its caches in place. Copying one costs more than the step."""

import re

import numpy as np
import pytest
from flax import nnx

import modjax
from modjax.decoding import generate
from modjax.specs import MLP, Attention, Causal, Dense, ModelSpec, MoE, Seq, Window

LENGTH = 48


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "layer",
    [Dense(), Seq(Attention(mask=Causal() & Window(8)), MLP()), Seq(Attention(), MoE(4))],
    ids=["dense", "window", "moe"],
)
def test_no_cache_is_copied(layer, batch):
    spec = ModelSpec(
        vocab_size=32, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, d_ff=64, layers=layer
    )
    model = modjax.unstack(*nnx.split(modjax.Transformer(spec, rngs=nnx.Rngs(0))))
    tokens_BL = np.ones((batch, 8), np.int32)
    state = generate.generate(*model, tokens_BL, max_new_tokens=0, max_length=LENGTH).state
    loop = generate.draw_loop.lower(*model, state, 16, modjax.Sampling()).compile().as_text()
    slots = 8 if "Window" in str(layer) else LENGTH
    cache = re.escape(f"f32[{batch},2,{slots},16]")
    made = re.findall(rf"= {cache}\S* ([\w-]+)\(", loop)
    assert made.count("scatter") == 2 * spec.num_layers
    assert "copy" not in made
