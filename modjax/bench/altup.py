"""Alternating Updates: the train step and decoding against dense models, and Sequence-AltUp.

d 256, 8 layers, 512 positions, batch 8 as `bench step`, and decoding at d 512, 12 layers.
"""

import dataclasses
import statistics
from collections.abc import Mapping

import numpy as np

from modjax.bench import Row, fill, progress
from modjax.bench.decode import DENSE as DECODED
from modjax.bench.decode import drawn_in_turn
from modjax.bench.step import DENSE, TRAIN, interleaved, jax_step, ratio
from modjax.flops import train_flops
from modjax.specs import AltUp, Dense, ModelSpec, Recycled, Repeat, SequenceAltUp

ROWS = (
    Row("AltUp K 2 step / dense step / FLOP ratio", "ratio", 1.10),
    Row("Recycled K 4 step / dense step / FLOP ratio", "ratio", 1.15),
    Row("Sequence-AltUp 4 step / dense step / FLOP ratio", "ratio", 1.10),
    Row("decode tokens/s, batch 1, AltUp K 2 over dense", "ratio", 0.95, "higher"),
    Row("decode tokens/s, batch 1, Sequence-AltUp 4 over dense", "ratio", 1.8, "higher"),
)


def models(dense: ModelSpec) -> Mapping[str, ModelSpec]:
    """The dense model, and its AltUps by name."""

    def recycled(streams: int) -> ModelSpec:
        layers = tuple(AltUp(active=i) for i in range(streams))
        return dataclasses.replace(dense, layers=layers, streams=Recycled(streams))

    whole, strided = Repeat(Dense(), times=1), Repeat(SequenceAltUp(stride=4))
    sequence = dataclasses.replace(dense, layers=(whole, strided, whole))
    return {"dense": dense, "K 2": recycled(2), "K 4": recycled(4), "sequence": sequence}


def measure() -> list[Row]:
    tokens = np.random.default_rng(0).integers(0, 259, (TRAIN.batch_size, TRAIN.seq_len + 1))
    trained = models(DENSE)
    seconds = interleaved({name: jax_step(config, tokens) for name, config in trained.items()})
    medians = {name: round(statistics.median(found), 3) for name, found in seconds.items()}
    progress(f"bench altup: median seconds {medians}")
    flops = {name: train_flops(config, TRAIN.seq_len, 1) for name, config in trained.items()}
    steps = [
        ratio(seconds, name, "dense") / (flops[name] / flops["dense"])
        for name in ("K 2", "K 4", "sequence")
    ]
    drawn = drawn_in_turn({n: c for n, c in models(DECODED).items() if n != "K 4"})
    return fill(ROWS, [*steps, *(ratio(drawn, "dense", name) for name in ("K 2", "sequence"))])
