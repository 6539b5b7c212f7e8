"""Families of open decoders: the fields of their config.json, and the names of their tensors.

A family says how its models differ from NAMES and from a block of norm, attention, norm and MLP.
`register` adds a family from outside; see modjax/pretrained/config.py for how the fields are read.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from modjax.errors import require

# Our weights -> Hugging Face's tensors of a layer. Equal tensors are stacked along their rows, in
# this order; {} is the number of an expert.
NAMES = {
    "attention.norm.scale": "input_layernorm.weight",
    "attention.norm_after.scale": "post_attention_layernorm.weight",
    "attention.w_q": "self_attn.q_proj.weight",
    "attention.w_k": "self_attn.k_proj.weight",
    "attention.w_v": "self_attn.v_proj.weight",
    "attention.w_out": "self_attn.o_proj.weight",
    "attention.b_q": "self_attn.q_proj.bias",
    "attention.b_k": "self_attn.k_proj.bias",
    "attention.b_v": "self_attn.v_proj.bias",
    "attention.b_out": "self_attn.o_proj.bias",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.norm_after.scale": "post_feedforward_layernorm.weight",
    "mlp.w_gate": "mlp.gate_proj.weight",
    "mlp.w_in": "mlp.up_proj.weight",
    "mlp.w_out": "mlp.down_proj.weight",
    "mlp.b_gate": "mlp.gate_proj.bias",
    "mlp.b_in": "mlp.up_proj.bias",
    "mlp.b_out": "mlp.down_proj.bias",
    "mlp.router.w": "mlp.gate.weight",
    "mlp.experts.{}.w_gate": "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.{}.w_in": "mlp.experts.{}.up_proj.weight",
    "mlp.experts.{}.w_out": "mlp.experts.{}.down_proj.weight",
}
ENDS = {
    "embed.table": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "unembed.w_logits": "lm_head.weight",
}


@dataclass(frozen=True)
class Family:
    """A kind of decoder in Hugging Face's form.

    name: its `model_type` in config.json.
    architecture: its class in transformers.
    fields: the fields of config.json that it reads beyond those of every family, and the value that
      each of both has where a file leaves it out.
    norm, qk_norm, bias: of specs.Attention; bias None reads the field `attention_bias`, if any.
    norm_offset: of ModelSpec.
    scaled: whether embeddings are scaled, see specs.Tokens.
    routed: whether its MLPs are mixtures of experts.
    names: what differs from NAMES.
    """

    name: str
    architecture: str
    fields: Mapping[str, Any]
    norm: str = "before"
    qk_norm: str | None = None
    bias: str | None = None
    norm_offset: float = 0.0
    scaled: bool = False
    routed: bool = False
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, str]:
        """Hugging Face's name of each of our weights, within a layer."""
        return {ours: self.names.get(ours, theirs) for ours, theirs in NAMES.items()}


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Adds a family. Raises InputError if its name is taken."""
    fits = FAMILIES.get(family.name, family) == family
    require(fits, "modjax.pretrained.register", family.name, "is a family already")
    FAMILIES[family.name] = family


SWIGLU = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
WINDOWS = {"use_sliding_window": False, "sliding_window": None, "layer_types": None}
EXPERTS = {
    "num_experts_per_tok": None,
    "num_experts": None,
    "num_local_experts": None,
    "norm_topk_prob": False,
    "router_aux_loss_coef": 0.001,
}

LLAMA = Family("llama", "LlamaForCausalLM", {**SWIGLU, "attention_bias": False, "mlp_bias": False})
MISTRAL = Family("mistral", "MistralForCausalLM", {**SWIGLU, "sliding_window": 4096})
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    {**SWIGLU, **WINDOWS, "max_window_layers": 28},
    bias="qkv",
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    {**SWIGLU, **WINDOWS, "max_window_layers": 28, "attention_bias": False, "head_dim": 128},
    qk_norm="head",
)
SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    {
        **LLAMA.fields,
        **WINDOWS,
        "rope_theta": 2e6,
        "no_rope_layers": None,
        "no_rope_layer_interval": 4,
    },
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    {
        **SWIGLU,
        "rms_norm_eps": 1e-5,
        "sliding_window": None,
        "partial_rotary_factor": 1.0,
        "original_max_position_embeddings": None,
    },
    names={f"attention.w_{part}": "self_attn.qkv_proj.weight" for part in "qkv"}
    | {f"mlp.w_{part}": "mlp.gate_up_proj.weight" for part in ("gate", "in")},
)
OLMO2 = Family(
    "olmo2",
    "Olmo2ForCausalLM",
    {**SWIGLU, "rms_norm_eps": 1e-5, "attention_bias": False},
    norm="after",
    qk_norm="all",
)
GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_activation": None,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "attention_bias": False,
        "head_dim": 256,
    },
    norm_offset=1.0,
    scaled=True,
)
GEMMA2 = Family(
    "gemma2",
    "Gemma2ForCausalLM",
    {
        **GEMMA.fields,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    norm="both",
    norm_offset=1.0,
    scaled=True,
    names={"mlp.norm.scale": "pre_feedforward_layernorm.weight"},
)
GEMMA3 = Family(
    "gemma3_text",
    "Gemma3ForCausalLM",
    {
        **GEMMA2.fields,
        "sliding_window_pattern": 6,
        "attn_logit_softcapping": None,
        "final_logit_softcapping": None,
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        # Files of the larger models leave these out.
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "vocab_size": 262_208,
    },
    norm="both",
    qk_norm="head",
    norm_offset=1.0,
    scaled=True,
    names=GEMMA2.names,
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    {
        **SWIGLU,
        **EXPERTS,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e6,
        "sliding_window": None,
        "norm_topk_prob": True,
    },
    routed=True,
    names={
        "mlp.router.w": "block_sparse_moe.gate.weight",
        "mlp.experts.{}.w_gate": "block_sparse_moe.experts.{}.w1.weight",
        "mlp.experts.{}.w_in": "block_sparse_moe.experts.{}.w3.weight",
        "mlp.experts.{}.w_out": "block_sparse_moe.experts.{}.w2.weight",
    },
)
OLMOE = Family(
    "olmoe",
    "OlmoeForCausalLM",
    {
        **SWIGLU,
        **EXPERTS,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "clip_qkv": None,
        "router_aux_loss_coef": 0.01,
    },
    qk_norm="all",
    routed=True,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    {
        **SWIGLU,
        **EXPERTS,
        "attention_bias": False,
        "use_sliding_window": False,
        "sliding_window": None,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "mlp_only_layers": (),
    },
    qk_norm="head",
    routed=True,
)
for known in (
    *(LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, PHI3, OLMO2, GEMMA, GEMMA2, GEMMA3),
    *(MIXTRAL, OLMOE, QWEN3_MOE),
):
    register(known)
