"""Mixture of experts: the train step and decoding against dense models of equal FLOPs, and MoDE.

d 256, 8 layers, 512 positions, batch 8 as `bench step`, and decoding at d 512, 12 layers.
"""

import dataclasses
import os
import statistics
from typing import Any

import numpy as np

from modjax.bench import Row, fill, progress
from modjax.bench.decode import DENSE as DECODED
from modjax.bench.decode import drawn_in_turn
from modjax.bench.step import DENSE, TRAIN, interleaved, jax_step, ratio
from modjax.flops import train_flops
from modjax.specs import (
    Attention,
    Execution,
    Layer,
    MoD,
    ModelSpec,
    MoE,
    Seq,
    TokenChoice,
    TrainConfig,
)
from modjax.training.mesh import make_mesh
from modjax.training.programs import lower_train_step
from modjax.training.state import abstract_model

TIGHT = MoE(8, capacity_factor=1.0)
ROWS = (
    Row("MoE (E 8, k 1, cf 1.0) step / dense step", "ratio", 1.05),
    Row("MoE (E 16, k 2, cf 1.25) step / dense step / FLOP ratio", "ratio", 1.10),
    Row("dropless MoE (E 8, k 2) step / dense step", "ratio", 1.25),
    Row("integrated MoDE step / MoE step / FLOP ratio", "ratio", 1.05),
    Row("staged MoDE step / MoE step / FLOP ratio", "ratio", 1.05),
    Row("decode tokens/s, batch 1, MoE (E 8, k 1) over dense", "ratio", 0.95, "higher"),
    Row("v5e 2x4, expert axis 8: FLOPs per device / useful FLOPs, cf 1.25", "ratio", 1.30),
)


def with_experts(moe: MoE) -> Seq:
    return Seq(Attention(), moe)


def model(*layers: Layer) -> ModelSpec:
    return dataclasses.replace(DENSE, layers=layers)


MODELS = {
    "dense": DENSE,
    "moe": model(with_experts(TIGHT)),
    "moe 16": model(with_experts(MoE(16, TokenChoice(2), width=512))),
    "dropless": model(with_experts(MoE(8, TokenChoice(2), width=512, capacity_factor=None))),
    "integrated": model(with_experts(dataclasses.replace(TIGHT, rule=TokenChoice(no_ops=8)))),
    "staged": model(with_experts(TIGHT), MoD(with_experts(TIGHT), capacity=0.125)),
}


def measure() -> list[Row]:
    tokens = np.random.default_rng(0).integers(0, 259, (TRAIN.batch_size, TRAIN.seq_len + 1))
    seconds = interleaved({name: jax_step(config, tokens) for name, config in MODELS.items()})
    medians = {name: round(statistics.median(found), 3) for name, found in seconds.items()}
    progress(f"bench moe: median seconds {medians}")
    flops = {name: train_flops(config, TRAIN.seq_len, 1) for name, config in MODELS.items()}

    def relative(over: str, under: str) -> float:
        return ratio(seconds, over, under) / (flops[over] / flops[under])

    values = [
        ratio(seconds, "moe", "dense"),
        relative("moe 16", "dense"),
        ratio(seconds, "dropless", "dense"),
        relative("integrated", "moe"),
        relative("staged", "moe"),
        decoding(),
    ]
    try:
        return fill(ROWS, [*values, on_a_slice()])
    except (ImportError, RuntimeError) as error:  # RuntimeError: it is there but cannot compile
        why = f"needs the TPU compiler, pip install 'jax[tpu]': {str(error).splitlines()[0]}"
        return [*fill(ROWS[:-1], values), dataclasses.replace(ROWS[-1], why=why)]


def decoding() -> float:
    """Tokens per second of a MoE over those of the dense model of the same active parameters."""
    moe = dataclasses.replace(DECODED, layers=(with_experts(MoE(8)),))
    return ratio(drawn_in_turn({"dense": DECODED, "moe": moe}), "dense", "moe")


def on_a_slice() -> float:
    """FLOPs that a chip of a slice executes, by its compiler, over its part of the useful ones."""
    model = ModelSpec(
        1024, 512, 2, 4, 4, 2048, dtype="bfloat16", layers=with_experts(MoE(8, TokenChoice(2)))
    )
    train = TrainConfig(16, 1024, 1000, 1e-3, 10)
    step = compiled_for_tpu(
        model, train, Execution(data=1, expert=8, layer_loop="unroll"), "v5e:2x4"
    )
    tight = dataclasses.replace(
        model, layers=with_experts(MoE(8, TokenChoice(2), capacity_factor=1.0))
    )
    useful = train_flops(tight, train.seq_len, train.batch_size)
    return step.cost_analysis()["flops"] * 8 / useful


def compiled_for_tpu(
    config: ModelSpec, train: TrainConfig, execution: Execution, topology: str
) -> Any:
    """The train step, for the chips of such a slice, without having one. Needs libtpu."""
    from jax.experimental import topologies

    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    mesh = make_mesh(execution, devices)
    return lower_train_step(mesh, abstract_model(config), train, execution).compile()
