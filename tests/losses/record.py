"""Losses and gradient norms of every step of tiny runs at fixed seeds, stored in losses.json.

`python -m tests.losses.record` compares and prints what differs. With --write it stores the new
numbers and the machine. A change that claims to change no numerics leaves them equal to the last
bit on that machine. Other machines round differently, and a last bit may flip a selection.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from modjax.data.batches import Batch
from modjax.specs import (
    MLP,
    Attention,
    Binary,
    Dense,
    Execution,
    Layer,
    MoD,
    ModelSpec,
    Positional,
    Predictor,
    Random,
    Received,
    Seq,
    Sinusoids,
    Threshold,
    Tied,
    TopK,
    TrainConfig,
)
from modjax.training.mesh import make_mesh, put_batch
from modjax.training.optimizer import make_schedule
from modjax.training.programs import init_state, lower_train_step
from modjax.training.state import abstract_model, forget_losses

KEPT = Path(__file__).with_name("losses.json")
LENGTH, BATCH, STEPS = 64, 8, 6
DENSE = ModelSpec(vocab_size=96, d_model=32, num_layers=4, num_heads=4, num_kv_heads=4, d_ff=64)
DENSE_LAYER = Dense()
TAUGHT = MoD(capacity=0.25, causal=Predictor())
CHANGES: dict[str, dict[str, Any]] = {
    "stochastic": {"rule": Random()},
    "positional": {"rule": Positional()},
    "learned_position": {"router": Sinusoids()},
    "token_choice": {"rule": Binary()},
    "threshold": {"rule": Threshold()},
}


def routed(layer: Layer, first: Layer = DENSE_LAYER, **changes: Any) -> ModelSpec:
    return dataclasses.replace(DENSE, layers=(first, layer), **changes)


def case(config: ModelSpec, execution: dict[str, Any] | None = None, **train: Any) -> Any:
    """Returns a model, and the fields of TrainConfig and Execution that differ from the others."""
    return config, train, execution or {}


MOD = routed(TAUGHT)
CASES = {
    "dense": case(DENSE),
    "mod": case(routed(MoD(capacity=0.25))),
    "mod, predictor and auxiliary": case(
        routed(dataclasses.replace(TAUGHT, rule=TopK(auxiliary=0.1)))
    ),
    "mod, literal, one_plus_tanh": case(
        routed(MoD(capacity=0.25, rule=TopK("one_plus_tanh"), residual="literal"))
    ),
    **{
        name: case(routed(dataclasses.replace(TAUGHT, **changes)))
        for name, changes in CHANGES.items()
    },
    "attention": case(
        routed(
            dataclasses.replace(TAUGHT, router=Received(), rule=TopK("one")),
            Seq(Attention(received=True), MLP()),
        )
    ),
    "two capacities": case(routed(TAUGHT, dataclasses.replace(TAUGHT, capacity=0.5))),
    "grouped queries, swiglu, tied": case(
        routed(
            dataclasses.replace(TAUGHT, inner=Dense("swiglu")),
            Dense("swiglu"),
            num_kv_heads=2,
            head=Tied(),
        )
    ),
    "packed documents": case(MOD, document_mask=True),
    "accumulation": case(MOD, accumulation=2),
    "bfloat16": case(dataclasses.replace(MOD, dtype="bfloat16")),
    "scan": case(MOD, {"layer_loop": "scan"}),
    "unroll": case(MOD, {"layer_loop": "unroll"}),
    "rematerialised": case(MOD, {"remat": "full"}),
    "2 x 2 x 2 devices": case(MOD, {"data": 2, "fsdp": 2, "tensor": 2}),
}


def batch_of(step: int) -> Batch:
    """Returns a random walk over the vocabulary, in documents of several lengths, with padding."""
    rng = np.random.default_rng(step)
    tokens = np.cumsum(rng.integers(0, 3, (BATCH, LENGTH + 1)), axis=1) % DENSE.vocab_size
    ends = np.sort(rng.integers(8, LENGTH, (BATCH, 2)), axis=1)
    segments = 1 + (np.arange(LENGTH) >= ends[:, :1]).astype(np.int32)
    segments = np.where(np.arange(LENGTH) < ends[:, 1:], segments, 0)
    weights = (segments > 0).astype(np.float32)
    return Batch(
        inputs_BL=tokens[:, :-1].astype(np.int32),
        targets_BL=tokens[:, 1:].astype(np.int32),
        segment_ids_BL=segments.astype(np.int32),
        weights_BL=weights,
    )


def losses(name: str) -> list[list[float]]:
    """Returns [loss, gradient norm] of each step."""
    config, train_changes, execution_changes = CASES[name]
    train = TrainConfig(BATCH, LENGTH, STEPS, 3e-3, 2, **train_changes)
    execution = Execution(**{"data": 1, **execution_changes})
    mesh, model = make_mesh(execution), abstract_model(config)
    found = []
    with jax.set_mesh(mesh):
        state = init_state(mesh, model, train)
        step = lower_train_step(mesh, model, train, execution).compile()
        for number in range(1, STEPS + 1):
            batch = put_batch(batch_of(number), mesh)
            state, metrics = step(forget_losses(state), batch, make_schedule(train))
            found.append([float(metrics["loss"]), float(metrics["grad_norm"])])
    return found


def machine() -> str:
    """Returns what decides how numbers are rounded: jaxlib's version and the CPU's features."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    said = sorted({line for line in lines if line.startswith(("model name", "flags"))})
    digest = hashlib.sha256("\n".join(said).encode()).hexdigest()[:8]
    return f"jaxlib {importlib.metadata.version('jaxlib')}, CPU {digest}"


def main() -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    before = json.loads(KEPT.read_text()) if KEPT.exists() else {"machine": "", "losses": {}}
    print(f"kept on {before['machine']}; this is {machine()}")
    kept, found = before["losses"], {}
    for name in CASES:
        found[name] = losses(name)
        old = kept.get(name)
        most = np.abs(np.array(old) / np.array(found[name]) - 1).max() if old else None
        same = "the same to the last bit" if old == found[name] else f"differs by {most}"
        print(f"{name}: {same if old else 'new'}", flush=True)
    if "--write" in sys.argv:
        KEPT.write_text(json.dumps({"machine": machine(), "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
