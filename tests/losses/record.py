"""The loss and gradient norm of every step of tiny runs at fixed seeds, kept in losses.json.

`python -m tests.losses.record` compares and says what differs; with --write it keeps what it found,
and on what machine. A change that claims to change no numerics leaves them as they are, to the last
bit, there. Other machines round differently, and a last bit may flip a selection.
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
DENSE = ModelSpec(
    vocab_size=96, d_model=32, num_layers=4, num_heads=4, num_kv_heads=4, d_ff=64
)  # fmt: skip
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


MOD = routed(TAUGHT)
CASES: dict[str, tuple[ModelSpec, dict[str, Any], dict[str, Any]]] = {
    "dense": (DENSE, {}, {}),
    "mod": (routed(MoD(capacity=0.25)), {}, {}),
    "mod, predictor and auxiliary": (
        routed(dataclasses.replace(TAUGHT, rule=TopK(auxiliary=0.1))), {}, {},
    ),
    "mod, literal, one_plus_tanh": (
        routed(MoD(capacity=0.25, rule=TopK("one_plus_tanh"), residual="literal")), {}, {},
    ),
    **{
        name: (routed(dataclasses.replace(TAUGHT, **changes)), {}, {})
        for name, changes in CHANGES.items()
    },
    "attention": (
        routed(dataclasses.replace(TAUGHT, router=Received(), rule=TopK("one")),
               Seq(Attention(received=True), MLP())), {}, {},
    ),
    "two capacities": (
        routed(TAUGHT, dataclasses.replace(TAUGHT, capacity=0.5)), {}, {},
    ),
    "grouped queries, swiglu, tied": (
        routed(dataclasses.replace(TAUGHT, inner=Dense("swiglu")), Dense("swiglu"),
               num_kv_heads=2, head=Tied()), {}, {},
    ),
    "packed documents": (MOD, {"document_mask": True}, {}),
    "accumulation": (MOD, {"accumulation": 2}, {}),
    "bfloat16": (dataclasses.replace(MOD, dtype="bfloat16"), {}, {}),
    "scan": (MOD, {}, {"layer_loop": "scan"}),
    "unroll": (MOD, {}, {"layer_loop": "unroll"}),
    "rematerialised": (MOD, {}, {"remat": "full"}),
    "2 x 2 x 2 devices": (MOD, {}, {"data": 2, "fsdp": 2, "tensor": 2}),
}  # fmt: skip


def batch_of(step: int) -> Batch:
    """Letters that are likely to come again, in documents of several lengths, and padding."""
    rng = np.random.default_rng(step)
    tokens = np.cumsum(rng.integers(0, 3, (BATCH, LENGTH + 1)), axis=1) % DENSE.vocab_size
    ends = np.sort(rng.integers(8, LENGTH, (BATCH, 2)), axis=1)
    segments = 1 + (np.arange(LENGTH) >= ends[:, :1]).astype(np.int32)
    segments = np.where(np.arange(LENGTH) < ends[:, 1:], segments, 0)
    weights = (segments > 0).astype(np.float32)
    return Batch(
        inputs_BL=tokens[:, :-1].astype(np.int32), targets_BL=tokens[:, 1:].astype(np.int32),
        segment_ids_BL=segments.astype(np.int32), weights_BL=weights,
    )  # fmt: skip


def losses(case: str) -> list[list[float]]:
    """[loss, gradient norm] of each step."""
    config, train_changes, execution_changes = CASES[case]
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
    """What decides how numbers are rounded: jaxlib, and what the CPU can do."""
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
    for case in CASES:
        found[case] = losses(case)
        old = kept.get(case)
        most = np.abs(np.array(old) / np.array(found[case]) - 1).max() if old else None
        same = "the same to the last bit" if old == found[case] else f"differs by {most}"
        print(f"{case}: {same if old else 'new'}", flush=True)
    if "--write" in sys.argv:
        KEPT.write_text(json.dumps({"machine": machine(), "losses": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
