"""A finished run, opened again: to evaluate it under another routing, or to sample from it."""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from modjax.data.cache import TokenCache, cache_dir, open_cache
from modjax.errors import InputError, require
from modjax.nn.routed import Quality, quality
from modjax.records import read_spec, run_dir, scan
from modjax.spec import Execution, RunSpec
from modjax.training.checkpoint import Checkpoints
from modjax.training.evaluate import (
    Evaluation,
    difference,
    evaluate,
    summarise,
    validation_batches,
)
from modjax.training.programs import compile_eval_step
from modjax.training.sharding import make_mesh, put_batch
from modjax.training.state import Model, abstract_model, abstract_state, joined

logger = logging.getLogger("modjax")


class Finished(NamedTuple):
    """A run's spec, the cache it was trained on, its model and its final weights on `mesh`."""

    spec: RunSpec
    cache: TokenCache
    mesh: Mesh
    model: Model
    weights: Any


def choose(workdir: Path, run_id: str | None, *, routed: bool = False) -> list[RunSpec]:
    """The finished runs of `workdir`, or the one that `run_id` names.

    routed: only those with a routed block. A result that cannot be read is left out with a warning.
    Raises InputError where there is none, and where a run's spec cannot be read.
    """
    found = scan(workdir)
    if run_id in found.unreadable:
        raise InputError("--run", run_id, found.unreadable[run_id])
    for why in found.unreadable.values():
        logger.warning("modjax: left out: %s", why)
    finished = [record.run_id for record in found.records if record.status == "finished"]
    wanted = finished if run_id is None else [name for name in finished if name == run_id]
    specs = [read_spec(run_dir(workdir, name)) for name in wanted]
    kept = [s for s in specs if not routed or s.model.routed() or s.model.rules]
    if run_id is None or not finished:
        what = "finished run with a routed layer" if routed else "finished run"
        require(len(kept) > 0, "--workdir", str(workdir), f"holds no {what}")
    accepted = f"must be one of {len(finished)} finished runs, such as {finished[-1]}"
    require(len(kept) > 0, "--run", run_id, accepted)
    return kept


def open_run(spec: RunSpec, *, workdir: Path, data_dir: Path) -> Finished:
    """Loads a finished run. Raises InputError where its data or its checkpoint is missing."""
    cache = open_cache(cache_dir(data_dir, spec.data))
    identity = {"run_id": spec.run_id, "data_fingerprint": cache.manifest.fingerprint}
    model, weights, mesh = _restore(spec, run_dir(workdir, spec.run_id), identity)
    return Finished(spec, cache, mesh, model, weights)


def _restore(spec: RunSpec, folder: Path, identity: dict[str, str]) -> tuple[Model, Any, Mesh]:
    """The model of a run, the weights of its newest checkpoint, and the mesh they lie on."""
    execution = Execution(data=1, layer_loop="scan")
    mesh = make_mesh(execution)
    model = abstract_model(spec.model, execution)
    restored = None
    if (folder / "checkpoints").is_dir():  # orbax would make it
        with jax.set_mesh(mesh):
            checkpoints = Checkpoints(folder / "checkpoints", keep=1, identity=identity)
            restored = checkpoints.restore(abstract_state(mesh, model, spec.train))
            checkpoints.close()
    if restored is None:
        raise InputError("--workdir", str(folder.parents[1]), f"has no checkpoint of {spec.run_id}")
    return model, joined(restored[0].params, restored[0].measured), mesh


class Comparison(NamedTuple):
    """A run's loss under a causal routing against its loss as trained, and what each layer did."""

    run_id: str
    routing: str
    slack: float | None
    trained: Evaluation
    causal: Evaluation
    difference: Evaluation
    layers: dict[str, Quality]


def compare(run: Finished, routing: str, slack: float | None) -> Comparison:
    """Evaluates a run on its validation windows as trained, and under `routing` and `slack`."""
    scores = {}
    for name, arguments in {
        "trained": {"routing": "trained"},
        "causal": {"routing": routing, "slack": slack},
    }.items():
        with jax.set_mesh(run.mesh):
            step = compile_eval_step(run.mesh, run.model, run.spec.train, **arguments)
            windows = validation_batches(run.cache, run.spec.train, run.mesh)
            batches = (put_batch(batch, run.mesh) for batch in windows)
            scores[name] = evaluate(step, run.weights, batches)
    return Comparison(
        run.spec.run_id,
        routing,
        slack,
        summarise(scores["trained"]),
        summarise(scores["causal"]),
        difference(scores["causal"], scores["trained"]),
        quality(scores["causal"].counts, scores["causal"].weight_B),
    )


class Loaded(NamedTuple):
    """A finished run in Python: `nnx.merge(graphdef, weights)` is its model."""

    spec: RunSpec
    graphdef: Any
    weights: Any


def load(run_dir: str | Path) -> Loaded:
    """The spec of the finished run in `run_dir`, its model and its final weights; no data needed.

    graphdef, weights: as modjax.generate and modjax.unstack take them.
    Raises InputError where the folder holds no run, or no checkpoint of it.
    """
    spec = read_spec(Path(run_dir))
    model, weights, _ = _restore(spec, Path(run_dir), {"run_id": spec.run_id})
    return Loaded(spec, model.graphdef, weights)
