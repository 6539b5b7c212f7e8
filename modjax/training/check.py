"""What a run would be refused for, found before anything expensive starts."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from modjax.data.cache import (
    TokenCache,
    cache_dir,
    check_epochs,
    check_fingerprint,
    check_vocab,
    open_cache,
)
from modjax.errors import InputError
from modjax.files import read_json, user_cache, write_atomically
from modjax.nn.probe import Finding, Leak, alone, broken, probe
from modjax.provenance import source_code
from modjax.spec import DataConfig, Execution, ModelSpec, RunSpec
from modjax.spec.imports import own_layers
from modjax.training.evaluate import validation_batches
from modjax.training.metrics import require_tensorboard
from modjax.training.sharding import check_batch, make_mesh, param_shardings
from modjax.training.state import abstract_model


def check(
    specs: Sequence[RunSpec], execution: Execution, *, data_dir: Path, fingerprint: str | None
) -> None:
    """Raises InputError for what any of these runs would be refused for."""
    mesh = make_mesh(execution)
    caches: dict[DataConfig, TokenCache] = {}
    for spec in specs:
        if spec.data not in caches:
            caches[spec.data] = open_data(spec.data, data_dir, fingerprint)
        check_run(spec, execution, caches[spec.data], mesh)
    if execution.fsdp * execution.tensor * execution.expert > 1:
        for config in dict.fromkeys(spec.model for spec in specs):
            model = abstract_model(config)
            param_shardings(mesh, model.params, model.logical_axes)
    check_claims(specs)


def check_claims(specs: Sequence[RunSpec]) -> None:
    """Raises InputError for a layer that looks ahead where it claims not to."""
    for finding in probed(specs):
        error = broken(finding)
        if error is not None:
            raise error


def probed(specs: Sequence[RunSpec]) -> list[Finding]:
    """Returns what every distinct layer of these runs claims, and what was seen.

    Findings about modjax's own layers are kept in the user's cache for the same source code.
    """
    length, found = max(spec.train.seq_len for spec in specs), []
    for model in alone(spec.model for spec in specs):
        path = _cached(model)
        findings = None if path is None else _read(path)
        if findings is None:
            findings = probe(model, length)
            if path is not None:
                with contextlib.suppress(OSError):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, json.dumps(findings))
        found += findings
    return found


def _read(path: Path) -> list[Finding] | None:
    try:
        return [
            Finding(layer, routing, claims, None if leak is None else Leak(*leak))
            for layer, routing, claims, leak in read_json(path, "it is made again")
        ]
    except (InputError, ValueError, TypeError):
        return None  # absent or damaged: probed again


def _cached(model: ModelSpec) -> Path | None:
    """Returns the file that keeps the findings, or None where a layer is from outside."""
    if own_layers(model):
        return None
    text = f"{', '.join(map(str, model.layers))}; {model.ends}; {source_code(model)}"
    return user_cache("probes") / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


def open_data(data: DataConfig, data_dir: Path, fingerprint: str | None) -> TokenCache:
    """The token cache of a run; `fingerprint` is what its plan was made for, if it has one."""
    cache = open_cache(cache_dir(data_dir, data))
    check_fingerprint(cache, fingerprint)
    return cache


def check_run(spec: RunSpec, execution: Execution, cache: TokenCache, mesh: Mesh) -> None:
    """Raises InputError where data, model, batch and mesh do not fit each other."""
    config = spec.train
    check_vocab(cache, spec.model)
    check_epochs(cache, spec.data, config.seq_len, config.batch_size * config.steps)
    validation_batches(cache, config, mesh)  # raises where the validation split is too small
    check_batch(mesh, config)
    if execution.tensorboard:
        require_tensorboard()
