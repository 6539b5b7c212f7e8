"""Mixtures of experts of every kind, and a loop over positions in numpy that computes the same.

Legend: B batch, S positions, D width, E experts.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modjax.nn import At, Call, build
from modjax.nn.call import number_rows
from modjax.specs import ExpertChoice, ExpertThreshold, MoE, Shape, TokenChoice

B, S, D, F = 3, 20, 16, 24
SHAPE = Shape(D, 2, 2, 2, 8, F, 1e-6)

CASES = {
    "top 1 with drops": MoE(4, capacity_factor=0.75),
    "top 2": MoE(4, TokenChoice(2)),
    "top 2 of 1.0 with drops": MoE(4, TokenChoice(2), capacity_factor=1.0),
    "renormalised": MoE(4, TokenChoice(2, renormalise=True), activation="swiglu"),
    "dropless": MoE(4, TokenChoice(2), capacity_factor=None, width=8),
    "as DeepSeek": MoE(
        4, TokenChoice(2, "sigmoid", 2.5, renormalise=True, bias_rate=0.1, balance=0.0), shared=1
    ),
    "no-ops": MoE(4, TokenChoice(no_ops=4), capacity_factor=1.0),
    "no-ops, renormalised": MoE(4, TokenChoice(2, no_ops=2, renormalise=True), norm="both"),
    "no-ops, dropless": MoE(4, TokenChoice(3, no_ops=4), capacity_factor=None, norm="after"),
    "expert choice": MoE(4, ExpertChoice(2), capacity_factor=1.0),
    "threshold": MoE(4, ExpertThreshold(2)),
    "threshold with drops": MoE(4, ExpertThreshold(2), capacity_factor=0.75),
}


def rows_of(spec):
    return spec.rule.outputs(spec.experts)


def layer_of(spec, seed=0):
    """Returns the layer, with a bias and thresholds that change picks."""
    layer = build(spec, SHAPE, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    rule = layer.rule
    if getattr(rule, "bias", None) is not None:
        rule.bias[...] = jnp.float32(0.3 * rng.standard_normal(spec.rule.outputs(spec.experts)))
    if hasattr(rule, "threshold"):
        rule.threshold[...] = jnp.float32([0.2, 0.25, 0.3, 0.35][: spec.experts])
    return layer


def inputs(batch=B, length=S, seed=1):
    return jnp.float32(np.random.default_rng(seed).standard_normal((batch, length, D)))


def call(layer, x_BLD, valid_BL=None, routing="trained", key=3):
    positions, rows = jnp.arange(x_BLD.shape[1])[None], number_rows(*x_BLD.shape[:2])
    at = At(positions, None, valid_BL, {}, {}, rows)
    return layer(x_BLD, at, Call(routing, None, jax.random.key(key)))


ACT = {
    "gelu": lambda h: 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3))),
    "swiglu": lambda h: h / (1 + np.exp(-h)),
}


def normed(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def mlp(y, of, activation):
    h = y @ of["w_in"]
    h = ACT[activation](y @ of["w_gate"]) * h if "w_gate" in of else ACT[activation](h)
    return h @ of["w_out"].T


def by_loop(spec, params, measured, x_BLD, valid_BL=None, routing="trained"):
    """Returns the stream after the layer in float64 and the dropped picks, position by position."""
    out, dropped, rule = np.array(x_BLD, float), 0, spec.rule
    for b, x_LD in enumerate(np.array(x_BLD, float)):
        y_LD = normed(x_LD, params["norm"]) if "norm" in params else x_LD
        logits = y_LD @ params["w"]
        e = np.exp(logits - logits.max(1, keepdims=True))
        scores = 1 / (1 + np.exp(-logits)) if rule.scores == "sigmoid" else e / e.sum(1)[:, None]
        valid = np.ones(len(x_LD), bool) if valid_BL is None else np.array(valid_BL[b])
        limit = spec.slots(int(valid.sum())) if routing == "trained" else len(x_LD)
        count = np.zeros(spec.experts, int)
        best = np.argsort(np.where(valid, scores.T, -1), axis=1)[:, ::-1][:, :limit]
        for s in range(len(x_LD)):
            if not valid[s]:
                continue
            if isinstance(rule, TokenChoice):
                ranking = scores[s] + measured.get("bias", 0)
                rows = np.argsort(-ranking)[: rule.top_k]
                picks = [r for r in rows if r < spec.experts]
            elif isinstance(rule, ExpertThreshold):
                picks = np.flatnonzero(scores[s] > measured["threshold"])
            else:
                picks = [r for r in range(spec.experts) if s in best[r]]
            weights = np.array([scores[s, r] for r in picks])
            if getattr(
                rule, "renormalise", False
            ):  # by all picks, as LongCat's router does: no-ops among them
                weights = weights / scores[s, rows].sum()
            z = np.zeros(D)
            for r, weight in zip(picks, rule.scale * weights, strict=True):
                count[r] += 1
                if count[r] > limit:
                    dropped += 1
                    continue
                of = {name: w[r] for name, w in params["experts"].items()}
                z = z + weight * mlp(y_LD[s], of, spec.activation)
            if spec.shared:
                z = z + mlp(y_LD[s], params["shared"], spec.activation)
            out[b, s] += normed(z, params["norm_after"]) if "norm_after" in params else z
    return out, dropped


def arrays(layer):
    """Returns the layer's parameters and measured numbers, by name."""
    params = {"w": layer.router.w[...], "experts": {n: w[...] for n, w in layer.experts.items()}}
    for name in ("norm", "norm_after"):
        if getattr(layer, name) is not None:
            params[name] = getattr(layer, name).scale[...]
    if layer.shared is not None:
        params["shared"] = {name: w[...] for name, w in layer.shared.items()}
    measured = {
        n: np.array(getattr(layer.rule, n)[...], float)
        for n in ("bias", "threshold")
        if getattr(layer.rule, n, None) is not None
    }
    return jax.tree.map(lambda p: np.array(p, float), params), measured


def with_arrays(layer, params):
    """Returns the layer with other parameters, which may be traced."""
    graphdef, state = nnx.split(layer)
    values = nnx.to_pure_dict(state)
    values["router"]["w"] = params["w"]
    for group in ("experts", "shared"):
        if group in params:
            values[group] = params[group]
    for name in ("norm", "norm_after"):
        if name in params:
            values[name] = {"scale": params[name]}
    return nnx.merge(graphdef, values)


VALID_BL = jnp.arange(S)[None] < jnp.array([S, 13, 0])[:, None]
