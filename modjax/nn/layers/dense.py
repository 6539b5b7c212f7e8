"""Base class of sublayers, MLPs, and sequences of layers.

Legend: B batch, L positions, D model width, F feed-forward width.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.typing import DTypeLike

from modjax import specs
from modjax.kernels import constrain_stream, project, project_back
from modjax.nn.build import LayerModule, build
from modjax.nn.call import At, Call, Out, under
from modjax.nn.params import bias_param, make_param, normal_param, read
from modjax.specs.layers.dense import GATED

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": jax.nn.gelu,
    "geglu": jax.nn.gelu,
    "silu": jax.nn.silu,
    "swiglu": jax.nn.silu,
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}

Product = Callable[[jax.Array, jax.Array], jax.Array]


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation with a scale (arXiv 1910.07467, Eq. 4), in float32."""

    def __init__(self, width: int, shape: specs.Shape):
        self.eps, self.offset = shape.norm_eps, shape.norm_offset
        scale = jnp.full((width,), 1 - self.offset, jnp.float32)
        self.scale = make_param(scale, ("replicated",), role="norm")

    @jax.named_scope("norm")
    def __call__(self, x_BLD: jax.Array) -> jax.Array:
        scale = read(self.scale) + self.offset if self.offset else read(self.scale)
        return (unit_rms(x_BLD, self.eps) * _aligned(scale, x_BLD)).astype(x_BLD.dtype)


def unit_rms(x_BLD: jax.Array, eps: float) -> jax.Array:
    """Returns x divided by its root mean square, in float32."""
    x32_BLD = x_BLD.astype(jnp.float32)
    return x32_BLD * jax.lax.rsqrt(mean_square(x32_BLD) + eps)


def mean_square(x_BLD: jax.Array) -> jax.Array:
    """Returns the mean of x^2 at each position in float32, (B, L, 1)."""
    return jnp.mean(jnp.square(x_BLD.astype(jnp.float32)), axis=-1, keepdims=True)


class Sublayer(LayerModule):
    """Base class of layers that add to the stream, with a norm before, after, or both.

    A subclass computes its addition from `before(x)` alone; nn/layers/streams.py relies on it.
    """

    def __init__(self, norm: str, shape: specs.Shape):
        self.norm = RMSNorm(shape.d_model, shape) if norm != "after" else None
        self.norm_after = RMSNorm(shape.d_model, shape) if norm != "before" else None

    def before(self, x_BLD: jax.Array) -> jax.Array:
        return x_BLD if self.norm is None else self.norm(x_BLD)

    def added(self, x_BLD: jax.Array, y_BLD: jax.Array) -> jax.Array:
        return x_BLD + (y_BLD if self.norm_after is None else self.norm_after(y_BLD))


class MLP(Sublayer):
    """Two matrices around an activation, or three for a gated activation (arXiv 2002.05202)."""

    def __init__(self, spec: specs.MLP, shape: specs.Shape, *, rngs: nnx.Rngs):
        super().__init__(spec.norm, shape)
        d, f = shape.d_model, shape.d_ff
        self.spec = spec
        std = 1 / math.sqrt(d)
        self.w_in = normal_param(rngs, (d, f), ("embed", "mlp"), std=std)
        if spec.activation in GATED:
            self.w_gate = normal_param(rngs, (d, f), ("embed", "mlp"), std=std)
        # The long dim last: a single position does little but read the matrix, and rows of d_ff
        # numbers are read faster than rows of d_model.
        output_std = 1 / math.sqrt(f) / depth_scale(shape)
        self.w_out = normal_param(rngs, (d, f), ("embed", "mlp"), std=output_std, transposed=True)
        if spec.bias:
            self.b_in, self.b_out = bias_param((f,), ("mlp",)), bias_param((d,), ("embed",))
            if spec.activation in GATED:
                self.b_gate = bias_param((f,), ("mlp",))

    def __call__(self, x_BLD: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        names = mlp_weights(self.spec.activation)
        if self.spec.bias:
            names += tuple(name.replace("w_", "b_") for name in names)
        weights = {name: read(getattr(self, name), x_BLD.dtype) for name in names}
        y_BLD = mlp(self.before(x_BLD), weights, self.spec.activation, project, project_back)
        return Out(self.added(x_BLD, y_BLD))


def mlp_weights(activation: str) -> tuple[str, ...]:
    """Returns the names of the matrices of an MLP, each (D, F)."""
    return ("w_in", "w_gate", "w_out") if activation in GATED else ("w_in", "w_out")


@jax.named_scope("mlp")
def mlp(
    x: jax.Array, weights: Mapping[str, Any], activation: str, product: Product, back: Product
) -> jax.Array:
    """Returns the output of an MLP. product, back: multiply by a matrix and by its transpose."""
    act = ACTIVATIONS[activation]
    h = checkpoint_name(plus(product(x, weights["w_in"]), weights.get("b_in")), "hidden")
    if "w_gate" in weights:
        gate = plus(product(x, weights["w_gate"]), weights.get("b_gate"))
        h = act(checkpoint_name(gate, "hidden")) * h
    else:
        h = act(h)
    return plus(back(h, weights["w_out"]), weights.get("b_out"))


def plus(x: jax.Array, bias: jax.Array | None) -> jax.Array:
    return x if bias is None else x + _aligned(bias.astype(x.dtype), x)


def _aligned(values: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `values`, which have the last dims of x, with as many dims as x."""
    return jnp.expand_dims(values, tuple(range(x.ndim - values.ndim)))


class Seq(LayerModule):
    """Runs layers one after another."""

    def __init__(self, spec: specs.Seq, shape: specs.Shape, *, rngs: nnx.Rngs):
        self.spec = spec
        parts = names(spec.parts).items()
        self.parts = nnx.Dict({name: build(part, shape, rngs=rngs) for name, part in parts})

    def __call__(self, x: jax.Array, at: At, call: Call, cache: Any = None) -> Out:
        layers = {name: self.parts[name] for name in names(self.spec.parts)}
        out = in_order(layers, x, at, call, cache)
        return out._replace(records=under("parts", out.records))

    def empty(self, batch: int, length: int, slack: float | None, dtype: DTypeLike) -> Any:
        return {name: p.empty(batch, length, slack, dtype) for name, p in self.parts.items()}


def in_order(
    layers: Mapping[str, Any], x: jax.Array, at: At, call: Call, cache: Any, first: int = 0
) -> Out:
    """Runs layers in order; returns records and cache updates by their names.

    cache: the caches by the same names, or None. first: index of the first layer, for PRNG keys.
    """
    writes, records, depth_BL = {}, {}, 0
    passed: dict[str, jax.Array] = {}
    for index, (name, layer) in enumerate(layers.items(), first):
        here = at._replace(passed={**at.passed, **passed})
        out = layer(x, here, call.inside(index), None if cache is None else cache[name])
        x, writes[name] = constrain_stream(out.x), out.write
        records |= under(name, out.records)
        passed |= out.passed
        depth_BL = depth_BL + out.depth_BL
    return Out(x, () if cache is None else writes, records, passed, depth_BL)


def names(parts: Iterable[specs.Layer], start: int = 0) -> dict[str, specs.Layer]:
    """Returns layers by the names of their modules: index and class, as in 1_mod."""
    return {f"{i}_{type(part).__name__.lower()}": part for i, part in enumerate(parts, start)}


def depth_scale(shape: specs.Shape) -> float:
    """Returns the root of the number of residual additions; GPT-2 divides output weights by it."""
    return math.sqrt(2 * shape.num_layers)
