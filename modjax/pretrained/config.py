"""Conversion of config.json to a ModelSpec, and back."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from modjax.errors import require
from modjax.pretrained.families import (
    CONTEXT,
    CONTROLS,
    SIZES,
    Family,
    Fields,
    at,
    family_of,
)
from modjax.pretrained.rotary import read_ropes, write_rope
from modjax.specs import MLP, Attention, ModelSpec, MoE, Rope, Seq, TokenChoice
from modjax.specs.layer import Layer, segments_of
from modjax.specs.layers.ends import Logits, Tied, Tokens
from modjax.specs.masks import Causal, Window

ACTIVATIONS = {"silu": "swiglu", "gelu_pytorch_tanh": "geglu", "gelu_new": "geglu"}


def read_config(config: Mapping[str, Any], *, tied: bool, dtype: str) -> ModelSpec:
    """Returns the spec of the model that a config.json describes.

    tied: whether the output head shares the embedding table.
    dtype: dtype of the weights and the computation.
    Raises InputError for an unknown family, rotary type or field.
    """
    c = Fields(config, family_of(config))
    sizes: dict[str, Any] = {ours: c(theirs) for ours, theirs in SIZES.items()}
    sizes["num_kv_heads"] = sizes["num_kv_heads"] or sizes["num_heads"]
    for ours, theirs in SIZES.items():
        require(sizes[ours] is not None, at(theirs), None, "must be a number")
    layers = _layers(c, sizes["num_layers"], c("head_dim"))
    return ModelSpec(
        **sizes,
        layers=segments_of(layers),
        head_dim=c("head_dim"),
        norm_offset=c.family.norm_offset,
        embed=Tokens(scale=c.family.scale_embed),
        head=(Tied if tied else Logits)(c("final_logit_softcapping")),
        dtype=dtype,
    )


def _layers(c: Fields, depth: int, head_dim: int | None) -> list[Layer]:
    """Returns the blocks of a model in order, each an attention and an MLP or MoE."""
    family, act = c.family, c("hidden_activation") or c("hidden_act")
    if family.scale_embed and act == "gelu":  # old files of Gemma mean the approximation
        act = "gelu_pytorch_tanh"
    require(act in ACTIVATIONS, at("hidden_act"), act, f"must be {', '.join(ACTIVATIONS)}")
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
    full, local = read_ropes(c)
    for i, (window, rotary) in enumerate(zip(_windows(c, depth), _rotary(c, depth), strict=True)):
        mask = Causal() if window is None else Causal() & Window(window)
        sparse = family.routed and i not in only and (i + 1) % step == 0
        rope = full if window is None else local
        own = dataclasses.replace(attention, mask=mask, rope=rope if rotary else None)
        found.append(Seq(own, _experts(c, mlp) if sparse else mlp))
    return found


def _experts(c: Fields, mlp: MLP) -> MoE:
    """Returns the mixture of experts that replaces `mlp`. It drops no token."""
    count, top_k = c("num_experts") or c("num_local_experts"), c("num_experts_per_tok")
    for name, value in {"num_experts": count, "num_experts_per_tok": top_k}.items():
        require(type(value) is int, at(name), value, "must be a number")
    balance = float(c("router_aux_loss_coef"))
    rule = TokenChoice(top_k, renormalise=bool(c("norm_topk_prob", True)), balance=balance, z=0.0)
    width, act = c("moe_intermediate_size"), mlp.activation
    return MoE(count, rule, width=width, activation=act, norm=mlp.norm, capacity_factor=None)


def _windows(c: Fields, depth: int) -> list[int | None]:
    """Returns the attention window of each layer in tokens, or None for no window."""
    size = c("sliding_window") if c("use_sliding_window", True) else None
    first, period = c("max_window_layers", 0), c("sliding_window_pattern", 0)
    slides = [i >= first and (not period or (i + 1) % period != 0) for i in range(depth)]
    if "no_rope_layers" in c.known:
        slides = [not rotary for rotary in _rotary(c, depth)]
    if (types := c("layer_types")) is not None:
        known = {"sliding_attention": True, "full_attention": False}
        accepted = f"must be {depth} of {', '.join(known)}"
        fits = len(types) == depth and set(types) <= set(known)
        require(fits, at("layer_types"), types, accepted)
        slides = [known[name] for name in types]
    return [size if slide else None for slide in slides]


def _rotary(c: Fields, depth: int) -> Sequence[int]:
    """Returns 1 for each layer with rotary positions, and 0 for each without."""
    period, given = c("no_rope_layer_interval", depth + 1), c("no_rope_layers")
    found = [int((i + 1) % period != 0) for i in range(depth)] if given is None else given
    require(len(found) == depth, at("no_rope_layers"), found, f"must be {depth} numbers")
    return found


def without_training(layer: Any) -> Any:
    """Returns a layer with the fields that matter only in training switched off."""
    if isinstance(layer, Attention):
        return dataclasses.replace(layer, received=False)
    if isinstance(layer, MoE) and isinstance(layer.rule, TokenChoice):
        rule = dataclasses.replace(layer.rule, balance=0.0, z=0.0, bias_rate=0.0)
        return dataclasses.replace(layer, rule=rule, capacity_factor=None)
    return layer


def write_config(spec: ModelSpec, family: Family) -> dict[str, Any]:
    """Returns the config.json of a spec in which each block is an Attention and an MLP or MoE.

    It has the rotary fields in both forms: older readers silently ignore the newer one. A family
    may be unable to express the spec; check that `read_config` returns an equal one.
    """
    blocks: list[Any] = spec.blocks()
    shape = spec.shape
    attentions, mlps = zip(*(block.parts for block in blocks), strict=True)
    theirs = {ours: act for act, ours in reversed(ACTIVATIONS.items())}
    act, first = theirs.get(mlps[0].activation), attentions[0]
    windows = [a.mask.reach[0] for a in attentions]
    full = [a.rope for a in attentions if a.rope and a.mask.reach[0] is None]
    sliding = [a.rope for a in attentions if a.rope and a.mask.reach[0] is not None]
    full, sliding = (full or sliding or [Rope()])[0], (sliding or full or [Rope()])[0]
    rope, local = write_rope(full), write_rope(sliding)
    both = {"full_attention": rope, "sliding_attention": local}
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
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
        "rope_scaling": scaling if full.scaling else None,
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
