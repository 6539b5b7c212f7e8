"""Small layers and models on several residual streams.

Legend: B batch, L positions, S streams, D model width.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modjax.nn import At, Transformer, build
from modjax.specs import (
    MLP,
    AltUp,
    Attention,
    Dense,
    Gemma3nAltUp,
    HyperConnection,
    ManifoldHyperConnection,
    MoD,
    ModelSpec,
    MoE,
    Recycled,
    Seq,
    Shape,
    SimplifiedAltUp,
)
from tests.nn.small import QUICK

B, L, S, D, F = 2, 3, 3, 4, 6
SHAPE = Shape(D, 2, 2, 2, 2, F, 1e-6, S)
INNER = MLP("relu2")


def rms_norm(x, scale):
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True) + 1e-6) * scale


def inner(p, x):
    hidden = np.maximum(rms_norm(x, p["norm"]["scale"]) @ p["w_in"], 0) ** 2
    return x + hidden @ p["w_out"].T


def here(length):
    return At(jnp.arange(length)[None], None, None, {}, {})


def random_layer(spec, seed=0, shape=SHAPE):
    """Returns the graph definition and random parameters of a layer."""
    graphdef, state = nnx.split(build(spec, shape, rngs=nnx.Rngs(0)))
    rng = np.random.default_rng(seed)
    params = nnx.to_pure_dict(state)
    return graphdef, jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape), params)


TOKENS = np.random.default_rng(0).integers(0, 20, (2, 9))
TWO = Recycled(2)


def model(*layers, streams=TWO, **changes):
    return ModelSpec(20, 8, 4, 2, 2, 16, layers=layers, streams=streams, **changes)


def alternating(kind, inner, streams=2, **options):
    return tuple(kind(inner, active=i, **options) for i in range(streams))


def logits(config, params=None, **options):
    graphdef, state = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    params = nnx.to_pure_dict(state) if params is None else params

    def run(params):
        return nnx.merge(graphdef, params)(TOKENS, **options)[0]

    return jax.jit(run, compiler_options=QUICK)(params)


def params_of(config):
    return nnx.to_pure_dict(nnx.state(Transformer(config, rngs=nnx.Rngs(0))))


def connected(active, kind=HyperConnection, **options):
    pair = Attention(), MLP()
    return Seq(*(kind(p, (active + i) % 2, **options) for i, p in enumerate(pair)))


START = {
    "alternating": model(*alternating(AltUp, Dense())),
    "same": model(AltUp(Dense()), AltUp(Dense())),
    "four streams": model(*alternating(AltUp, Dense(), 4), streams=Recycled(4)),
    "sum": model(*alternating(AltUp, Dense(), learned=False)),
    "simplified": model(*alternating(SimplifiedAltUp, Dense())),
    "static": model(connected(0), connected(1)),
    "dynamic": model(connected(0, dynamic=True), connected(1, dynamic=True)),
    "mHC": model(*(connected(i, ManifoldHyperConnection) for i in range(2))),
    "Gemma 3n": model(Gemma3nAltUp(Dense()), Gemma3nAltUp(Dense())),
    "around MoD": model(*alternating(AltUp, MoD(capacity=0.5))),
    "around MoE": model(*alternating(AltUp, Seq(Attention(), MoE(2)))),
}
