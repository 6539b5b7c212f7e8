"""Config files: from `FILE.py` and `--config.a.b=value` to frozen dataclasses.

A file defines `get_config()`, which returns an ml_collections.ConfigDict with the groups `model`,
`train`, `data`, `execution` and, for a grid of runs, `sweep`. A file may leave out the fields that
have a default in modjax/specs/; overrides reach them all the same. The config of a single run may
have a `base`: the folder of a finished run whose weights it starts from. A config may have a group
`engine`, with the `name` of the engine that does the runs, and its options.
"""

import ast
import contextlib
import dataclasses
import os
import runpy
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import ml_collections
from absl import flags

from modjax.errors import LONGEST_NAME, InputError, require
from modjax.files import read_file
from modjax.flops import run_flops
from modjax.scaling.plan.config import RECIPE_FIELDS, SweepConfig
from modjax.scaling.plan.grid import plan
from modjax.specs import DataConfig, Execution, ModelSpec, RunSpec, Spec, TrainConfig, from_dict
from modjax.specs.imports import import_all, places, user_code, without_unused
from modjax.specs.text import bounded

CONFIGS = Path(__file__).parents[3] / "configs"  # in a clone; an installed package has none
MOST_CONFIG = 2**20  # bytes of a config file
GROUPS = {"model": ModelSpec, "train": TrainConfig, "data": DataConfig, "execution": Execution}
PARSERS = {bool: flags.BooleanParser().parse, int: flags.IntegerParser().parse, float: float}


@dataclass(frozen=True)
class Experiment:
    """A config file's values and the runs that they describe.

    config: the values as plain data.
    sweep: None for a file that describes a single run.
    imports: import name -> file path or module name, see specs.imports.places. `load` imports
      all of them.
    command: the command line that asked for the experiment.
    engine: the group of that name, which `config` leaves out.
    """

    config_file: str
    config: dict[str, Any]
    execution: Execution
    sweep: SweepConfig | None
    specs: list[RunSpec]
    imports: dict[str, str]
    command: str = ""
    engine: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def load(config_file: str, overrides: Sequence[str] = (), command: str = "") -> Experiment:
    """Reads `FILE.py` or `FILE.py:ARGUMENT`, applies overrides "a.b=value", and imports `imports`.

    Raises InputError naming the field, its value and what is accepted, for an unknown override, a
    value of another type, or one that a spec refuses.
    """
    values = _read(config_file)
    engine = values.pop("engine", {})
    named = isinstance(engine, dict) and isinstance(engine.get("name", ""), str)
    require(named, "config.engine", engine, "must be a group of options, with a `name`")
    _add_defaults(values)
    for override in overrides:
        _override(values, override)
    for name in values:
        known = (*GROUPS, "sweep" if "sweep" in values else "base")
        require(name in known, f"config.{name}", "...", f"unknown; known: {', '.join(known)}")
    sweep = from_dict(SweepConfig, values["sweep"], "sweep.") if "sweep" in values else None
    arms = {f"sweep.arms.{name}": arm for name, arm in sweep.arms.items()} if sweep else {}
    imports = _import(config_file, {"model": values["model"]} | arms)
    execution = from_dict(Execution, values["execution"], "execution.")
    data = from_dict(DataConfig, values["data"], "data.")
    if sweep is not None:
        specs = plan(sweep, values["model"], values["train"], data)
    else:
        specs = [_single_run(values, data)]
    return Experiment(config_file, values, execution, sweep, specs, imports, command, engine)


def _single_run(values: dict[str, Any], data: DataConfig) -> RunSpec:
    model = without_unused(from_dict(ModelSpec, values["model"], "model."))
    train = from_dict(TrainConfig, values["train"], "train.")
    budget = run_flops(model, train, train.steps)
    names = [str(layer).partition("(")[0].lower() for layer, _ in model.repeated()]
    variant = "-".join(names)
    if len(variant) > LONGEST_NAME:
        variant = "-".join(dict.fromkeys(names))
    base = values["base"]
    require(isinstance(base, str | None), "config.base", base, "must be a folder, or None")
    base = None if base is None else os.path.realpath(base)
    return RunSpec(variant, budget, model, train, data, base)


