"""The provenance of a run: source code, packages, settings and devices.

A run stores it in provenance.json at its start and in its record at its end. If --other-code
continues a run with another value, the value becomes "EARLIER then LATER".
"""

import functools
import hashlib
import importlib.metadata
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modjax.errors import SharedFault, require
from modjax.files import entries
from modjax.records import RunRecord, read_provenance, run_dir, write_provenance
from modjax.specs import ModelSpec, RunSpec
from modjax.specs.imports import combined, layer_source, own_layers, registered

logger = logging.getLogger("modjax")
COMPUTING = (
    "data",
    "kernels",
    "nn",
    "pretrained",
    "specs",
    "training",
)  # folders that decide a run's numbers
SOURCES = "[!.]*.py"  # without the hidden links that an editor leaves beside a file
PACKAGES = ("flax", "jax", "jaxlib", "numpy", "optax")
# jax's settings that change numbers, with the values for every process that modjax owns.
SETTINGS: dict[str, Any] = {
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_disable_jit": False,
    "jax_disable_most_optimizations": False,
    "jax_enable_x64": False,
    "jax_high_dynamic_range_gumbel": False,
    "jax_optimization_level": "UNKNOWN",
    "jax_random_seed_offset": 0,
    "jax_softmax_custom_jvp": False,
    "jax_threefry_partitionable": True,
    "jax_use_direct_linearize": True,
}
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
DEVICE_COUNT = "--xla_force_host_platform_device_count="  # left out of the flags, because FREE
CODE = "code of "
THEN = " then "
UNRECORDED = "not recorded"
# These move near ties, but a run may continue with others.
FREE = ("devices", "mesh", "remat", "cores")
OF_A_RUN = ("mesh", "remat", "cores")  # these may differ between the runs of a sweep
MOST_NAMED = 3


def fix_settings() -> None:
    """Applies `SETTINGS`, whatever the environment says, in a process that modjax owns."""
    import jax

    for name in SETTINGS.keys() & jax.config.values.keys():  # each release of jax has its own
        jax.config.update(name, SETTINGS[name])


@functools.cache
def _own_source() -> str:
    """Returns the hash of modjax's code that decides a run's numbers, at the first call."""
    root, digests = Path(__file__).parent, []
    folders = (path for folder in COMPUTING for path in (root / folder).rglob(SOURCES))
    for path in (*root.glob("sharding.py"), *folders):
        content = path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes()
        digests.append(hashlib.sha256(content).hexdigest())
    return combined(digests)


def source_code(model: ModelSpec | None = None) -> dict[str, str]:
    """Returns the hash of modjax's code and of each registered layer, by name.

    model: limits the layers to those of this model.
    """
    layers = registered() if model is None else own_layers(model)
    sources = {"modjax": _own_source()} | {name: layer_source(name) for name in layers}
    return {f"{CODE}{name}": digest for name, digest in sources.items() if digest}


def require_unchanged(code: Mapping[str, str]) -> None:
    """Raises SharedFault unless this process runs `code`, the source code of the sweep's start."""
    changed = [name for name, digest in source_code().items() if code.get(name, digest) != digest]
    accepted = "was edited while the sweep ran, which stops: its runs must use the same code"
    if changed:
        raise SharedFault("source code", ", ".join(changed), accepted)


def _without_jax(model: ModelSpec) -> dict[str, str]:
    """Returns the part of the provenance that is known without importing jax."""
    return source_code(model) | _versions() | {name: _flags(name) for name in FLAGS}


def _flags(variable: str) -> str:
    flags = os.environ.get(variable, "").split()
    return " ".join(flag for flag in flags if not flag.startswith(DEVICE_COUNT)) or "none"


@functools.cache
def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def provenance(model: ModelSpec, mesh: Any) -> dict[str, str]:
    """Returns the provenance of a run of `model` on `mesh` in this process."""
    import jax

    settings = {name: str(jax.config.values.get(name, SETTINGS[name])) for name in SETTINGS}
    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    hardware = {"device": mesh.devices.flat[0].device_kind, "devices": str(mesh.size)}
    hardware["mesh"] = axes or "one device"
    if hasattr(os, "sched_getaffinity"):
        hardware["cores"] = str(len(os.sched_getaffinity(0)))
    return _without_jax(model) | settings | hardware


