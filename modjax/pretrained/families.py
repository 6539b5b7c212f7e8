"""Families of open decoders: the fields of their config.json and the names of their tensors.

`register` adds a family from outside. modjax/pretrained/config.py reads the fields.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from modjax.errors import require

# Fields of ModelSpec -> fields of config.json.
SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
CONTEXT = "original_max_position_embeddings"
# Our weights -> Hugging Face's tensors, within a layer or outside all layers. Weights of the same
# tensor are stacked along its rows, in this order. {} is the number of an expert.
NAMES = {
    "embed.table": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "unembed.w_logits": "lm_head.weight",
    "attention.norm.scale": "input_layernorm.weight",
    "attention.norm_after.scale": "post_attention_layernorm.weight",
    "attention.w_q": "self_attn.q_proj.weight",
    "attention.w_k": "self_attn.k_proj.weight",
    "attention.w_v": "self_attn.v_proj.weight",
    "attention.w_out": "self_attn.o_proj.weight",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "mlp.norm.scale": "post_attention_layernorm.weight",
    "mlp.norm_after.scale": "post_feedforward_layernorm.weight",
    "mlp.w_gate": "mlp.gate_proj.weight",
    "mlp.w_in": "mlp.up_proj.weight",
    "mlp.w_out": "mlp.down_proj.weight",
    "mlp.router.w": "mlp.gate.weight",
    "mlp.experts.{}.w_gate": "mlp.experts.{}.gate_proj.weight",
    "mlp.experts.{}.w_in": "mlp.experts.{}.up_proj.weight",
    "mlp.experts.{}.w_out": "mlp.experts.{}.down_proj.weight",
}


@dataclass(frozen=True)
class Family:
    """A family of decoders, such as Gemma 2.

    name: `model_type` in config.json.
    architecture: name of the class in transformers.
    fields: default values of fields of config.json. Every known field is here, in SIZES or in
      CONTROLS.
    norm: see specs.Attention; also for MLPs and experts.
    qk_norm, bias: see specs.Attention. With bias None, the field `attention_bias` adds all biases.
    norm_offset: see ModelSpec.
    scale_embed: whether embeddings are scaled, see specs.Tokens.
    routed: whether MLPs are mixtures of experts.
    names: entries that replace or extend NAMES.
    layer_prefix: prefix of the names of a layer's tensors, before the number of the layer.
    """

    name: str
    architecture: str
    fields: Mapping[str, Any]
    norm: str = "before"
    qk_norm: str | None = None
    bias: str | None = None
    norm_offset: float = 0.0
    scale_embed: bool = False
    routed: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    layer_prefix: str = "model.layers."

    @property
    def tensors(self) -> dict[str, str]:
        """Our names of weights and biases -> Hugging Face's, without the prefixes of layers."""
        named = NAMES | dict(self.names)
        biases = {ours.replace(".w_", ".b_"): theirs for ours, theirs in named.items()}
        return {k: v.replace(".weight", ".bias") for k, v in biases.items() if ".b_" in k} | named


SWIGLU = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 1e4}
EPS = {"rms_norm_eps": 1e-5}
BIAS = {"attention_bias": False}
WINDOWS = {
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 28,
    "layer_types": None,
}
EXPERTS = {
    "num_experts_per_tok": None,
    "num_experts": None,
    "num_local_experts": None,
    "router_aux_loss_coef": 0.001,
}

