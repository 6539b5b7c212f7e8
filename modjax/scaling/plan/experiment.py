"""Config files: from `FILE.py` and `--config.a.b=value` to frozen dataclasses.

A file has `get_config()`, which returns an ml_collections.ConfigDict with the groups `model`,
`train`, `data`, `execution` and, where it describes a grid, `sweep`. Fields that have a default
in modjax/specs/ may be left out and can still be overridden. A single run may have a `base`, the
folder of a finished run whose weights it starts from.
"""

import ast
import dataclasses
import os
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_type_hints

import ml_collections
from absl import flags
from ml_collections import config_flags

from modjax.errors import InputError, require
from modjax.files import read_file
from modjax.flops import run_flops
from modjax.scaling.plan.config import RECIPE_FIELDS, SweepConfig
from modjax.scaling.plan.grid import plan
from modjax.specs import DataConfig, Execution, ModelSpec, RunSpec, Spec, TrainConfig, from_dict
from modjax.specs.imports import import_all, places, user_code, without_unused
from modjax.specs.text import bounded

MOST_CONFIG = 2**20  # bytes of a config file
GROUPS = {"model": ModelSpec, "train": TrainConfig, "data": DataConfig, "execution": Execution}


@dataclass(frozen=True)
class Experiment:
    """What a config file asks for: its values as plain data, and the runs they mean.

    `sweep` is None for a file that describes a single run. imports: where each of its imports is,
    see spec.imports.places; all of them are imported.
    """

    config_file: str
    config: dict[str, Any]
    execution: Execution
    sweep: SweepConfig | None
    specs: list[RunSpec]
    imports: dict[str, str]


def load(config_file: str, overrides: Sequence[str] = ()) -> Experiment:
    """Reads `FILE.py` or `FILE.py:ARGUMENT`, and applies overrides "a.b=value".

    Imports what it names in `imports`. Raises InputError naming the field, its value and what is
    known for an unknown override, a value of another type, or one that a config refuses.
    """
    config = _with_defaults(_as_text("", _read(config_file)))
    for override in overrides:
        config = _override(config, override)
    values = config.to_dict()
    for name in values:
        known = (*GROUPS, "sweep" if "sweep" in values else "base")
        require(name in known, f"config.{name}", "...", f"unknown; known: {', '.join(known)}")
    sweep = from_dict(SweepConfig, values["sweep"], "sweep.") if "sweep" in values else None
    arms = {f"sweep.arms.{name}": arm for name, arm in sweep.arms.items()} if sweep else {}
    imports = _imported(config_file, {"model": values["model"]} | arms)
    execution = from_dict(Execution, values["execution"], "execution.")
    data = from_dict(DataConfig, values["data"], "data.")
    if sweep is not None:
        specs = plan(sweep, values["model"], values["train"], data)
        return Experiment(config_file, values, execution, sweep, specs, imports)
    model = without_unused(from_dict(ModelSpec, values["model"], "model."))
    train = from_dict(TrainConfig, values["train"], "train.")
    budget = run_flops(model, train, train.steps)
    variant = "-".join(str(layer).partition("(")[0].lower() for layer, _ in model.repeated())
    base = values["base"]
    require(isinstance(base, str | None), "config.base", base, "must be a folder, or None")
    base = None if base is None else os.path.realpath(base)
    spec = RunSpec(variant, budget, model, train, data, base)
    return Experiment(config_file, values, execution, None, [spec], imports)


def _imported(config_file: str, models: dict[str, Any]) -> dict[str, str]:
    """Imports what these groups of fields name, by their name; returns the places of all that.

    Paths are relative to the config's folder.
    """
    folder, found = Path(config_file.partition(":")[0]).parent, {}
    for group, fields in models.items():
        if isinstance(fields, dict) and "imports" in fields:
            there = places(fields["imports"], folder, f"{group}.imports")
            import_all(there, f"{group}.imports")
            found |= there
    return found


def _read(config_file: str) -> dict[str, Any]:
    path, _, argument = config_file.partition(":")
    try:
        read_file(Path(path), MOST_CONFIG)
    except OSError as error:
        raise InputError("--config", path, f"cannot be read: {error.strerror}") from error
    with user_code("--config", config_file, "its get_config() failed"):
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(argument) if argument else get_config()
    require(
        isinstance(config, ml_collections.ConfigDict),
        "--config",
        config_file,
        "its get_config() must return an ml_collections.ConfigDict",
    )
    return config.to_dict()


def _as_text(name: str, value: Any) -> Any:
    """Returns a value with all specs as text, in which plans are kept and overrides are given."""
    if isinstance(value, dict):
        return {inner: _as_text(inner, item) for inner, item in value.items()}
    if name == "layers":
        return ", ".join(map(str, value if isinstance(value, list | tuple) else [value]))
    return str(value) if isinstance(value, Spec) else value


def _with_defaults(values: dict[str, Any]) -> ml_collections.ConfigDict:
    """Adds the fields that have a default, so that overrides reach them."""
    for name, cls in GROUPS.items():
        _fill(values, name, cls)
    if "sweep" in values:
        _fill(values, "sweep", SweepConfig)
    else:
        values.setdefault("base", None)
    return ml_collections.ConfigDict(values)


def _fill(parent: dict[str, Any], name: str, cls: type) -> None:
    group = parent.setdefault(name, {})
    require(isinstance(group, dict), f"config.{name}", group, "must be a group of fields")
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        decided = cls is TrainConfig and "sweep" in parent and field.name in RECIPE_FIELDS
        if dataclasses.is_dataclass(hints[field.name]):
            _fill(group, field.name, hints[field.name])
        elif field.default is not dataclasses.MISSING and not decided:
            group.setdefault(field.name, field.default)


def _override(config: ml_collections.ConfigDict, override: str) -> ml_collections.ConfigDict:
    name, _, text = override.partition("=")
    group: Any = config
    parent: Any = config
    for part in name.split("."):
        inside = isinstance(group, ml_collections.ConfigDict)
        known = f"unknown; known here: {', '.join(group)}" if inside else "is inside a plain value"
        require(inside and part in group, f"--config.{name}", text, known)
        parent, group = group, group[part]
    if group is None or isinstance(group, tuple):  # the spec that it is for knows its type
        text = bounded(text, f"--config.{name}")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            value = text if group is None else tuple(text.split(","))
        one = group is not None and not isinstance(value, tuple | list)
        parent[part] = (value,) if one else value
        return config
    # A private FlagValues keeps absl's own flags and its help out of the command line.
    values = flags.FlagValues()
    arguments = ["modjax", f"--config.{name}={text}"]
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
        return values.config
    except (flags.Error, ValueError, TypeError) as error:
        kind = f"must be of type {type(group).__name__}, like {group!r}"
        if isinstance(group, ml_collections.ConfigDict):
            kind = f"is a group; set one of its fields: {', '.join(group)}"
        raise InputError(f"--config.{name}", text, kind) from error
