"""Layers on streams against Hugging Face's, values and gradients. Legend: B, L, S streams, D."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import At, Call, build
from modjax.specs import MLP, Gemma3nAltUp, ManifoldHyperConnection, Shape

torch = pytest.importorskip("torch", reason="make test-parity")
pytest.importorskip("transformers", reason="make test-parity")

B, L, S, D, F, ACTIVE = 2, 7, 4, 16, 24, 1


def compare(layer, block, renamed, run):
    """Compares our layer around an MLP with their random block: values, and every gradient.

    renamed(their parameters, or their gradients by name): the same as ours. run(x_BLSD, inner):
    what theirs makes of the streams around that MLP.
    """
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 1)
    named = {name: p.detach().numpy() for name, p in block.named_parameters()}
    graphdef, state = nnx.split(build(layer, Shape(D, 2, 2, 2, 8, F, 1e-6, S), rngs=nnx.Rngs(0)))
    values = nnx.to_pure_dict(state) | renamed(named)
    mlp = {name: torch.tensor(np.array(values["inner"][name])) for name in ("w_in", "w_out")}
    rng = np.random.default_rng(0)
    x_BLSD, target_BLSD = rng.standard_normal((2, B, L, S, D)).astype(np.float32)

    def inner(read):
        normed = read * torch.rsqrt(read.pow(2).mean(-1, keepdim=True) + 1e-6)
        return read + torch.relu(normed @ mlp["w_in"]).square() @ mlp["w_out"].T

    x = torch.tensor(x_BLSD, requires_grad=True)
    theirs = run(x, inner)
    (theirs * torch.tensor(target_BLSD)).sum().backward()

    def ours(values, x_BLSD):
        at = At(jnp.arange(L)[None], None, None, {}, {})
        out = nnx.merge(graphdef, values)(x_BLSD, at, Call())
        return jnp.sum(out.x * target_BLSD), out.x

    gradient = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))
    (grads, x_grad), found = gradient(jax.tree.map(jnp.asarray, values), jnp.asarray(x_BLSD))
    np.testing.assert_allclose(found, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(x_grad, x.grad.numpy(), rtol=1e-4, atol=1e-4)
    slopes = {n: p.grad.numpy() for n, p in block.named_parameters() if p.grad is not None}
    wanted = renamed(slopes)
    assert all(np.max(np.abs(leaf)) > 1e-2 for leaf in jax.tree.leaves(wanted))
    del grads["inner"]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, wanted)


def test_gemma_3n_equals_hugging_faces_prediction_and_correction():
    from transformers.models.gemma3n import modeling_gemma3n as its

    config = its.Gemma3nTextConfig(
        hidden_size=D, altup_num_inputs=S, altup_active_idx=ACTIVE, rms_norm_eps=1e-6
    )
    block = its.Gemma3nTextAltUp(config).eval()

    def run(x, inner):
        predicted = block.predict(x.permute(2, 0, 1, 3))
        return block.correct(predicted, inner(predicted[ACTIVE])).permute(1, 2, 0, 3)

    def renamed(of):
        return {
            "norm": {"scale": of["router_norm.weight"]},
            "w": of["modality_router.weight"].T,
            "p": of["prediction_coefs.weight"].T.reshape(S, S, S),
            "c": of["correction_coefs.weight"].T,
        }

    compare(Gemma3nAltUp(MLP("relu2"), active=ACTIVE), block, renamed, run)


def test_mhc_equals_hugging_faces_deepseek_v4():
    from transformers.models.deepseek_v4 import modeling_deepseek_v4 as its

    config = its.DeepseekV4Config(hidden_size=D, hc_mult=S, hc_sinkhorn_iters=20, rms_norm_eps=1e-6)
    block = its.DeepseekV4HyperConnection(config)

    def run(x, inner):
        # As DeepseekV4DecoderLayer; `inner` adds what it read, which theirs does not.
        post, comb, read = block(x)
        update = inner(read) - read
        return post[..., None] * update[..., None, :] + comb.transpose(2, 3) @ x

    def renamed(of):
        b_read, b_write, b_mix = np.split(of["base"], (S, 2 * S))
        return {
            "w": of["fn"].T,
            "b_read": b_read,
            "b_write": b_write,
            "b_mix": b_mix.reshape(S, S),
            "scales": of["scale"],
        }

    compare(ManifoldHyperConnection(MLP("relu2")), block, renamed, run)