LLAMA = Family("llama", "LlamaForCausalLM", SWIGLU | BIAS | {"mlp_bias": False})
MISTRAL = Family("mistral", "MistralForCausalLM", SWIGLU | {"sliding_window": 4096})
QWEN2 = Family("qwen2", "Qwen2ForCausalLM", SWIGLU | WINDOWS, bias="qkv")
QWEN3 = Family(
    "qwen3", "Qwen3ForCausalLM", SWIGLU | WINDOWS | BIAS | {"head_dim": 128}, qk_norm="head"
)
SMOLLM3 = Family(
    "smollm3",
    "SmolLM3ForCausalLM",
    {**LLAMA.fields, **WINDOWS, "no_rope_layers": None, "no_rope_layer_interval": 4}
    | {"rope_theta": 2e6},
)
PHI3 = Family(
    "phi3",
    "Phi3ForCausalLM",
    {**SWIGLU, **EPS, "sliding_window": None, "partial_rotary_factor": 1.0, CONTEXT: None},
    names={f"attention.w_{part}": "self_attn.qkv_proj.weight" for part in "qkv"}
    | {f"mlp.w_{part}": "mlp.gate_up_proj.weight" for part in ("gate", "in")},
)
OLMO2 = Family("olmo2", "Olmo2ForCausalLM", SWIGLU | EPS | BIAS, norm="after", qk_norm="all")
GEMMA = Family(
    "gemma",
    "GemmaForCausalLM",
    {**SWIGLU, **BIAS, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": None}
    | {"head_dim": 256},
    norm_offset=1.0,
    scale_embed=True,
)
GEMMA2 = replace(
    GEMMA,
    name="gemma2",
    architecture="Gemma2ForCausalLM",
    fields={
        **GEMMA.fields,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "layer_types": None,
        "sliding_window_pattern": 2,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    norm="both",
    names={"mlp.norm.scale": "pre_feedforward_layernorm.weight"},
)
GEMMA3 = replace(
    GEMMA2,
    name="gemma3_text",
    architecture="Gemma3ForCausalLM",
    fields={
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
    qk_norm="head",
)
MIXTRAL = Family(
    "mixtral",
    "MixtralForCausalLM",
    {**SWIGLU, **EPS, **EXPERTS, "sliding_window": None, "rope_theta": 1e6},
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
    {**SWIGLU, **EPS, **BIAS, **EXPERTS, "clip_qkv": None}
    | {"norm_topk_prob": False, "router_aux_loss_coef": 0.01},
    qk_norm="all",
    routed=True,
)
QWEN3_MOE = Family(
    "qwen3_moe",
    "Qwen3MoeForCausalLM",
    {**SWIGLU, **BIAS, **EXPERTS, "use_sliding_window": False, "sliding_window": None}
    | {"norm_topk_prob": False}
    | {"moe_intermediate_size": 768, "decoder_sparse_step": 1, "mlp_only_layers": ()},
    qk_norm="head",
    routed=True,
)
_DENSE = (LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3, PHI3, OLMO2, GEMMA, GEMMA2, GEMMA3)
FAMILIES = {family.name: family for family in (*_DENSE, MIXTRAL, OLMOE, QWEN3_MOE)}


def register(family: Family) -> None:
    """Adds a family. Raises InputError if another one has its name."""
    fits = FAMILIES.get(family.name, family) == family
    require(fits, "modjax.pretrained.register", family.name, "is a family already")
    FAMILIES[family.name] = family


# Fields that change no logits: for training, for generation, or about the writing library.
HARMLESS = """_attn_implementation _name_or_path _sliding_window_pattern architectures
    attention_dropout attn_implementation auto_map bos_token_id cache_implementation dtype
    embd_pdrop eos_token_id full_attn_mod initializer_range interpolate_factor is_llama_config
    max_position_embeddings max_window_layers model_type output_router_logits pad_token_id
    pretraining_tp resid_pdrop router_jitter_noise sliding_window_size tie_word_embeddings
    tokenizer_class torch_dtype transformers.js_config transformers_version unsloth_fixed
    unsloth_version use_cache"""
CONTROLS = ("rope_parameters", "rope_scaling", "rope_theta", "head_dim", "hidden_act")
KINDS = {
    dict: "rope_parameters rope_scaling",
    list: "layer_types mlp_only_layers no_rope_layers",
    str: "hidden_act hidden_activation",
    bool: "attention_bias mlp_bias norm_topk_prob use_sliding_window",
    float: """attn_logit_softcapping clip_qkv final_logit_softcapping partial_rotary_factor
        query_pre_attn_scalar rms_norm_eps rope_local_base_freq rope_theta router_aux_loss_coef""",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}  # others: int


class Fields:
    """Fields of a config.json, with the defaults of a family."""

    def __init__(self, values: Mapping[str, Any], family: Family):
        """Raises InputError for an unknown field, unless it is empty or 0, and for a wrong type."""
        self.values, self.family = values, family
        self.known = {*SIZES.values(), *CONTROLS, *family.fields}
        for name in sorted(values.keys() - self.known - set(HARMLESS.split())):
            accepted = f"not known for {family.name}, and may change its numbers"
            require(values[name] in (None, 0, "", [], {}), at(name), values[name], accepted)
        for name in sorted(values.keys() & self.known):
            value, kind = values[name], KIND_OF.get(name, int)
            fits = value is None or type(value) in ((int, float) if kind is float else (kind,))
            require(fits, at(name), value, f"must be of type {kind.__name__}, or null")
            fits = kind is not int or name == "max_window_layers" or value is None or value > 0
            require(fits, at(name), value, "must be greater than 0, or null")

    def __call__(self, name: str, otherwise: Any = None) -> Any:
        """Returns a field or its default, or `otherwise` if the family does not know the field."""
        if name not in self.known:
            return otherwise
        return self.values.get(name, self.family.fields.get(name))


def at(field: str) -> str:
    return f"config.json: {field}"


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family that `model_type` names. Raises InputError if it is unknown."""
    name = config.get("model_type")
    accepted = f"unknown family; must be one of {', '.join(FAMILIES)}"
    require(name in FAMILIES, at("model_type"), name, accepted)
    return FAMILIES[str(name)]
