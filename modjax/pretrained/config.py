"""config.json of a pretrained model to a ModelSpec, and back."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from modjax.errors import InputError, describe, require
from modjax.pretrained.families import FAMILIES, Family
from modjax.specs import (
    MLP,
    Attention,
    ByWavelength,
    Causal,
    Divided,
    Interpolated,
    Layer,
    Logits,
    ModelSpec,
    MoE,
    Rope,
    Seq,
    Tied,
    TokenChoice,
    Tokens,
    Window,
    Yarn,
)
from modjax.specs.layer import segments_of

SIZES = {
    "vocab_size": "vocab_size",
    "d_model": "hidden_size",
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
}
ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}
CONTEXT = "original_max_position_embeddings"
# Types of `rope_parameters`, and their names of the fields of our scaling, in order.
ROPES = {
    "linear": (Interpolated, ["factor"]),
    "llama3": (ByWavelength, ["factor", "low_freq_factor", "high_freq_factor", CONTEXT]),
    "yarn": (Yarn, ["factor", CONTEXT, "attention_factor", "beta_fast", "beta_slow", "truncate"]),
    "longrope": (Divided, ["short_factor", "long_factor", CONTEXT, "attention_factor"]),
}
# Fields that change no logits: of training, of generation, and of the library that wrote the file.
HARMLESS = """_attn_implementation _name_or_path _sliding_window_pattern architectures
    attention_dropout attn_implementation auto_map bos_token_id cache_implementation dtype
    embd_pdrop eos_token_id full_attn_mod initializer_range interpolate_factor is_llama_config
    max_position_embeddings max_window_layers model_type output_router_logits pad_token_id
    pretraining_tp resid_pdrop router_jitter_noise sliding_window_size tie_word_embeddings
    tokenizer_class torch_dtype transformers.js_config transformers_version unsloth_fixed
    unsloth_version use_cache"""
CONTROLS = ("rope_parameters", "rope_scaling", "rope_theta", "head_dim", "hidden_act")  # of all
KINDS = {
    dict: "rope_parameters rope_scaling",
    list: "layer_types mlp_only_layers no_rope_layers",
    str: "hidden_act hidden_activation",
    bool: "attention_bias mlp_bias norm_topk_prob use_sliding_window",
    float: """attn_logit_softcapping clip_qkv final_logit_softcapping partial_rotary_factor
        query_pre_attn_scalar rms_norm_eps rope_local_base_freq rope_theta router_aux_loss_coef""",
}
KIND_OF = {name: kind for kind, names in KINDS.items() for name in names.split()}  # or int


class Fields:
    """Fields of a config.json, as a family reads them."""

    def __init__(self, values: Mapping[str, Any], family: Family):
        """Raises InputError for a field that the family does not know, unless it is off."""
        self.values, self.family = values, family
        self.known = {*SIZES.values(), *CONTROLS, *family.fields}
        for name in sorted(values.keys() - self.known - set(HARMLESS.split())):
            accepted = f"not known for {family.name}, and may change its numbers"
            require(values[name] in (None, 0, "", [], {}), _at(name), values[name], accepted)
        for name in sorted(values.keys() & self.known):
            value, kind = values[name], KIND_OF.get(name, int)
            fits = value is None or type(value) in ((int, float) if kind is float else (kind,))
            require(fits, _at(name), value, f"must be of type {kind.__name__}, or null")
            fits = kind is not int or name == "max_window_layers" or value is None or value > 0
            require(fits, _at(name), value, "must be greater than 0, or null")

    def __call__(self, name: str, otherwise: Any = None) -> Any:
        """Returns a field, or the family's default for it; `otherwise` if the family has none."""
        if name not in self.known:
            return otherwise
        return self.values.get(name, self.family.fields.get(name))


