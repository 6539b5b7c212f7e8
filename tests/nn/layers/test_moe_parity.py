"""Mixture of experts against the blocks of Hugging Face's models, values and gradients.

They have no norm and no residual: ours are undone. Legend: B batch, S positions, D width.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from modjax.nn import At, Call, build
from modjax.specs import MoE, Shape, TokenChoice

torch = pytest.importorskip("torch", reason="make test-parity")
pytest.importorskip("transformers", reason="make test-parity")

B, S, D, F, E, K = 3, 20, 16, 24, 6, 2
SHAPE = Shape(D, 2, 2, 2, 8, F, 0.0)
GATED = {"activation": "swiglu", "capacity_factor": None}


def mixtral(config):
    from transformers.models.mixtral import modeling_mixtral as its

    return its.MixtralSparseMoeBlock(
        its.MixtralConfig(
            hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K
        )
    )


def olmoe(config):
    from transformers.models.olmoe import modeling_olmoe as its

    return its.OlmoeSparseMoeBlock(
        its.OlmoeConfig(hidden_size=D, intermediate_size=F, num_experts=E, num_experts_per_tok=K)
    )


def qwen3(config):
    from transformers.models.qwen3_moe import modeling_qwen3_moe as its

    return its.Qwen3MoeSparseMoeBlock(
        its.Qwen3MoeConfig(
            hidden_size=D,
            moe_intermediate_size=F,
            num_experts=E,
            num_experts_per_tok=K,
            norm_topk_prob=True,
        )
    )


def switch(config):
    from transformers.models.switch_transformers import modeling_switch_transformers as its

    return its.SwitchTransformersSparseMLP(
        its.SwitchTransformersConfig(
            d_model=D,
            d_ff=F,
            num_experts=E,
            expert_capacity=config.slots(S),
            dense_act_fn="gelu_new",
            router_jitter_noise=0.0,
            dropout_rate=0.0,
        )
    )


def longcat(config):
    from transformers.models.longcat_flash import modeling_longcat_flash as its

    return its.LongcatFlashMoE(
        its.LongcatFlashConfig(
            hidden_size=D,
            expert_ffn_hidden_size=F,
            n_routed_experts=E,
            zero_expert_num=3,
            moe_topk=K,
            routed_scaling_factor=6.0,
        )
    )


BLOCKS = {
    "Mixtral": (mixtral, MoE(E, TokenChoice(K, renormalise=True), **GATED)),
    "OLMoE": (olmoe, MoE(E, TokenChoice(K), **GATED)),
    "Qwen3-MoE": (qwen3, MoE(E, TokenChoice(K, renormalise=True), **GATED)),
    "Switch": (switch, MoE(E, capacity_factor=1.0)),
    "LongCat": (longcat, MoE(E, TokenChoice(K, no_ops=3, scale=6.0), **GATED)),
}


def router_weight(block):
    for name in ("gate.weight", "router.classifier.weight"):
        if name in dict(block.named_parameters()):
            return block.get_parameter(name)
    raise AssertionError("no router")


def experts_of(named):
    """Returns w_in, w_gate and w_out, (E, D, F) each, from weights named by Hugging Face."""
    if "experts.gate_up_proj" in named:
        both = named["experts.gate_up_proj"][:E].swapaxes(1, 2)
        return {"w_gate": both[..., :F], "w_in": both[..., F:], "w_out": named["experts.down_proj"]}
    each = [{n: named[f"experts.expert_{e}.{n}.weight"] for n in ("wi", "wo")} for e in range(E)]
    return {
        "w_in": np.stack([one["wi"].T for one in each]),
        "w_out": np.stack([one["wo"] for one in each]),
    }


@pytest.mark.parametrize("name", BLOCKS)
def test_equals_hugging_faces_block(name):
    make, spec = BLOCKS[name]
    torch.manual_seed(0)
    block = make(spec)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.normal_(0, 0.3)
    rng = np.random.default_rng(0)
    x_BSD, target_BSD = (rng.standard_normal((B, S, D)).astype(np.float32) for _ in range(2))
    x_BSD /= np.sqrt(np.mean(x_BSD**2, axis=-1, keepdims=True))  # its norm is itself
    x = torch.tensor(x_BSD, requires_grad=True)
    found = block(x)
    found = found[0] if isinstance(found, tuple) else found
    if name == "LongCat":  # its no-ops hand on weight * x, ours nothing
        _, weights, rows = block.router(x)
        passed = torch.where(rows >= E, weights, 0.0).sum(-1).reshape(B, S, 1)
        found = found - passed * x
    (found * torch.tensor(target_BSD)).sum().backward()

    graphdef, state = nnx.split(build(spec, SHAPE, rngs=nnx.Rngs(0)))
    values = nnx.to_pure_dict(state)
    named = {n: p.detach().numpy() for n, p in block.named_parameters()}
    given = {"router": {"w": router_weight(block).detach().numpy().T}, "experts": experts_of(named)}
    norm = {"norm": values["norm"]}  # theirs has none
    assert jax.tree.map(np.shape, values) == jax.tree.map(np.shape, given | norm)
    values |= given

    def ours(values, x_BSD):
        at = At(jnp.arange(S)[None], None, None, {}, {})
        out = nnx.merge(graphdef, values)(x_BSD, at, Call())
        return jnp.sum((out.x - x_BSD) * target_BSD), out.x - x_BSD

    gradient = jax.jit(jax.grad(ours, argnums=0, has_aux=True))
    grads, y_BSD = gradient(jax.tree.map(jnp.asarray, values), jnp.asarray(x_BSD))
    np.testing.assert_allclose(y_BSD, found.detach().numpy(), atol=2e-5)
    theirs = {n: p.grad.numpy() for n, p in block.named_parameters() if p.grad is not None}
    np.testing.assert_allclose(grads["router"]["w"], router_weight(block).grad.numpy().T, atol=1e-3)
    for matrix, grad in experts_of(theirs).items():
        np.testing.assert_allclose(grads["experts"][matrix], grad, atol=1e-3)


def test_the_balance_loss_of_mixtral_is_ours_times_k():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    layer = build(MoE(E, TokenChoice(K)), SHAPE, rngs=nnx.Rngs(0))
    x_BSD = jnp.float32(np.random.default_rng(0).standard_normal((B, S, D)))
    record = layer(x_BSD, At(jnp.arange(S)[None], None, None, {}, {}), Call()).records["rule"]
    y_BSD = np.array(x_BSD) / np.sqrt(np.mean(np.array(x_BSD) ** 2, axis=-1, keepdims=True))
    logits = torch.tensor((y_BSD @ np.array(layer.router.w[...])).reshape(-1, E))
    theirs = float(load_balancing_loss_func((logits,), E, K))
    np.testing.assert_allclose(K * float(record.losses()["balance"]), theirs, rtol=1e-5)
