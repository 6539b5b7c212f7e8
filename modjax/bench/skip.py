"""Skip in a model of SmolLM2-135M's shape: prefill, decoding, and tuning of routers.

Of 30 layers, 15 are routed: the second half, without the last. Prefill skips attentions, decoding
whole blocks. Weights are random. Thresholds are set so that half of the positions run or, for
sequences, 8 of the 15 layers.

Legend: B batch, L positions, A layers of one kind.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modjax.bench import Row, fill, progress
from modjax.bench.decode import NEW, copy, draw, prefilling, split
from modjax.bench.step import fastest, interleaved, jax_step, ratio
from modjax.decoding.generate import State, generate
from modjax.flops import forward_flops, total_flops
from modjax.nn import unstack
from modjax.nn.routing.skipping import Skipped
from modjax.specs import MLP, Attention, Layer, ModelSpec, Repeat, Seq, Skip, TrainConfig

CAPACITY, BY_SEQUENCE = 0.5, 8 / 15
ROUNDS = {512: 5, 2048: 5, 8192: 1}  # by length of the prompt
DECODED = ((1, 512), (1, 2048), (8, 512), (8, 2048))  # batch and context
BASE = ModelSpec(49_152, 576, 30, 9, 3, 1536, (Seq(Attention(), MLP("swiglu")),))
TRAIN = TrainConfig(2, 256, 1000, 1e-3, 10)
ROWS = (
    *(
        Row(f"prefill of {length}, attention skipped by {unit} / base / FLOP ratio", "ratio", most)
        for length, most in ((512, None), (2048, 1.08), (8192, None))
        for unit in ("token", "sequence")
    ),
    *(Row(f"prefill of {length}, by token / base in FLOPs", "ratio", None) for length in ROUNDS),
    *(
        Row(
            f"decode tokens/s, blocks by token over base, batch {batch}, context {context}",
            "ratio",
            1.2 if (batch, context) == (1, 2048) else None,
            "higher",
        )
        for batch, context in DECODED
    ),
    Row("share of positions that ran, by token", "share", None),
    Row("tuned step of 512 tokens / full step", "ratio", 0.55),
)


def routed(layer: Layer) -> ModelSpec:
    """Returns the model with `layer` in place of blocks 14 to 28, as in the paper."""
    depth = BASE.num_layers
    before, after = (Repeat(*BASE.layers, times=n) for n in (depth // 2 - 1, 1))
    return dataclasses.replace(BASE, layers=(before, Repeat(layer, times=depth // 2), after))


def measure() -> list[Row]:
    by_token = routed(Seq(Skip(Attention(), CAPACITY), MLP("swiglu")))
    by_sequence = routed(Seq(Skip(Attention(), BY_SEQUENCE, "sequence"), MLP("swiglu")))
    models = {
        "base": unstack(*split(BASE)),
        "token": unstack(*by_quantile(split(by_token))),
        "sequence": unstack(*every_other(split(by_sequence))),
    }
    specs = {"base": BASE, "token": by_token, "sequence": by_sequence}
    relative, flops = [], []
    for length, rounds in ROUNDS.items():
        steps = {name: prefilling(*model, "causal", length) for name, model in models.items()}
        seconds = interleaved(steps, rounds=rounds)
        progress(f"prefill of {length} tokens: seconds {fastest(seconds)}")
        counted = {name: prefill_flops(spec, length) for name, spec in specs.items()}
        for unit in ("token", "sequence"):
            expected = counted[unit] / counted["base"]
            relative.append(ratio(seconds, unit, "base") / expected)
        flops.append(counted["token"] / counted["base"])
    del models["token"], models["sequence"]
    blocks = by_quantile(split(routed(Skip(*BASE.layers, capacity=CAPACITY))))
    models["blocks"] = unstack(*blocks)
    drawn = [decoding(models, batch, context) for batch, context in DECODED]
    share = float(jnp.mean(record_of(*blocks, seed=2).selected_BL))  # of text that set no threshold
    del models, blocks
    tuned = dataclasses.replace(TRAIN, trained="routers")
    train = interleaved({"full": jax_step(BASE, TRAIN), "tuned": jax_step(by_token, tuned)})
    values = [*relative, *flops, *drawn, share, ratio(train, "tuned", "full")]
    return fill(ROWS, values)


def prefill_flops(spec: ModelSpec, length: int) -> float:
    """Returns the FLOPs of reading a prompt, without those of the logits."""
    found = forward_flops(spec, length, trains=False)
    return total_flops({name: flops for name, flops in found.items() if name != "logits"})


def skip_of(params: Any) -> Any:
    """Returns the weights of a model's routed layers, stacked."""
    blocks = params["stack"]["blocks"].values()
    parts = (part for block in blocks for part in block.get("parts", {"": block}).values())
    return next(part for part in parts if "router" in part)


def by_quantile(model: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns a model with random routers, whose thresholds let CAPACITY of the positions run."""
    graphdef, params = model
    skip = skip_of(params)
    skip["router"]["w"] = jax.random.normal(jax.random.key(0), skip["router"]["w"].shape)
    for _ in range(3):  # what a layer sees depends on the layers before it
        record = record_of(graphdef, params, seed=1)
        kept_A = jnp.quantile(record.scores_BL.reshape(len(record.scores_BL), -1), 1 - CAPACITY, 1)
        skip["rule"]["threshold"] = kept_A[:, None]
    return graphdef, params


def every_other(model: tuple[Any, Any]) -> tuple[Any, Any]:
    """Returns a model whose routed layers run in all positions and in none, in turns."""
    graphdef, params = model
    skip = skip_of(params)
    turns_A = np.arange(len(skip["rule"]["threshold"])) % 2
    skip["rule"]["threshold"] = jnp.where(turns_A == 0, -jnp.inf, jnp.inf)[:, None]
    return graphdef, params


@functools.partial(jax.jit, static_argnames=("graphdef", "seed"))
def record_of(graphdef: Any, params: Any, seed: int) -> Skipped:
    """Returns the record of the routed layers, on random tokens."""
    tokens_BL = np.random.default_rng(seed).integers(0, BASE.vocab_size, (2, 256))
    records = nnx.merge(graphdef, params)(tokens_BL)[1]
    return next(r for r in records.values() if isinstance(r, Skipped))


def decoding(models: dict[str, tuple[Any, Any]], batch: int, context: int) -> float:
    """Returns the tokens per second of "blocks" over those of "base", at the end of a context."""
    states = {name: start(*model, batch, context) for name, model in models.items()}
    steps = {name: functools.partial(draw, *model) for name, model in models.items()}
    inputs = {name: functools.partial(copy, state) for name, state in states.items()}
    seconds = interleaved(steps, rounds=5, inputs=inputs)
    progress(f"{NEW} tokens, batch {batch}, context {context}: seconds {fastest(seconds)}")
    return ratio(seconds, "base", "blocks")


def start(graphdef: Any, params: Any, batch: int, context: int) -> State:
    """Returns the decoding state after a prompt of `context` - NEW tokens."""
    tokens_BL = np.random.default_rng(3).integers(0, BASE.vocab_size, (batch, context - NEW))
    found = generate(graphdef, params, tokens_BL, max_new_tokens=0, max_length=context)
    return found.state
