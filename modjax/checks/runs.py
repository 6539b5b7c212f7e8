"""Checks of runs before anything expensive starts."""

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from modjax.checks.look_ahead import Finding, Leak, alone, broken, probe
from modjax.data.token_cache import TokenCache
from modjax.errors import InputError
from modjax.files import read_json, user_cache, write_atomically
from modjax.provenance import source_code
from modjax.specs import DataConfig, Execution, ModelSpec, RunSpec
from modjax.specs.imports import own_layers
from modjax.training.mesh import make_mesh
from modjax.training.state import abstract_model, abstract_weights
from modjax.training.trainer import check_run, open_data


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
    if mesh.shape["data"] < mesh.size:
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