def _at(field: str) -> str:
    return f"config.json: {field}"


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json. Raises InputError for an unknown one."""
    name = config.get("model_type")
    accepted = f"unknown family; must be one of {', '.join(FAMILIES)}"
    require(name in FAMILIES, _at("model_type"), name, accepted)
    return FAMILIES[str(name)]


def read_config(config: Mapping[str, Any], *, tied: bool, dtype: str) -> ModelSpec:
    """Returns the spec of the model that a config.json describes.

    tied: whether the files have no tensor of a head.
    Raises InputError for a family, a rotary type or a field that is unknown.
    """
    c = Fields(config, family_of(config))
    sizes: dict[str, Any] = {ours: c(theirs) for ours, theirs in SIZES.items()}
    sizes["num_kv_heads"] = sizes["num_kv_heads"] or sizes["num_heads"]
    for ours, theirs in SIZES.items():
        require(sizes[ours] is not None, _at(theirs), None, "must be a number")
    layers = _layers(c, sizes["num_layers"], c("head_dim"))
    return ModelSpec(
        **sizes,
        layers=segments_of(layers),
        head_dim=c("head_dim"),
        norm_offset=c.family.norm_offset,
        embed=Tokens(scale=c.family.scaled),
        head=(Tied if tied else Logits)(c("final_logit_softcapping")),
        dtype=dtype,
    )


def _layers(c: Fields, depth: int, head_dim: int | None) -> list[Layer]:
    """Returns every layer of a model, in order."""
    family, act = c.family, c("hidden_activation") or c("hidden_act")
    if family.scaled and act == "gelu":  # in old files, which mean the approximation
        act = "gelu_pytorch_tanh"
    require(act in ACTIVATIONS, _at("hidden_act"), act, f"must be {', '.join(ACTIVATIONS)}")
    scalar = c("query_pre_attn_scalar")
    attention = Attention(
        norm=family.norm,
        softcap=c("attn_logit_softcapping"),
        qk_norm=family.qk_norm,
        bias=family.bias or ("all" if c("attention_bias") else None),
        clip=c("clip_qkv"),
        scale=None if scalar in (None, head_dim) else scalar**-0.5,
    )
    mlp = MLP(ACTIVATIONS[act], family.norm, bool(c("mlp_bias")))
    only, step = c("mlp_only_layers", ()), c("decoder_sparse_step", 1)
    found: list[Layer] = []
    for i, (window, rope) in enumerate(zip(_windows(c, depth), _ropes(c, depth), strict=True)):
        mask = Causal() if window is None else Causal() & Window(window)
        sparse = family.routed and i not in only and (i + 1) % step == 0
        own = dataclasses.replace(attention, mask=mask, rope=rope)
        found.append(Seq(own, _experts(c, mlp) if sparse else mlp))
    return found


def _experts(c: Fields, mlp: MLP) -> MoE:
    """Returns the mixture of experts in place of an MLP. It drops no token."""
    number, top_k = c("num_experts") or c("num_local_experts"), c("num_experts_per_tok")
    for name, value in {"num_experts": number, "num_experts_per_tok": top_k}.items():
        require(type(value) is int, _at(name), value, "must be a number")
    balance = float(c("router_aux_loss_coef"))
    rule = TokenChoice(top_k, renormalise=bool(c("norm_topk_prob")), balance=balance, z=0.0)
    about = {"width": c("moe_intermediate_size"), "activation": mlp.activation, "norm": mlp.norm}
    return MoE(number, rule, capacity_factor=None, **about)


def _windows(c: Fields, depth: int) -> list[int | None]:
    """Returns the attention window of each layer, None for no window."""
    size = c("sliding_window") if c("use_sliding_window", True) else None
    first, period = c("max_window_layers", 0), c("sliding_window_pattern", 0)
    slides = [i >= first and (not period or (i + 1) % period != 0) for i in range(depth)]
    if c.family.fields.keys() & {"no_rope_layers"}:
        slides = [not turns for turns in _turning(c, depth)]
    if (types := c("layer_types")) is not None:
        known = {"sliding_attention": True, "full_attention": False}
        accepted = f"must be {depth} of {', '.join(known)}"
        fits = len(types) == depth and set(types) <= set(known)
        require(fits, _at("layer_types"), types, accepted)
        slides = [known[name] for name in types]
    return [size if slide else None for slide in slides]


def _turning(c: Fields, depth: int) -> Sequence[int]:
    """Returns 1 for each layer with rotary positions, and 0 for the others."""
    period, given = c("no_rope_layer_interval", depth + 1), c("no_rope_layers")
    found = [int((i + 1) % period != 0) for i in range(depth)] if given is None else given
    require(len(found) == depth, _at("no_rope_layers"), found, f"must be {depth} numbers")
    return found


def _ropes(c: Fields, depth: int) -> list[Rope | None]:
    """Returns the rotary positions of each layer, None for none."""
    given, scaling = c("rope_parameters") or {}, c("rope_scaling") or {}
    nested = bool(given.keys() & {"full_attention", "sliding_attention"})
    try:
        full = given.get("full_attention", {}) if nested else given
        rope = _rope(c, {**full, **scaling}, "rope_theta")
        if "rope_local_base_freq" not in c.family.fields:
            return [rope if turns else None for turns in _turning(c, depth)]
        sliding = given.get("sliding_attention", {}) if nested else {}
        local = _rope(c, sliding, "rope_local_base_freq")
        return [rope if window is None else local for window in _windows(c, depth)]
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        accepted = f"a field is missing, or of another kind: {describe(error)}"
        raise InputError(_at("rope_parameters"), given or scaling, accepted) from error


def _rope(c: Fields, given: Mapping[str, Any], theta: str) -> Rope:
    """Returns rotary positions. given: their parameters. theta: the older field of their base."""
    given, where = {k: v for k, v in given.items() if v is not None}, _at("rope_parameters")
    default, top = c(theta), c.values.get(theta)
    base = given.pop("rope_theta", default)
    require(top in (None, base), _at(theta), top, f"{where}.rope_theta is {base}")
    share = c("partial_rotary_factor", 1.0)
    if "partial_rotary_factor" in c.known or given.get("partial_rotary_factor") == 1:
        share = given.pop("partial_rotary_factor", share)
    rope = Rope(float(base), float(share))
    kind = given.pop("type", "default")
    kind = given.pop("rope_type", kind)
    known = kind == "default" or kind in ROPES
    require(known, f"{where}.rope_type", kind, f"must be default, {', '.join(ROPES)}")
    scaling, names = ROPES.get(kind, (None, []))
    if CONTEXT in names:
        given.setdefault(CONTEXT, c(CONTEXT) or c.values.get("max_position_embeddings"))
    if "attention_factor" in names:
        if "attention_factor" not in given:
            most = c.values.get("max_position_embeddings")
            factor = given.get("factor") or most / given[CONTEXT]
            given["attention_factor"] = _magnitude(kind, given, factor)
        for name in ("mscale", "mscale_all_dim") if kind == "yarn" else ("factor",):
            given.pop(name, None)
    for name in sorted(given.keys() - set(names)):
        raise InputError(f"{where}.{name}", given[name], f"unknown for the rotary type {kind}")
    if scaling is None:
        return rope
    ours = zip((field.name for field in dataclasses.fields(scaling)), names, strict=True)
    values = {name: given[theirs] for name, theirs in ours if theirs in given}
    lists = {n: tuple(map(float, v)) for n, v in values.items() if isinstance(v, list | tuple)}
    return dataclasses.replace(rope, scaling=scaling(**values | lists))


def _magnitude(kind: str, given: Mapping[str, Any], factor: float) -> float:
    """Returns the factor of cos and sin of a rotary type whose parameters leave it out."""
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(given[CONTEXT]))
    one, other = given.get("mscale"), given.get("mscale_all_dim")
    if one and other:
        return (0.1 * one * math.log(factor) + 1) / (0.1 * other * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def without_training(layer: Any) -> Any:
    """Returns a layer without the fields that change nothing outside training."""
    if isinstance(layer, Attention):
        return dataclasses.replace(layer, received=False)
    if isinstance(layer, MoE) and isinstance(layer.rule, TokenChoice):
        rule = dataclasses.replace(layer.rule, balance=0.0, z=0.0, bias_rate=0.0)
        return dataclasses.replace(layer, rule=rule, capacity_factor=None)
    return layer


def write_config(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """Returns the config.json of a family for a spec of blocks of Attention and MLP or MoE.

    Both forms of the rotary fields are in it: older readers silently ignore the newer one. The
    family fits the spec only if `read_config` returns it again.
    """
    blocks: list[Any] = spec.blocks()
    shape, blocks = spec.shape, [block.parts for block in blocks]
    attentions, mlps = [a for a, _ in blocks], [mlp for _, mlp in blocks]
    theirs = {ours: act for act, ours in reversed(ACTIVATIONS.items())}
    act, first = theirs.get(mlps[0].activation), attentions[0]
    windows = [a.mask.reach[0] for a in attentions]
    full = [a.rope for a in attentions if a.rope and a.mask.reach[0] is None]
    sliding = [a.rope for a in attentions if a.rope and a.mask.reach[0] is not None]
    full, sliding = (full or sliding or [Rope()])[0], (sliding or full or [Rope()])[0]
    rope, local = _rope_fields(full), _rope_fields(sliding)
    both = {"full_attention": rope, "sliding_attention": local}
    routed = [i for i, mlp in enumerate(mlps) if isinstance(mlp, MoE)]
    values = {theirs: getattr(shape, ours) for ours, theirs in SIZES.items()} | {
        "head_dim": shape.head_dim,
        "tie_word_embeddings": spec.head.tied,
        "hidden_act": act,
        "hidden_activation": act,
        "attention_bias": first.bias == "all",
        "clip_qkv": first.clip,
        "attn_logit_softcapping": first.softcap,
        "final_logit_softcapping": spec.head.softcap,
        "query_pre_attn_scalar": round((first.scale or shape.head_dim**-0.5) ** -2),
        "use_sliding_window": any(windows),
        "sliding_window": next((back + 1 for back in windows if back is not None), None),
        "layer_types": ["full_attention" if w is None else "sliding_attention" for w in windows],
        "max_window_layers": next((i for i, w in enumerate(windows) if w), len(windows)),
        "sliding_window_pattern": windows.index(None) + 1 if None in windows else None,
        "no_rope_layers": [int(a.rope is not None) for a in attentions],
        "rope_theta": full.base,
        "rope_local_base_freq": sliding.base,
        "partial_rotary_factor": full.share,
        "rope_scaling": {k: v for k, v in rope.items() if k != "rope_theta"}
        if full.scaling
        else None,
        "rope_parameters": both if "rope_local_base_freq" in family.fields else rope,
        "mlp_bias": any(mlp.bias for mlp in mlps if isinstance(mlp, MLP)),
        "mlp_only_layers": [i for i in range(len(mlps)) if i not in routed],
    }
    if CONTEXT in rope:
        values[CONTEXT] = rope[CONTEXT]
    for i in routed[:1]:
        moe, rule = mlps[i], mlps[i].rule
        values |= {
            "num_experts": moe.experts,
            "num_local_experts": moe.experts,
            "num_experts_per_tok": rule.top_k,
            "norm_topk_prob": getattr(rule, "renormalise", False),
            "moe_intermediate_size": moe.width or spec.d_ff,
        }
    known = {*SIZES.values(), *CONTROLS, *family.fields, "tie_word_embeddings"}
    named = {"model_type": family.name, "architectures": [family.architecture]}
    return named | {name: value for name, value in values.items() if name in known}


def _rope_fields(rope: Rope) -> dict[str, Any]:
    """Returns the `rope_parameters` of rotary positions."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if rope.share != 1:
        found["partial_rotary_factor"] = rope.share
    for kind, (scaling, names) in ROPES.items():
        if type(rope.scaling) is scaling:
            values = map(
                rope.scaling.__getattribute__, (f.name for f in dataclasses.fields(scaling))
            )
            found |= {"rope_type": kind} | dict(zip(names, values, strict=True))
    return found
