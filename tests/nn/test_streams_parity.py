"""Gemma 3n's AltUp against Hugging Face's, values and gradients. Legend: B, L, S streams, D."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import At, Call, build
from modjax.spec import MLP, Gemma3nAltUp, Shape

torch = pytest.importorskip("torch", reason="pip install -e '.[parity]'")
pytest.importorskip("transformers", reason="pip install -e '.[parity]'")

B, L, S, D, F, ACTIVE = 2, 7, 4, 16, 24, 1


def test_equals_hugging_faces_prediction_and_correction():
    from transformers.models.gemma3n import modeling_gemma3n as its

    torch.manual_seed(0)
    config = its.Gemma3nTextConfig(
        hidden_size=D, altup_num_inputs=S, altup_active_idx=ACTIVE, rms_norm_eps=1e-6
    )
    block = its.Gemma3nTextAltUp(config).eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 1)
    graphdef, state = nnx.split(
        build(Gemma3nAltUp(MLP("relu2"), active=ACTIVE),
              Shape(D, 2, 2, 2, 8, F, 1e-6, S), rngs=nnx.Rngs(0))
    )  # fmt: skip
    values = nnx.to_pure_dict(state)
    named = {name: p.detach().numpy() for name, p in block.named_parameters()}
    values["norm"]["scale"] = named["router_norm.weight"]
    values["w"] = named["modality_router.weight"].T
    values["p"] = named["prediction_coefs.weight"].T.reshape(S, S, S)
    values["c"] = named["correction_coefs.weight"].T
    inner = {name: torch.tensor(np.array(values["inner"][name])) for name in ("w_in", "w_out")}
    rng = np.random.default_rng(0)
    x_BLSD, target_BLSD = rng.standard_normal((2, B, L, S, D)).astype(np.float32)

    x = torch.tensor(x_BLSD, requires_grad=True)
    predicted = block.predict(x.permute(2, 0, 1, 3))
    read = predicted[ACTIVE]
    normed = read * torch.rsqrt(read.pow(2).mean(-1, keepdim=True) + 1e-6)
    computed = read + torch.relu(normed @ inner["w_in"]).square() @ inner["w_out"].T
    theirs = block.correct(predicted, computed).permute(1, 2, 0, 3)
    (theirs * torch.tensor(target_BLSD)).sum().backward()

    def ours(values, x_BLSD):
        at = At(jnp.arange(L)[None], None, None, {}, {})
        out = nnx.merge(graphdef, values)(x_BLSD, at, Call())
        return jnp.sum(out.x * target_BLSD), out.x

    gradient = jax.jit(jax.grad(ours, argnums=(0, 1), has_aux=True))
    (grads, x_grad), found = gradient(jax.tree.map(jnp.asarray, values), jnp.asarray(x_BLSD))
    np.testing.assert_allclose(found, theirs.detach().numpy(), rtol=1e-5, atol=1e-5)
    slopes = {name: p.grad.numpy() for name, p in block.named_parameters() if p.grad is not None}
    np.testing.assert_allclose(x_grad, x.grad.numpy(), rtol=1e-4, atol=1e-4)
    for ours, theirs in (
        (grads["w"], slopes["modality_router.weight"].T),
        (grads["p"], slopes["prediction_coefs.weight"].T.reshape(S, S, S)),
        (grads["c"], slopes["correction_coefs.weight"].T),
        (grads["norm"]["scale"], slopes["router_norm.weight"]),
    ):
        assert np.max(np.abs(theirs)) > 1e-2
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
