"""The record of a run: what it was, what it reached, and what it cost."""

import functools
import importlib.metadata
import math
import subprocess
from pathlib import Path
from typing import Any

from modjax.data.cache import TokenCache, epochs
from modjax.flops import forward_flops, parameters, run_flops, total_flops
from modjax.provenance import PACKAGES
from modjax.records import NO_ROUTING, RunRecord
from modjax.specs import RunSpec


@functools.cache
def code_version() -> str:
    """Returns the version, in a clone with the commit: "0.1.0+1a2b3c4", "0.1.0+1a2b3c4-dirty"."""
    root, version = Path(__file__).parents[3], importlib.metadata.version("modjax")
    if not (root / ".git").exists():
        return version
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:  # no git here
        commit = ""
    return "+".join(filter(None, (version, commit)))


def progress_values(spec: RunSpec, step: int) -> dict[str, int | float]:
    """Returns what a run has read and spent after `step` updates."""
    tokens = step * spec.train.batch_size * spec.train.seq_len
    return {"tokens": tokens, "train_flops": run_flops(spec.model, spec.train, step)}


def make_record(
    spec: RunSpec,
    cache: TokenCache,
    *,
    diverged_step: int,
    seconds: dict[str, float],
    found: dict[str, Any],
    **fields: Any,
) -> RunRecord:
    """Returns the record of a run that finished, or that diverged at `diverged_step` > 0.

    seconds: spent, by activity; see training/results/clock.py.
    found: the fields that the last evaluation decides, see evaluate.measured; {} where it diverged.
      A value that is not finite becomes None: the run is finished as it was trained, whatever
      another routing makes of it.
    fields: those that are stored as they are: train_loss, median_step_seconds, device,
      eval_batch_size, provenance.
    """
    config, model = spec.train, spec.model
    components, params = forward_flops(model, config.seq_len), parameters(model)
    steps = diverged_step or config.steps
    routing, rules = model.causal_routing(), ", ".join(sorted(model.rules("causal")))
    results: dict[str, Any] = {
        **dict.fromkeys(("eval_loss", "eval_loss_sem", "eval_bits_per_byte")),
        "eval_tokens": 0,
        "causal_routing": rules if rules and routing == "causal" else routing or NO_ROUTING,
        "causal_loss": found.get("eval_loss") if routing == "trained" else None,
    }
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
        wall_seconds=sum(seconds.values()) - seconds["data_wait"],
        versions={
            name: importlib.metadata.version(name) for name in (*PACKAGES, "orbax-checkpoint")
        },
        **progress_values(spec, steps),  # type: ignore[arg-type]
        **{f"params_{name}": params[name] for name in ("total", "non_embedding", "active")},
        **{f"{name}_seconds": seconds[name] for name in ("train", "compile", "eval", "data_wait")},
        **{name: _finite(value) for name, value in (results | found).items()},
        **fields,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
