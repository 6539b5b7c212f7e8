"""The tiny runs of these tests."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from modjax.data.batches import Batch
from modjax.specs import Dense, MoD, ModelSpec, RunSpec, TrainConfig
from modjax.training.optimizer import make_schedule
from modjax.training.state import TrainState, abstract_model, make_init
from modjax.training.step import make_train_step
from tests.conftest import TINY_DATA

MODEL = ModelSpec(
    vocab_size=260,
    d_model=16,
    num_layers=2,
    num_heads=2,
    num_kv_heads=2,
    d_ff=32,
    layers=(Dense(), MoD(capacity=0.25)),
)
TRAIN = TrainConfig(
    batch_size=8, seq_len=32, steps=12, learning_rate=0.01, warmup_steps=2, eval_sequences=20
)


def model(**changes: Any) -> ModelSpec:
    return dataclasses.replace(MODEL, **changes)


def train_config(**changes: Any) -> TrainConfig:
    return dataclasses.replace(TRAIN, **changes)


def run_spec(**changes: Any) -> RunSpec:
    """Returns a tiny run. `changes` replace fields of its ModelSpec or its TrainConfig."""
    names = {field.name for field in dataclasses.fields(ModelSpec)}
    return RunSpec(
        variant="tiny",
        budget_flops=1e9,
        model=model(**{n: v for n, v in changes.items() if n in names}),
        train=train_config(**{n: v for n, v in changes.items() if n not in names}),
        data=TINY_DATA,
    )


def random_batch(seed: int, batch_size: int, seq_len: int, *, vocab: int = 260) -> Batch:
    """Returns random tokens in two documents, with some positions that are not scored."""
    rng = np.random.default_rng(seed)
    inputs, targets = rng.integers(0, vocab, (2, batch_size, seq_len), dtype=np.int32)
    segments = 1 + (np.arange(seq_len) > seq_len // 3).astype(np.int32)
    weights = (rng.random((batch_size, seq_len)) > 0.2).astype(np.float32)
    return Batch(inputs, targets, np.tile(segments, (batch_size, 1)), weights)


# What is compiled here runs a few times: optimising it would take most of the tests' time.
QUICK = {"xla_backend_optimization_level": "0"}


def one_device_step(model_config: ModelSpec, train: TrainConfig) -> Any:
    """Returns a jitted train step without a mesh."""
    split = abstract_model(model_config)
    step = jax.jit(make_train_step(split, train), donate_argnums=0, compiler_options=QUICK)
    return lambda state, batch: step(state, batch, make_schedule(train))


@functools.cache
def _initial_state(model_config: ModelSpec, seed: int) -> TrainState:
    split = abstract_model(model_config)
    init = make_init(split, TRAIN)
    return jax.jit(init, compiler_options=QUICK)(np.int32(seed))


def initial_state(model_config: ModelSpec, seed: int = 0) -> TrainState:
    """Returns a state on one device, to be donated."""
    return jax.tree.map(jnp.copy, _initial_state(model_config, seed))
