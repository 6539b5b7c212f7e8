"""Choosing and opening finished runs, and evaluating them under another routing."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh

from modjax.data.codecs.codec import Bytes, Codec
from modjax.data.token_cache import TokenCache, cache_dir, open_cache
from modjax.errors import InputError, require
from modjax.provenance import require_readable
from modjax.records import read_spec, run_dir, scan, warn_left_out
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


class Chosen(NamedTuple):
    """Finished runs to open.

    specs: their specs.
    failures: id of a finished run that is not among them -> why its spec cannot be used.
    """

    specs: list[RunSpec]
    failures: dict[str, InputError]


def choose(workdir: Path, run_id: str | None, *, routed: bool = False) -> Chosen:
    """Returns the finished runs of `workdir`, or the one with this `run_id`.

    routed: leave out the runs without a routed layer.
    Warns of a result that cannot be read or belongs to another folder, and leaves it out.
    Raises InputError if no run remains, and if the run with this `run_id` cannot be used.
    """
    found = scan(workdir)
    if run_id in found.left_out:
        raise InputError("--run", run_id, found.left_out[run_id])
    warn_left_out(found.left_out)
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


class Finished(NamedTuple):
    """A finished run.

    spec: what it computes.
    cache: the token cache that it was trained on.
    mesh: one device, which holds the weights.
    model: its graph definition, with the axes and roles of its weights.
    weights: its final weights.
    """

    spec: RunSpec
    cache: TokenCache
    mesh: Mesh
    model: Model
    weights: Any


def open_run(spec: RunSpec, *, workdir: Path, data_dir: Path) -> Finished:
    """Opens a finished run and changes nothing in its folder.

    Raises InputError if its data or its final weights are missing.
    """
    cache = open_cache(cache_dir(data_dir, spec.data))
    identity = {"run_id": spec.run_id, "data_fingerprint": cache.manifest.fingerprint}
    mesh, model, weights = _restore(spec, run_dir(workdir, spec.run_id), identity)
    return Finished(spec, cache, mesh, model, weights)


def _restore(spec: RunSpec, folder: Path, identity: dict[str, str]) -> tuple[Mesh, Model, Any]:
    mesh = make_mesh(Execution(data=1))
    with jax.set_mesh(mesh):
        return mesh, *read_finished(mesh, spec, folder, identity)


class Comparison(NamedTuple):
    """The loss of a run under another routing against its loss as trained, in nats per token.

    trained, causal: the evaluation as trained, and the one under `routing`.
    difference: causal - trained, paired by sequence.
    layers: path of a layer -> name -> what it measured under `routing`, see `Record.outcome`.
    """

    run_id: str
    routing: str
    slack: float | None
    trained: Evaluation
    causal: Evaluation
    difference: Evaluation
    layers: dict[str, dict[str, float]]


def compare(run: Finished, routing: str, slack: float | None) -> Comparison:
    """Evaluates a run on its validation text, as trained and under `routing`.

    slack: factor on the capacity of routed layers under `routing`, see modjax.nn.Call.
    """
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
    """A finished run in Python: `nnx.merge(graphdef, weights)` is its model.

    tokenizer: the codec of its vocabulary, or None if that needs data and none was named.
    """

    spec: RunSpec
    graphdef: Any
    weights: Any
    tokenizer: Codec | None


def load(
    run_dir: str | Path,
    *,
    data_dir: str | Path | None = None,
    imports: Sequence[str] = (),
    other_code: bool = False,
) -> Loaded:
    """Returns the spec, the graph definition, the final weights and the codec of a finished run.

    Changes nothing in the folder. `modjax.generate` and `modjax.unstack` take the graph definition
    and the weights.

    data_dir: the folder of the token caches. Without it, only a run on bytes gets its codec; the
      weights need no data.
    imports: files and modules that register layers of the run, imported first. Nothing that the
      run's folder names is imported.
    other_code: whether to read a run whose registered layers have been edited since.
    Raises InputError if the folder holds no run, an unfinished run or a copy of another run, if
    the final weights are missing, and if `data_dir` has not the data of the run.
    """
    there = os.path.exists(os.path.join(run_dir, "spec.json"))  # False for a null byte, too
    require(there, "modjax.load", str(run_dir), "no such run")
    folder = Path(os.path.realpath(run_dir))
    import_all(places(tuple(imports), Path(), "imports"), "imports")
    spec = read_spec(folder, folder.name)
    if not other_code:
        require_readable({folder: spec.model})
    identity = {"run_id": spec.run_id}
    codec = Bytes() if spec.data.vocab == "bytes" else None
    if data_dir is not None:
        cache = open_cache(cache_dir(Path(data_dir), spec.data))
        identity["data_fingerprint"], codec = cache.manifest.fingerprint, cache.codec()
    _, model, weights = _restore(spec, folder, identity)
    return Loaded(spec, model.graphdef, weights, codec)
