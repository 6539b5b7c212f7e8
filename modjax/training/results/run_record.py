"""The record of a run: its spec, its results and its costs."""

import functools
import importlib.metadata
import math
import subprocess
from pathlib import Path
from typing import Any

from modjax.data.token_cache import TokenCache, epochs
from modjax.flops import forward_flops, parameters, run_flops, total_flops
from modjax.provenance import PACKAGES
from modjax.records import NO_ROUTING, RunRecord
from modjax.specs import ModelSpec, RunSpec
from modjax.training.results.clock import Clock


@functools.cache
def code_version() -> str:
    """Returns the version, in a clone with its commit: "0.1.0+1a2b3c4" or "0.1.0+1a2b3c4-dirty"."""
    root, version = Path(__file__).parents[3], importlib.metadata.version("modjax")
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # git is not installed
        commit = ""
    return "+".join(filter(None, (version, commit)))


def progress_values(spec: RunSpec, step: int) -> dict[str, int | float]:
    """Returns the tokens read and the FLOPs spent in the first `step` updates."""
    tokens = step * spec.train.batch_size * spec.train.seq_len
    return {"tokens": tokens, "train_flops": run_flops(spec.model, spec.train, step)}


def make_record(
    spec: RunSpec,
    cache: TokenCache,
    clock: Clock,
    *,
    diverged_step: int,
    found: dict[str, Any],
    **fields: Any,
) -> RunRecord:
    """Returns the record of a run that finished, or that diverged at `diverged_step` > 0.

    found: fields from the last evaluation, see `evaluate.summary`; {} for a diverged run.
    fields: train_loss, device, eval_batch_size and provenance.
    """
    seconds = clock.seconds
    config, model = spec.train, spec.model
    components, params = forward_flops(model, config.seq_len), parameters(model)
    steps = diverged_step or config.steps
    versions = {name: importlib.metadata.version(name) for name in (*PACKAGES, "orbax-checkpoint")}
    return RunRecord(
        run_id=spec.run_id,
        variant=spec.variant,
        status="diverged" if diverged_step else "finished",
        diverged_step=diverged_step or None,
        budget_flops=spec.budget_flops,
        forward_flops_per_token=total_flops(components) / config.seq_len,
        flops=components,
        d_model=model.d_model,
        num_layers=model.num_layers,
        epochs=epochs(cache, config.seq_len, steps * config.batch_size),
        steps=steps,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        learning_rate=config.learning_rate,
        seed=config.seed,
        data_seed=spec.data.seed,
        data_fingerprint=cache.manifest.fingerprint,
        code_version=code_version(),
        median_step_seconds=clock.median_step() or seconds["train"] / config.steps,
        wall_seconds=sum(seconds.values()) - seconds["data_wait"],
        versions=versions,
        **progress_values(spec, steps),  # type: ignore[arg-type]
        **{f"params_{name}": params[name] for name in ("total", "non_embedding", "active")},
        **{f"{name}_seconds": seconds[name] for name in ("train", "compile", "eval", "data_wait")},
        **_evaluated(model, found),
        **fields,
    )


def _evaluated(model: ModelSpec, found: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields of the record that an evaluation decides. found: {} without one."""
    routing, rules = model.causal_routing(), ", ".join(sorted(model.rules("causal")))
    unknown = dict.fromkeys(("eval_loss", "eval_loss_sem", "eval_bits_per_byte"))
    named = rules if rules and routing == "causal" else routing or NO_ROUTING
    causal_loss = found.get("eval_loss") if routing == "trained" else None
    causal = {"causal_routing": named, "causal_loss": causal_loss}
    return _finite(unknown | {"eval_tokens": 0} | causal | found)


def _finite(value: Any) -> Any:
    """Returns `value` with None for numbers that are not finite, which JSON cannot store."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
