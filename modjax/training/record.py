"""The record of a run: what it was, what it reached, and what it cost."""

import functools
import importlib.metadata
import math
import subprocess
from pathlib import Path
from typing import Any

from modjax.data.cache import TokenCache, epochs
from modjax.data.manifest import bits_per_byte
from modjax.flops import forward_flops, parameters, run_flops, total_flops
from modjax.provenance import PACKAGES
from modjax.records import NO_ROUTING, Record
from modjax.spec import ModelSpec, RunSpec
from modjax.training.evaluate import Evaluation


@functools.cache
def code_version() -> str:
    """The version, and in a clone the commit: "0.1.0", "0.1.0+1a2b3c4" or "0.1.0+1a2b3c4-dirty"."""
    root, version = Path(__file__).parents[2], importlib.metadata.version("modjax")
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return "+".join(filter(None, (version, commit)))


def progress_values(spec: RunSpec, step: int) -> dict[str, int | float]:
    """How far a run has come after `step` updates."""
    config, sequences = spec.train, step * spec.train.batch_size
    return {
        "tokens": sequences * config.seq_len,
        "train_flops": run_flops(spec.model, config, step),
    }


def make_record(
    spec: RunSpec,
    cache: TokenCache,
    *,
    diverged_step: int,
    train_loss: float | None,
    evaluation: Evaluation | None,
    found: dict[str, Any],
    seconds: dict[str, float],
    median_step_seconds: float,
    device: str,
    eval_batch_size: int,
    provenance: dict[str, str],
) -> Record:
    """Returns the record of a run that finished, or that diverged at `diverged_step` > 0.

    found: the fields causal_* and outcome that were measured. A value that is not finite becomes
      None: the run is finished as it was trained, whatever another routing makes of it.
    seconds: spent, by activity; see training/clock.py.
    """
    config, model = spec.train, spec.model
    components = forward_flops(model, config.seq_len)
    params = parameters(model)
    steps = diverged_step or config.steps
    progress = progress_values(spec, steps)
    causal: dict[str, Any] = {"causal_routing": causal_name(model)}
    if model.causal_routing() == "trained":
        causal["causal_loss"] = evaluation.loss if evaluation else None
    return Record(
        run_id=spec.run_id,
        variant=spec.variant,
        status="diverged" if diverged_step else "finished",
        diverged_step=diverged_step or None,
        budget_flops=spec.budget_flops,
        train_flops=progress["train_flops"],
        forward_flops_per_token=total_flops(components) / config.seq_len,
        flops=components,
        params_total=params["total"],
        params_non_embedding=params["non_embedding"],
        params_active=params["active"],
        d_model=model.d_model,
        num_layers=model.num_layers,
        tokens=int(progress["tokens"]),
        epochs=epochs(cache, config.seq_len, steps * config.batch_size),
        steps=steps,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        learning_rate=config.learning_rate,
        train_loss=train_loss,
        eval_loss=evaluation.loss if evaluation else None,
        eval_loss_sem=_finite(evaluation.sem) if evaluation else None,
        eval_bits_per_byte=bits_per_byte(cache.manifest, evaluation.loss) if evaluation else None,
        eval_tokens=evaluation.tokens if evaluation else 0,
        seed=config.seed,
        data_seed=spec.data.seed,
        data_fingerprint=cache.manifest.fingerprint,
        code_version=code_version(),
        wall_seconds=sum(seconds.values()) - seconds["data_wait"],
        train_seconds=seconds["train"],
        compile_seconds=seconds["compile"],
        eval_seconds=seconds["eval"],
        data_wait_seconds=seconds["data_wait"],
        median_step_seconds=median_step_seconds,
        device=device,
        eval_batch_size=eval_batch_size,
        versions={
            name: importlib.metadata.version(name) for name in (*PACKAGES, "orbax-checkpoint")
        },
        provenance=provenance,
        **{name: _finite(value) for name, value in (causal | found).items()},
    )


def causal_name(model: ModelSpec) -> str:
    """Returns the rules by which a model's causal loss is taken, as `Record.causal_routing`."""
    routing = model.causal_routing()
    if routing != "causal":
        return routing or NO_ROUTING
    return ", ".join(sorted(model.rules("causal"))) or routing


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
