"""What a run would be refused for, found before anything expensive starts."""

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
from modjax.spec import DataConfig, Execution, RunSpec
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
            model = abstract_model(config, execution)
            param_shardings(mesh, model.params, model.logical_axes)


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
