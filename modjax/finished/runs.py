"""A finished run, opened again: to evaluate it under another routing, or to sample from it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from modjax.data.cache import TokenCache, cache_dir, open_cache
from modjax.errors import InputError, require
from modjax.provenance import require_readable
from modjax.records import name_left_out, read_spec, run_dir, scan
from modjax.specs import Execution, RunSpec
from modjax.specs.imports import import_all, places
from modjax.training.base_weights import read_finished
from modjax.training.mesh import make_mesh
from modjax.training.programs import compile_eval_step
from modjax.training.results.evaluate import (
    Evaluation,
    difference,
    evaluate,
    outcome,
    summarise,
    validation_batches,
)
from modjax.training.state import Model


class Finished(NamedTuple):
    """A run's spec, the cache it was trained on, its model and its final weights on `mesh`."""

    spec: RunSpec
    cache: TokenCache
    mesh: Mesh
    model: Model
    weights: Any


class Chosen(NamedTuple):
    """Finished runs to open, and run id -> why another one's spec cannot be used."""

    specs: list[RunSpec]
    failures: dict[str, InputError]


def choose(workdir: Path, run_id: str | None, *, routed: bool = False) -> Chosen:
    """Returns the finished runs of `workdir`, or the one that `run_id` names.

    routed: only those with a routed layer. A result that cannot be read, or that is a copy, is left
    out with a warning.
    Raises InputError where no run is left, and where the one that `run_id` names cannot be used.
    """
    found = scan(workdir)
    if run_id in found.left_out:
        raise InputError("--run", run_id, found.left_out[run_id])
    name_left_out(found.left_out)
    finished = [record.run_id for record in found.records if record.status == "finished"]
    if run_id is not None and finished:
        accepted = f"must be one of {len(finished)} finished runs, such as {finished[-1]}"
        require(run_id in finished, "--run", run_id, accepted)
    specs, failures = [], {}
    for name in finished if run_id is None else [run_id]:
        try:
            specs.append(read_spec(run_dir(workdir, name), name))
        except InputError as error:
            failures[name] = error
    kept = [s for s in specs if not routed or s.model.routed() or s.model.rules()]
    if run_id in failures or (failures and not kept):
        raise next(iter(failures.values()))
    if run_id is None or not finished:
        what = "finished run with a routed layer" if routed else "finished run"
        require(len(kept) > 0, "--workdir", str(workdir), f"holds no {what}")
    accepted = "has no routed layer, so its loss is the same under every routing"
    require(len(kept) > 0, "--run", run_id, accepted)
    return Chosen(kept, failures)


def open_run(spec: RunSpec, *, workdir: Path, data_dir: Path) -> Finished:
    """Loads a finished run and changes nothing in its folder.

    Raises InputError where its data or its final weights are missing.
    """
    cache = open_cache(cache_dir(data_dir, spec.data))
    identity = {"run_id": spec.run_id, "data_fingerprint": cache.manifest.fingerprint}
    model, weights, mesh = _restore(spec, run_dir(workdir, spec.run_id), identity)
    return Finished(spec, cache, mesh, model, weights)


def _restore(spec: RunSpec, folder: Path, identity: dict[str, str]) -> tuple[Model, Any, Mesh]:
    """Returns the model of a finished run, the weights after its last step, and their mesh."""
    mesh = make_mesh(Execution(data=1))
    with jax.set_mesh(mesh):
        return *read_finished(mesh, spec, folder, identity), mesh


class Comparison(NamedTuple):
    """A run's loss under a causal routing against its loss as trained, and what each layer did."""

    run_id: str
    routing: str
    slack: float | None
    trained: Evaluation
    causal: Evaluation
    difference: Evaluation
    layers: dict[str, dict[str, float]]


def compare(run: Finished, routing: str, slack: float | None) -> Comparison:
    """Evaluates a run on its validation windows as trained, and under `routing` and `slack`."""
    train, scores = run.spec.train, []
    with jax.set_mesh(run.mesh):
        for arguments in ({"routing": "trained"}, {"routing": routing, "slack": slack}):
            step = compile_eval_step(run.mesh, run.model, train, **arguments)
            windows = validation_batches(run.cache, train, run.mesh)
            scores.append(evaluate(step, run.weights, windows))
    trained, causal = scores
    return Comparison(
        run.spec.run_id,
        routing,
        slack,
        summarise(trained),
        summarise(causal),
        difference(causal, trained),
        outcome(causal)[1],
    )


class Loaded(NamedTuple):
    """A finished run in Python: `nnx.merge(graphdef, weights)` is its model."""

    spec: RunSpec
    graphdef: Any
    weights: Any


def load(run_dir: str | Path, *, imports: Sequence[str] = (), other_code: bool = False) -> Loaded:
    """Returns the spec of the finished run in `run_dir`, its model and its final weights.

    Needs no data and changes nothing in the folder.
    graphdef, weights: as modjax.generate and modjax.unstack take them.
    imports: files and modules to import first, which register layers of the run. What its folder
      names is not imported.
    other_code: read it though its layers from outside have been edited since.
    Raises InputError where the folder holds no run, one that has not finished, or a copy under
    another name, and where its final weights are missing.
    """
    there = os.path.exists(os.path.join(run_dir, "spec.json"))  # False for a null byte, too
    require(there, "modjax.load", str(run_dir), "no such run")
    folder = Path(os.path.realpath(run_dir))
    import_all(places(tuple(imports), Path(), "imports"), "imports")
    spec = read_spec(folder, folder.name)
    if not other_code:
        require_readable({folder: spec.model})
    model, weights, _ = _restore(spec, folder, {"run_id": spec.run_id})
    return Loaded(spec, model.graphdef, weights)
