"""The train step: MoD against dense and their FLOP ratio, dense against PyTorch eager.

The sizes are those of the project's targets: d 256, 8 layers, 4 heads, 512 positions, batch 8.

Legend: B batch, L positions + 1 (inputs and targets overlap).
"""

import dataclasses
import statistics
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from modjax.bench import Row, fill, progress
from modjax.data.batches import Batch
from modjax.flops import train_flops
from modjax.specs import Dense, Execution, MoD, ModelSpec, TrainConfig
from modjax.training.mesh import make_mesh, put_batch
from modjax.training.optimizer import make_schedule
from modjax.training.programs import init_state, lower_train_step
from modjax.training.state import abstract_model

ROUNDS = 7
DENSE = ModelSpec(
    vocab_size=1024, d_model=256, num_layers=8, num_heads=4, num_kv_heads=4, d_ff=1024
)
MOD = dataclasses.replace(DENSE, layers=(Dense(), MoD(Dense(), capacity=0.125)))
TRAIN = TrainConfig(8, 512, 1000, 1e-3, 10)
TOKENS_BL = np.random.default_rng(0).integers(0, 259, (TRAIN.batch_size, TRAIN.seq_len + 1))
ROWS = (
    Row("MoD step / dense step / FLOP ratio", "ratio", 1.05),
    Row("MoD step / dense step", "ratio", None),
    Row("dense step / PyTorch eager fp32 step", "ratio", 1.3),
)

Step = Callable[[], Any]


def measure() -> list[Row]:
    steps: dict[str, Step] = {"dense": jax_step(DENSE), "mod": jax_step(MOD)}
    why = ""
    try:
        from modjax.bench.torch_models.dense import torch_step

        steps["torch"] = torch_step(DENSE, TRAIN, TOKENS_BL)
    except (ImportError, OSError):  # OSError: its shared libraries do not load
        why = "PyTorch cannot be imported: pip install -e '.[bench]'"
    seconds = train_in_turn(steps)
    relative = per_flop(seconds, {"dense": DENSE, "mod": MOD}, "mod", "dense")
    rows = fill(ROWS[:2], [relative, ratio(seconds, "mod", "dense")])
    if "torch" in seconds:
        return rows + fill(ROWS[2:], [ratio(seconds, "dense", "torch")])
    return [*rows, dataclasses.replace(ROWS[2], why=why)]


def interleaved(
    steps: Mapping[str, Callable[..., Any]],
    rounds: int = ROUNDS,
    inputs: Mapping[str, Callable[[], Any]] = MappingProxyType({}),
) -> dict[str, list[float]]:
    """Returns the seconds of each step in each round.

    Steps take turns, so that drift of the machine affects all alike.
    inputs: name -> function that makes the step's argument, which the step consumes. Not timed.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 2):
        for name, step in steps.items():
            arguments = (inputs[name](),) if name in inputs else ()
            start = time.perf_counter()
            step(*arguments)
            if index >= 2:  # warm-up
                seconds[name].append(time.perf_counter() - start)
    return seconds


def train_in_turn(steps: Mapping[str, Step]) -> dict[str, list[float]]:
    """Returns the `interleaved` seconds of train steps, and prints their medians."""
    seconds = interleaved(steps)
    medians = {name: round(statistics.median(found), 3) for name, found in seconds.items()}
    progress(f"train step: median seconds {medians}")
    return seconds


def ratio(seconds: Mapping[str, list[float]], over: str, under: str) -> float:
    """Returns the median over rounds of the time of `over` divided by that of `under`."""
    pairs = zip(seconds[over], seconds[under], strict=True)
    return statistics.median(a / b for a, b in pairs)


def fastest(seconds: Mapping[str, list[float]]) -> dict[str, float]:
    return {name: round(min(found), 3) for name, found in seconds.items()}


def per_flop(
    seconds: Mapping[str, list[float]], models: Mapping[str, ModelSpec], over: str, under: str
) -> float:
    """Returns the `ratio` of two train steps, divided by the ratio of their FLOPs."""
    flops = {name: train_flops(models[name], TRAIN.seq_len, 1) for name in (over, under)}
    return ratio(seconds, over, under) / (flops[over] / flops[under])


def jax_step(config: ModelSpec, train: TrainConfig = TRAIN) -> Step:
    """Returns a compiled train step on one device, on tokens of TOKENS_BL."""
    execution = Execution(data=1)
    mesh, model = make_mesh(execution), abstract_model(config, train.trained)
    shape = train.batch_size, train.seq_len
    tokens_BL = TOKENS_BL[: shape[0], : shape[1] + 1].astype(np.int32)
    batch = Batch(
        inputs_BL=tokens_BL[:, :-1],
        targets_BL=tokens_BL[:, 1:],
        segment_ids_BL=np.ones(shape, np.int32),
        weights_BL=np.ones(shape, np.float32),
    )
    with jax.set_mesh(mesh):
        state = init_state(mesh, model, train)
        train_step = lower_train_step(mesh, model, train, execution).compile()
        placed, schedule = put_batch(batch, mesh), make_schedule(train)

    def step():
        nonlocal state
        state, metrics = train_step(state, placed, schedule)
        jax.block_until_ready((state, metrics))

    return step
