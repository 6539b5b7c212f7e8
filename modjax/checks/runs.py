"""Checks of runs before anything expensive starts."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh

from modjax.checks.look_ahead import Finding, Leak, alone, broken, probe
from modjax.data.token_cache import (
    TokenCache,
    cache_dir,
    check_epochs,
    check_fingerprint,
    check_vocab,
    open_cache,
)
from modjax.errors import InputError
from modjax.files import read_json, user_cache, write_atomically
from modjax.provenance import source_code
from modjax.specs import DataConfig, Execution, ModelSpec, RunSpec
from modjax.specs.imports import own_layers
from modjax.training.mesh import check_batch, make_mesh
from modjax.training.results.evaluate import validation_batches
from modjax.training.results.metrics import require_tensorboard
from modjax.training.state import abstract_model, abstract_weights


def check(
    specs: Sequence[RunSpec], execution: Execution, *, data_dir: Path, fingerprint: str | None
) -> None:
    """Raises InputError if one of these runs cannot start."""
    mesh = make_mesh(execution)
    caches: dict[DataConfig, TokenCache] = {}
    for spec in specs:
        if spec.data not in caches:
            caches[spec.data] = open_data(spec.data, data_dir, fingerprint)
        check_run(spec, execution, caches[spec.data], mesh)
    if execution.fsdp * execution.tensor * execution.expert > 1:
        for config in dict.fromkeys(spec.model for spec in specs):
            abstract_weights(mesh, abstract_model(config))
    for finding in probed(specs):
        if error := broken(finding):
            raise error


def probed(specs: Sequence[RunSpec]) -> list[Finding]:
    """Returns the findings about every distinct layer of these runs."""
    length, found = max(spec.train.seq_len for spec in specs), []
    for model in alone(spec.model for spec in specs):
        # Findings about layers from outside are not stored: their code may change.
        found += probe(model, length) if own_layers(model) else _stored_findings(model, length)
    return found


def _stored_findings(model: ModelSpec, length: int) -> list[Finding]:
    """Returns findings about modjax's own layers, cached per user and version of the source."""
    text = f"{', '.join(map(str, model.layers))}; {model.ends}; {source_code(model)}"
    path = user_cache("probes") / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
    try:
        return [
            Finding(layer, routing, claims, None if leak is None else Leak(*leak))
            for layer, routing, claims, leak in read_json(path, "it is made again")
        ]
    except (InputError, ValueError, TypeError):  # missing or damaged
        findings = probe(model, length)
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(findings))
    return findings


def open_data(data: DataConfig, data_dir: Path, fingerprint: str | None) -> TokenCache:
    """Returns the token cache of a run.

    Raises SharedFault unless it has the fingerprint, if one is given.
    """
    cache = open_cache(cache_dir(data_dir, data))
    check_fingerprint(cache, fingerprint)
    return cache


def check_run(spec: RunSpec, execution: Execution, cache: TokenCache, mesh: Mesh) -> None:
    """Raises InputError unless data, model, batch and mesh fit each other."""
    train = spec.train
    check_vocab(cache, spec.model)
    check_epochs(cache, spec.data, train.seq_len, train.batch_size * train.steps)
    validation_batches(cache, train, mesh)  # raises if the validation split is too small
    check_batch(mesh, train)
    if execution.tensorboard:
        require_tensorboard()