def _import(config_file: str, models: dict[str, Any]) -> dict[str, str]:
    """Imports the files and modules listed in the `imports` field of each group.

    models: name -> group of model fields. File names are relative to the config's folder.
    Returns import name -> file path or module name.
    """
    folder, found = Path(config_file.partition(":")[0]).parent, {}
    for group, fields in models.items():
        if isinstance(fields, dict) and "imports" in fields:
            there = places(fields["imports"], folder, f"{group}.imports")
            import_all(there, f"{group}.imports")
            found |= there
    return found


def _read(config_file: str) -> dict[str, Any]:
    """Returns the values of a config file, with specs as text, as in plans and overrides."""
    path, _, argument = config_file.partition(":")
    try:
        read_file(Path(path), MOST_CONFIG)
    except OSError as error:
        raise InputError("--config", path, f"cannot be read: {error.strerror}") from error
    with user_code("--config", config_file, "its get_config() failed"), _base_of(Path(path)):
        get_config = runpy.run_path(path)["get_config"]
        config = get_config(argument) if argument else get_config()
    require(
        isinstance(config, ml_collections.ConfigDict),
        "--config",
        config_file,
        "its get_config() must return an ml_collections.ConfigDict",
    )
    return _as_text("", config.to_dict())


@contextlib.contextmanager
def _base_of(config: Path) -> Iterator[None]:
    """Lets a config import `base`: the base.py beside it, or else that of modjax's configs/."""

    folder = config.parent.absolute()

    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return PathFinder.find_spec(name, [str(folder), str(CONFIGS)]) if name == "base" else None

    finder: Any = SimpleNamespace(find_spec=find_spec)
    earlier = sys.modules.pop("base", None)
    sys.meta_path.insert(0, finder)
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name == "base":
            error.msg += f"; copy base.py from modjax's configs/ to {folder}"
        raise
    finally:
        sys.meta_path.remove(finder)
        sys.modules.pop("base", None)  # the next config may have another
        if earlier is not None:
            sys.modules["base"] = earlier


def _as_text(name: str, value: Any) -> Any:
    """Returns the value of field `name`, with every spec in it replaced by its text."""
    if isinstance(value, dict):
        return {inner: _as_text(inner, item) for inner, item in value.items()}
    if name == "layers":
        return ", ".join(map(str, value if isinstance(value, list | tuple) else [value]))
    return str(value) if isinstance(value, Spec) else value


def _add_defaults(values: dict[str, Any]) -> None:
    """Adds the fields that have a default, so that overrides reach them."""
    for name, cls in GROUPS.items():
        _fill(values, name, cls)
    if "sweep" in values:
        _fill(values, "sweep", SweepConfig)
    else:
        values.setdefault("base", None)


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


def _override(values: dict[str, Any], override: str) -> None:
    """Sets one field, which must exist."""
    name, _, text = override.partition("=")
    field, parent, part, value = f"--config.{name}", values, "", values
    for part in name.split("."):
        require(isinstance(value, dict), field, text, "is inside a plain value")
        known = f"unknown; known here: {', '.join(sorted(map(str, value)))}"
        require(part in value, field, text, known)
        parent, value = value, value[part]
    parent[part] = parse(field, text, value)


def parse(field: str, text: str, old: Any) -> Any:
    """Returns text as a value of the type of `old`. None takes any value, which its spec checks."""
    kind = type(old)
    if kind is str:
        return text
    if kind in PARSERS:
        try:
            return PARSERS[kind](text)
        except ValueError as error:
            accepted = f"must be of type {kind.__name__}, like {old!r}"
            raise InputError(field, text, accepted) from error
    text = bounded(text, field)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        value = tuple(text.split(",")) if isinstance(old, tuple | list) else text
    if isinstance(old, dict):
        accepted = f"is a group; set one of its fields: {', '.join(sorted(map(str, old)))}"
        require(isinstance(value, dict), field, text, accepted)
    elif isinstance(old, tuple | list) and not isinstance(value, tuple | list):
        return (value,)
    return value