def begin(folder: Path, now: dict[str, str], *, write: bool, other_code: bool) -> dict[str, str]:
    """Returns the recorded provenance of the run in `folder`, updated by `now`.

    write: whether to store it in provenance.json.
    Raises InputError if a recorded value differs, unless `other_code` is true.
    """
    earlier = _earlier(folder)
    if not earlier and _has_state(folder):  # the run began before provenance was recorded
        earlier = dict.fromkeys(now, UNRECORDED)
    if not other_code:
        _refuse({folder.name: _differing(earlier, now)}, "choose another folder, delete this run")
    found = earlier | now
    for name in earlier.keys() & now.keys():
        recorded = earlier[name]
        known = recorded.split(THEN) if name in FREE else [_last(recorded)]
        found[name] = recorded if now[name] in known else f"{recorded}{THEN}{now[name]}"
    if write and found != earlier:
        write_provenance(folder, found)
    return found


def _earlier(folder: Path) -> dict[str, str]:
    """Returns the recorded provenance of a run, or {} if it has no state to continue from."""
    return read_provenance(folder) if _has_state(folder) else {}


def _has_state(folder: Path) -> bool:
    """Returns whether the run in `folder` has ended or saved a checkpoint."""
    saved = any(path.name.isdecimal() for path in entries(folder / "checkpoints"))
    return saved or (folder / "result.json").exists()


def require_same(workdir: Path, specs: Sequence[RunSpec]) -> None:
    """Raises InputError, naming the runs, if some have another provenance than this process."""
    settings = {name: str(value) for name, value in SETTINGS.items()}
    differing = {}
    for spec in specs:
        earlier = _earlier(run_dir(workdir, spec.run_id))
        differing[spec.run_id] = _differing(earlier, _without_jax(spec.model) | settings)
    _refuse(differing, "choose another folder, delete these runs")


def require_readable(runs: Mapping[Path, ModelSpec]) -> None:
    """Raises InputError, naming the runs, if the code of their registered layers has changed.

    Only warns if modjax's own code has changed. runs: the model of each run, by its folder.
    """
    found = {f: _differing(read_provenance(f), source_code(model)) for f, model in runs.items()}
    own = f"{CODE}modjax"
    if warned := [folder.name for folder, names in found.items() if own in names]:
        logger.warning("modjax: trained with other %s than this: %s", own, _some(warned))
    layers = {folder.name: [n for n in names if n != own] for folder, names in found.items()}
    _refuse(layers, "import the code that trained them")


def _refuse(differing: Mapping[str, Sequence[str]], remedy: str) -> None:
    """Raises InputError if any run has changed values. differing: run id -> their names."""
    concerned = [run_id for run_id, names in differing.items() if names]
    names = ", ".join(sorted(set().union(*differing.values())))
    accepted = (
        f"had other values of {names} ({len(concerned)} runs): {remedy}, or pass --other-code "
        "(in Python, other_code=True)"
    )
    require(not concerned, "run", _some(concerned), accepted)


def _differing(earlier: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns the names of the recorded values that have changed, except FREE ones."""
    both = (earlier.keys() & now.keys()).difference(FREE)
    return sorted(name for name in both if _last(earlier[name]) not in (UNRECORDED, now[name]))


def _last(value: str) -> str:
    return value.rpartition(THEN)[2]


def differences(records: Iterable[RunRecord]) -> list[str]:
    """Returns a sentence for each value in which the records' provenance differs.

    Ignores OF_A_RUN: each run of a sweep has a share of the cores and a mesh that suits it.
    """
    found = {record.run_id: record.provenance for record in records}
    without = [run_id for run_id, values in found.items() if not values]
    said = []
    if 0 < len(without) < len(found):
        said.append(f"not recorded: the provenance of {_some(without)}")
    for name in dict.fromkeys(name for values in found.values() for name in values):
        runs_by_value: dict[str, list[str]] = {}
        for run_id, values in found.items():
            if name in values and name not in OF_A_RUN:
                runs_by_value.setdefault(str(values[name]), []).append(run_id)
        if len(runs_by_value) > 1:
            each = (f"{v} ({len(ids)}: {_some(ids)})" for v, ids in runs_by_value.items())
            said.append(f"the runs differ in their {name}: {'; '.join(each)}")
    return said


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
