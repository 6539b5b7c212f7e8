"""Mixture of experts and MoDE: the train step and decoding against dense models of equal FLOPs.

Sizes are those of `bench step` (d 256, 8 layers) and `bench decode` (d 512, 12 layers).
"""

import dataclasses

from modjax.aot.compile import compile_step
from modjax.bench import Row, fill
from modjax.bench.decode import DENSE as DECODED
from modjax.bench.decode import draw_in_turn
from modjax.bench.step import DENSE, jax_step, per_flop, ratio, train_in_turn
from modjax.errors import InputError
from modjax.flops import train_flops
from modjax.specs import (
    Attention,
    DataConfig,
    Execution,
    Layer,
    MoD,
    ModelSpec,
    MoE,
    RunSpec,
    Seq,
    TokenChoice,
    TrainConfig,
)

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
    seconds = train_in_turn({name: jax_step(config) for name, config in MODELS.items()})
    values = [
        ratio(seconds, "moe", "dense"),
        per_flop(seconds, MODELS, "moe 16", "dense"),
        ratio(seconds, "dropless", "dense"),
        per_flop(seconds, MODELS, "integrated", "moe"),
        per_flop(seconds, MODELS, "staged", "moe"),
        decoding(),
    ]
    try:
        return fill(ROWS, [*values, flops_on_a_slice()])
    except (InputError, RuntimeError) as error:  # RuntimeError: it is there but cannot compile
        why = f"needs the TPU compiler: {str(error).splitlines()[0]}"
        return [*fill(ROWS[:-1], values), dataclasses.replace(ROWS[-1], why=why)]


def decoding() -> float:
    """Returns a MoE's tokens per second over those of the dense model of equal active size."""
    moe = dataclasses.replace(DECODED, layers=(with_experts(MoE(8)),))
    return ratio(draw_in_turn({"dense": DECODED, "moe": moe}), "dense", "moe")


def flops_on_a_slice() -> float:
    """Returns the FLOPs that a TPU slice executes, by XLA's count, over the useful FLOPs."""
    moe, tight = (with_experts(MoE(8, TokenChoice(2), capacity_factor=f)) for f in (1.25, 1.0))
    model = ModelSpec(1024, 512, 2, 4, 4, 2048, dtype="bfloat16", layers=moe)
    train = TrainConfig(16, 1024, 1000, 1e-3, 10)
    execution = Execution(data=1, fsdp=1, expert=8, layer_loop="unroll", remat="none")
    step = compile_step(RunSpec("moe", 1.0, model, train, DataConfig()), execution, "v5e:2x4")
    useful = dataclasses.replace(model, layers=tight)
    useful_flops = train_flops(useful, train.seq_len, train.batch_size)
    return step.executable.cost_analysis()["flops"] * 8 / useful_flops
