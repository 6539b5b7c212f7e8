"""Decoding: MoD against dense, and dense against reading its parameters once. Also prefill.

d 512, 12 layers, a context of 1024. In every other block of the MoD model, a predictor routes 12.5%
of the tokens. Its threshold is set so that random weights route as often as a trained model. The
"paced" routing limits the tokens routed, so the KV caches are bounded.

Legend: B batch, L positions, A layers of one kind, O new tokens.
"""

import dataclasses
import functools
import statistics
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modjax.bench import Row, fill, progress
from modjax.bench.step import MOD as STEP_MOD
from modjax.bench.step import ROUNDS, interleaved, jax_step, ratio
from modjax.decoding.generate import Sampling, State, generate, resume
from modjax.flops import cache_bytes
from modjax.nn import Routed, Transformer, unstack
from modjax.specs import Dense, MoD, ModelSpec, Predictor

CONTEXT, NEW, SLACK = 1024, 64, 1.5
DENSE = ModelSpec(
    vocab_size=1024, d_model=512, num_layers=12, num_heads=8, num_kv_heads=8, d_ff=2048
)
TAUGHT = (Dense(), MoD(Dense(), capacity=0.125, causal=Predictor()))
MOD = dataclasses.replace(DENSE, layers=TAUGHT)
ROWS = (
    Row("decode tokens/s, MoD over dense, batch 1", "ratio", 1.5, "higher"),
    Row("decode tokens/s, MoD over dense, batch 16", "ratio", 1.35, "higher"),
    Row("KV cache bytes, MoD over dense, slack 1.5", "ratio", 0.62),
    Row("dense decode, batch 1 / reading all parameters once", "ratio", 1.5),
    Row("prefill, predictor routing / top-k routing", "ratio", 1.15),
    Row("prefill, paced routing / top-k routing", "ratio", None),
    Row("train step, with predictor / without", "ratio", 1.03),
    Row("share of tokens that the MoD model routed", "share", None),
)


def measure() -> list[Row]:
    stacked = split(DENSE)
    models = {"dense": unstack(*stacked), "mod": unstack(*calibrated(split(MOD)))}
    seconds, states = {}, {}
    for batch in (1, 16):
        paces = {"dense": "causal", "mod": "paced"}
        states = {name: start(*model, batch, paces[name]) for name, model in models.items()}
        read = {"read": reading(stacked[1])} if batch == 1 else {}
        seconds[batch] = _draw_in_turn(models, states, batch, read)
    depths_BO = draw(*models["mod"], states["mod"])
    routings = ("predictor", "paced", "trained")
    prefill = interleaved({r: prefilling(*models["mod"], r) for r in routings})
    taught = dataclasses.replace(STEP_MOD, layers=TAUGHT)
    steps = {"with": jax_step(taught), "without": jax_step(STEP_MOD)}
    train = interleaved(steps, rounds=3 * ROUNDS)  # their difference is below a pair's noise
    values = [
        ratio(seconds[1], "dense", "mod"),
        ratio(seconds[16], "dense", "mod"),
        cache_bytes(MOD, CONTEXT, SLACK) / cache_bytes(DENSE, CONTEXT, SLACK),
        ratio(seconds[1], "dense", "read") / NEW,
        ratio(prefill, "predictor", "trained"),
        ratio(prefill, "paced", "trained"),
        ratio(train, "with", "without"),
        float(jnp.mean(depths_BO)) / (MOD.num_layers // 2),
    ]
    return fill(ROWS, values)


def draw_in_turn(configs: Mapping[str, ModelSpec]) -> dict[str, list[float]]:
    """Returns the seconds that each model takes to generate NEW tokens at batch 1, by round."""
    models = {name: unstack(*split(config)) for name, config in configs.items()}
    states = {name: start(*model, 1, "causal") for name, model in models.items()}
    return _draw_in_turn(models, states, 1, {})


def _draw_in_turn(
    models: Mapping[str, tuple[Any, Any]],
    states: Mapping[str, State],
    batch: int,
    others: Mapping[str, Callable[[], Any]],
) -> dict[str, list[float]]:
    """Returns the seconds that each model takes to generate NEW tokens, and those of `others`."""
    steps = {name: functools.partial(draw, *model) for name, model in models.items()}
    inputs = {name: functools.partial(copy, state) for name, state in states.items()}
    seconds = interleaved({**steps, **others}, inputs=inputs)
    rates = {name: round(NEW * batch / statistics.median(seconds[name]), 1) for name in models}
    progress(f"decoding, batch {batch}: tokens per second {rates}")
    return seconds


def split(config: ModelSpec) -> tuple[Any, Any]:
    graphdef, params = nnx.split(Transformer(config, rngs=nnx.Rngs(0)))
    return graphdef, nnx.to_pure_dict(params)


def calibrated(model: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns the model whose predictors accept scores above the mean k-th highest score.

    A predictor costs the same with any weights.
    """
    graphdef, params = model
    tokens_BL = np.random.default_rng(1).integers(0, DENSE.vocab_size, (4, CONTEXT))
    _, records = jax.jit(lambda params: nnx.merge(graphdef, params)(tokens_BL))(params)
    layers = (name for name, record in records.items() if isinstance(record, Routed))
    for name in layers:
        predictor = params["stack"]["blocks"][name]["causal"]
        predictor["w_out"] = jnp.zeros_like(predictor["w_out"])
        kth_A = jnp.mean(records[f"{name}/rule"].kth_B, axis=1)
        predictor["line"] = jnp.stack([jnp.ones_like(kth_A), -kth_A], axis=1)
    return graphdef, params


def start(graphdef: Any, params: Any, batch: int, routing: str) -> State:
    """Returns the decoding state after a prompt of CONTEXT - NEW tokens."""
    tokens_BL = np.random.default_rng(2).integers(0, DENSE.vocab_size, (batch, CONTEXT - NEW))
    read = functools.partial(generate, routing=routing, slack=SLACK)
    return read(graphdef, params, tokens_BL, max_new_tokens=0, max_length=CONTEXT).state


def copy(state: State) -> State:
    return jax.block_until_ready(jax.tree.map(jnp.copy, state))


def draw(graphdef: Any, params: Any, state: State) -> jax.Array:
    """Generates NEW tokens, which consumes `state`.

    Returns the number of routed blocks that processed each token, shape (B, O).
    """
    found = resume(graphdef, params, state, max_new_tokens=NEW, sampling=Sampling())
    return jax.block_until_ready(found.depths_BO)


def reading(params: Any) -> Any:
    """Returns a step that reads every parameter once, as decoding one token must.

    params: stacked, since few large arrays are read fastest.
    """
    total = jax.jit(lambda params: [jnp.sum(leaf) for leaf in jax.tree.leaves(params)])
    return lambda: jax.block_until_ready(total(params))


def prefilling(graphdef: Any, params: Any, routing: str, length: int = CONTEXT) -> Any:
    """Returns a step that reads a prompt, up to the logits of its last token."""
    tokens_BL = np.random.default_rng(3).integers(0, DENSE.vocab_size, (1, length))
    lengths_B = jnp.full(1, length)

    def prefill(params):
        read = nnx.merge(graphdef, params).reader(max_length=length, routing=routing)
        return read(jnp.asarray(tokens_BL), lengths_B, None)[:2]

    compiled = jax.jit(prefill)
    return lambda: jax.block_until_ready(compiled(params))
