"""Conversion of the rotary fields of config.json to specs.Rope, and back."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from modjax.errors import InputError, describe, require
from modjax.pretrained.families import CONTEXT, Fields, at
from modjax.specs import ByWavelength, Divided, Interpolated, Rope, Yarn

# `rope_type` -> our scaling, and Hugging Face's names of its fields, in order.
ROPES = {
    "linear": (Interpolated, ["factor"]),
    "llama3": (ByWavelength, ["factor", "low_freq_factor", "high_freq_factor", CONTEXT]),
    "yarn": (Yarn, ["factor", CONTEXT, "attention_factor", "beta_fast", "beta_slow", "truncate"]),
    "longrope": (Divided, ["short_factor", "long_factor", CONTEXT, "attention_factor"]),
}


def read_ropes(c: Fields) -> tuple[Rope, Rope]:
    """Returns the rotary positions of layers without a window, and those of layers with one."""
    given, scaling = c("rope_parameters") or {}, c("rope_scaling") or {}
    nested = bool(given.keys() & {"full_attention", "sliding_attention"})
    try:
        full = given.get("full_attention", {}) if nested else given
        rope = _rope(c, {**full, **scaling}, "rope_theta")
        if "rope_local_base_freq" not in c.known:
            return rope, rope
        sliding = given.get("sliding_attention", {}) if nested else {}
        return rope, _rope(c, sliding, "rope_local_base_freq")
    except InputError:
        raise
    except (ArithmeticError, LookupError, TypeError, ValueError) as error:
        accepted = f"a field is missing, or of another kind: {describe(error)}"
        raise InputError(at("rope_parameters"), given or scaling, accepted) from error


def _rope(c: Fields, given: Mapping[str, Any], theta_field: str) -> Rope:
    """Returns the rotary positions that rope parameters describe.

    given: the parameters, as in `rope_parameters`.
    theta_field: an older field of config.json that may hold the base.
    """
    given, where = (
        {k: v for k, v in given.items() if v is not None},
        at("rope_parameters"),
    )
    base, older = given.pop("rope_theta", c(theta_field)), c.values.get(theta_field)
    require(older in (None, base), at(theta_field), older, f"{where}.rope_theta is {base}")
    share = c("partial_rotary_factor", 1.0)
    if "partial_rotary_factor" in c.known or given.get("partial_rotary_factor") == 1:
        share = given.pop("partial_rotary_factor", share)
    rope = Rope(float(base), float(share))
    older_kind = given.pop("type", "default")
    kind = given.pop("rope_type", older_kind)
    known = kind == "default" or kind in ROPES
    require(known, f"{where}.rope_type", kind, f"must be default, {', '.join(ROPES)}")
    scaling, names = ROPES.get(kind, (None, []))
    if CONTEXT in names:
        given.setdefault(CONTEXT, c(CONTEXT) or c.values.get("max_position_embeddings"))
    if "attention_factor" in names:
        if "attention_factor" not in given:
            length = c.values.get("max_position_embeddings")
            factor = given.get("factor") or length / given[CONTEXT]
            given["attention_factor"] = _attention_factor(kind, given, factor)
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


def _attention_factor(kind: str, given: Mapping[str, Any], factor: float) -> float:
    """Returns the default factor of cos and sin. factor: extended over original context."""
    if factor <= 1:
        return 1.0
    if kind == "longrope":
        return math.sqrt(1 + math.log(factor) / math.log(given[CONTEXT]))
    one, other = given.get("mscale"), given.get("mscale_all_dim")
    if one and other:
        return (0.1 * one * math.log(factor) + 1) / (0.1 * other * math.log(factor) + 1)
    return 0.1 * math.log(factor) + 1


def write_rope(rope: Rope) -> dict[str, Any]:
    """Returns the `rope_parameters` of rotary positions."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.base}
    if rope.share != 1:
        found["partial_rotary_factor"] = rope.share
    for kind, (scaling, names) in ROPES.items():
        if type(rope.scaling) is scaling:
            values = [getattr(rope.scaling, f.name) for f in dataclasses.fields(scaling)]
            found |= {"rope_type": kind} | dict(zip(names, values, strict=True))
    return found
