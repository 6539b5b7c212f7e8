"""Controls: routers that skip the same share of each layer's positions, but not by content.

`modjax score --imports experiments/router_tuning/controls.py` reads their files. `write` makes them
from a tuned model's file and the share of positions at which each of its layers ran.

Legend: B batch, L positions, D model width, R scores of a position.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import modjax
from modjax.nn import At, Call, LayerModule, Out, make_param
from modjax.nn.weights import places
from modjax.pretrained import from_pretrained, save_routers
from modjax.pretrained.tensors import abstract, by_number
from modjax.specs import Cost, First, Quantile, Router, Seq, Skip
from modjax.specs.layer import segments_of

GOLDEN = 0.6180339887  # its multiples modulo 1 are evenly spread
ALWAYS, NEVER = -1.0, 2.0  # thresholds of scores in [0, 1)
KINDS = ("random", "pattern", "mean", "static")
ENDS = ("rule.threshold", "router.seed")


@dataclasses.dataclass(frozen=True)
class Pattern(Router):
    """Scores that are evenly spread over [0, 1), by position alone."""

    def cost(self, shape, load, outputs=1):
        yield Cost("router", params=1, role="router")


@dataclasses.dataclass(frozen=True)
class Dice(Pattern):
    """Random scores in [0, 1), by the position, its input and the layer."""


class PatternScores(LayerModule):
    def __init__(self, spec, shape, *, outputs, rngs):
        self.seed = make_param(jnp.zeros(1), ("replicated",), role="router", decays=False)

    def __call__(self, h_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        spread_BL = (at.positions_BL.astype(jnp.float32) + self.seed[...][None]) * GOLDEN % 1
        return Out(jnp.broadcast_to(spread_BL, h_BLD.shape[:2])[..., None])


class DiceScores(PatternScores):
    def __call__(self, h_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        # The input is a seed that differs between sequences, too.
        bits_BLD = jax.lax.bitcast_convert_type(h_BLD.astype(jnp.float32), jnp.uint32)
        odd_D = 2 * jnp.arange(h_BLD.shape[-1], dtype=jnp.uint32) + 1
        mixed_BL = jnp.sum(bits_BLD * odd_D[None, None], axis=-1, dtype=jnp.uint32)
        key = jax.random.key(self.seed[...][0].astype(jnp.int32))

        def one(data, position):
            own = jax.random.fold_in(jax.random.fold_in(key, data), position)
            return jax.random.uniform(own)

        pairs = jnp.broadcast_arrays(mixed_BL, at.positions_BL)
        return Out(jax.vmap(jax.vmap(one))(*pairs)[..., None])


modjax.register(Pattern, PatternScores)
modjax.register(Dice, DiceScores)


def write(base: Path, routers: Path, shares: list[float], order: list[int], out: Path) -> None:
    """Writes out/KIND.safetensors for each of KINDS.

    shares: of the layers' positions that ran, in order.
    order: places of the layers in that order, the least harmful to drop first.
    """
    tuned = from_pretrained(base, routers=routers)
    for kind in KINDS:
        ran = {"mean": [float(share > 0.5) for share in shares], "static": dropped(shares, order)}
        rates = iter(ran.get(kind, shares))

        def skip(layer, kind=kind, rates=rates):
            if isinstance(layer, Skip):
                share = next(rates)
                return dataclasses.replace(
                    layer,
                    capacity=max(share, 0.01),
                    unit="token",
                    keys=layer.keys if share else "routed",
                    router=Dice() if kind == "random" else Pattern(),
                    rule=Quantile(),
                    causal=First(1),
                )
            if isinstance(layer, Seq):
                return Seq(*(skip(part, kind, rates) for part in layer.parts))
            return layer

        layers = segments_of([skip(block) for block in tuned.spec.blocks()])
        spec = dataclasses.replace(tuned.spec, layers=layers)
        model = abstract(spec)
        state = jax.tree.map(
            lambda leaf: np.zeros(leaf.shape, leaf.dtype), nnx.to_pure_dict(nnx.split(model)[1])
        )
        of = {end: {n: p for n, p in places(model).items() if n.endswith(end)} for end in ENDS}
        for i, share in enumerate(ran.get(kind, shares)):
            bound, seed = (found[sorted(found, key=by_number)[i]] for found in of.values())
            bound.parameter(state)[bound.index] = {0.0: NEVER, 1.0: ALWAYS}.get(share, 1 - share)
            seed.parameter(state)[seed.index] = 7.0 * i
        out.mkdir(parents=True, exist_ok=True)
        save_routers(out / f"{kind}.safetensors", spec, state, base)


def dropped(shares: list[float], order: list[int]) -> list[float]:
    """Returns the shares that run if whole layers are dropped, one of them in part."""
    ran, excess = [1.0] * len(shares), sum(1 - share for share in shares)
    for i in order:
        ran[i] = 1 - min(excess, 1.0)
        excess = max(excess - 1, 0.0)
    return ran
