"""Alternating Updates and Sequence-AltUp: the train step and decoding against dense models.

Sizes are those of `bench step` (d 256, 8 layers) and `bench decode` (d 512, 12 layers).
"""

import dataclasses
from collections.abc import Mapping

from modjax.bench import Row, fill
from modjax.bench.decode import DENSE as DECODED
from modjax.bench.decode import draw_in_turn
from modjax.bench.step import DENSE, jax_step, per_flop, ratio, train_in_turn
from modjax.specs import AltUp, Dense, ModelSpec, Recycled, Repeat, SequenceAltUp

ROWS = (
    Row("AltUp K 2 step / dense step / FLOP ratio", "ratio", 1.10),
    Row("Recycled K 4 step / dense step / FLOP ratio", "ratio", 1.15),
    Row("Sequence-AltUp 4 step / dense step / FLOP ratio", "ratio", 1.10),
    Row("decode tokens/s, batch 1, AltUp K 2 over dense", "ratio", 0.95, "higher"),
    Row("decode tokens/s, batch 1, Sequence-AltUp 4 over dense", "ratio", 1.8, "higher"),
)


def models(dense: ModelSpec) -> Mapping[str, ModelSpec]:
    """Returns name -> model: the dense one and its AltUp variants."""

    def recycled(streams: int) -> ModelSpec:
        layers = tuple(AltUp(active=i) for i in range(streams))
        return dataclasses.replace(dense, layers=layers, streams=Recycled(streams))

    whole, strided = Repeat(Dense(), times=1), Repeat(SequenceAltUp(stride=4))
    sequence = dataclasses.replace(dense, layers=(whole, strided, whole))
    return {"dense": dense, "K 2": recycled(2), "K 4": recycled(4), "sequence": sequence}


def measure() -> list[Row]:
    trained = models(DENSE)
    seconds = train_in_turn({name: jax_step(config) for name, config in trained.items()})
    steps = [per_flop(seconds, trained, name, "dense") for name in ("K 2", "K 4", "sequence")]
    drawn = draw_in_turn({n: c for n, c in models(DECODED).items() if n != "K 4"})
    return fill(ROWS, [*steps, *(ratio(drawn, "dense", name) for name in ("K 2", "sequence"))])
