"""Frozen configurations that validate themselves: the only thing the library accepts.

A `RunSpec` says what is computed and is hashed into the run's name; an `Execution` says how
(mesh, layer loop, rematerialisation, logging) and never changes that name.
"""

import dataclasses
import functools
import hashlib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

PATTERN_ENTRIES = (
    "dense", "mod", "stochastic", "positional", "learned_position", "token_choice", "attention",
    "threshold",
)  # fmt: skip
# How a routed block selects: as in training, or by one of the ways that never look ahead.
ROUTINGS = ("top_k", "router", "predictor", "paced", "threshold")
ROUTER_WEIGHTS = ("linear", "sigmoid", "two_sigmoid", "one_plus_tanh")
RESIDUALS = ("delta", "literal")
MLPS = ("gelu", "silu", "relu2", "geglu", "swiglu")
GATED_MLPS = ("geglu", "swiglu")
DTYPES = ("float32", "bfloat16")
MOST_SHOWN = 400  # characters of a value in a message


class InputError(ValueError):
    """Input that cannot be used: one line with the field, its value and what would be accepted."""

    def __init__(self, field: str, value: object, accepted: str):
        shown = repr(value)
        if len(shown) > MOST_SHOWN:
            shown = f"{shown[: MOST_SHOWN // 2]}...{shown[-MOST_SHOWN // 2 :]}"
        super().__init__(f"{field} = {shown}: {accepted}")


class SharedFault(InputError):
    """Bad input that would stop every other run of the sweep, too: its data or folder is gone."""


class Preempted(Exception):
    """SIGTERM arrived: the state of `step` is saved, and the same call goes on from there."""

    def __init__(self, step: int):
        super().__init__(f"stopped by SIGTERM at step {step}; state saved")
        self.step = step


def require(condition: bool, field: str, value: object, accepted: str) -> None:
    """Raises `InputError` unless `condition` holds."""
    if not condition:
        raise InputError(field, value, accepted)


def _require_one_of(field: str, value: str, accepted: tuple[str, ...]) -> None:
    require(value in accepted, field, value, f"must be one of {', '.join(accepted)}")


def _require_positive(config: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        require(value > 0, f"{prefix}.{name}", value, "must be greater than 0")


@dataclass(frozen=True)
class MoDConfig:
    """How a routed block selects tokens and adds its update (arXiv 2404.02258, Eq. 1).

    capacity: share of each sequence's positions that the block processes, in (0, 1].
    weight: how the raw router score r scales the update: r, sigmoid(r), 2 sigmoid(r), 1 + tanh(r).
    residual: what is scaled, with f the inner block and r its weight: `delta` x + r (f(x) - x),
      or `literal` x + r f(x).
    auxiliary_weight, predictor_weight: of the losses that teach the router's own score, or a
      predictor beside it, to select without the future (section 3.5); 0 leaves them out.
    balance_weight, z_weight: of the two losses of token choice.
    slack: a `threshold` block has room for slack * capacity of the positions in training.
    """

    capacity: float = 0.125
    weight: str = "linear"
    residual: str = "delta"
    auxiliary_weight: float = 0.0
    predictor_weight: float = 0.0
    balance_weight: float = 0.01
    z_weight: float = 0.001
    slack: float = 1.5

    def __post_init__(self):
        require(0 < self.capacity <= 1, "model.mod.capacity", self.capacity, "must be in (0, 1]")
        require(self.slack >= 1, "model.mod.slack", self.slack, "must be 1 or more")
        for name in ("auxiliary_weight", "predictor_weight", "balance_weight", "z_weight"):
            value = getattr(self, name)
            require(value >= 0, f"model.mod.{name}", value, "must be 0 or more")
        _require_one_of("model.mod.weight", self.weight, ROUTER_WEIGHTS)
        _require_one_of("model.mod.residual", self.residual, RESIDUALS)


class Slot(NamedTuple):
    """One place of the pattern.

    capacity: the share of positions that the block is to process; room: the share that it has
    room for in training, which is what it computes.
    """

    kind: str
    capacity: float
    room: float

    @property
    def routed(self) -> bool:
        return self.kind != "dense"


@dataclass(frozen=True)
class ModelConfig:
    """A decoder: `num_layers` blocks that repeat `pattern`, e.g. ("dense", "mod").

    An entry of the pattern is one of PATTERN_ENTRIES; a routed one may carry a capacity of its
    own, as in "mod:0.5", in place of mod.capacity.
    """

    vocab_size: int
    d_model: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    d_ff: int
    mlp: str = "gelu"
    tie_embeddings: bool = False
    pattern: tuple[str, ...] = ("dense",)
    mod: MoDConfig = field(default_factory=MoDConfig)
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = "float32"

    def __post_init__(self):
        _require_positive(
            self, "model", "vocab_size", "d_model", "num_layers", "num_heads", "num_kv_heads",
            "d_ff", "rope_base", "norm_eps",
        )  # fmt: skip
        require(
            self.d_model % self.num_heads == 0, "model.d_model", self.d_model,
            f"must be a multiple of model.num_heads = {self.num_heads}",
        )  # fmt: skip
        require(
            self.head_dim % 2 == 0, "model.num_heads", self.num_heads,
            f"must leave an even head width for rotary positions; d_model / num_heads is "
            f"{self.head_dim}",
        )  # fmt: skip
        require(
            self.num_heads % self.num_kv_heads == 0, "model.num_kv_heads", self.num_kv_heads,
            f"must divide model.num_heads = {self.num_heads}",
        )  # fmt: skip
        require(len(self.pattern) > 0, "model.pattern", self.pattern, "must name a block")
        for entry in self.pattern:
            self._check_entry(entry)
        kinds = [entry.partition(":")[0] for entry in self.pattern]
        for before, kind in zip(["nothing", *kinds], kinds, strict=False):
            require(
                kind != "attention" or before == "dense", "model.pattern", self.pattern,
                "an attention block ranks by the attention of the dense block that must come "
                "right before it",
            )  # fmt: skip
        require(
            self.num_layers % len(self.pattern) == 0, "model.num_layers", self.num_layers,
            f"must be a multiple of the pattern's length, {len(self.pattern)}",
        )  # fmt: skip
        _require_one_of("model.mlp", self.mlp, MLPS)
        _require_one_of("model.dtype", self.dtype, DTYPES)

    def _check_entry(self, entry: str) -> None:
        kind, colon, capacity = entry.partition(":")
        _require_one_of("model.pattern", kind, PATTERN_ENTRIES)
        try:
            fits = not colon or (kind != "dense" and 0 < float(capacity) <= 1)
        except ValueError:
            fits = False
        require(fits, "model.pattern", entry, "takes a capacity in (0, 1], for routed blocks only")

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The pattern, entry by entry; a dense block processes every position."""
        slots = []
        for kind, _, own in (entry.partition(":") for entry in self.pattern):
            capacity = 1.0 if kind == "dense" else float(own or self.mod.capacity)
            room = min(1.0, self.mod.slack * capacity) if kind == "threshold" else capacity
            slots.append(Slot(kind, capacity, room))
        return tuple(slots)

    def check_routing(self, routing: str, field: str) -> None:
        """Raises InputError where a model of this config has not learned to select by `routing`."""
        _require_one_of(field, routing, ROUTINGS)
        for slot in self.slots:
            able = self._routings(slot.kind)
            require(
                routing in able, field, routing,
                f"{slot.kind} blocks of this model can select by {', '.join(able)}; "
                "model.mod.predictor_weight > 0 teaches more, auxiliary_weight > 0 mod blocks only",
            )  # fmt: skip

    @property
    def routings(self) -> tuple[str, ...]:
        """Those of ROUTINGS that every block of this model can select by."""
        return tuple(r for r in ROUTINGS if all(r in self._routings(s.kind) for s in self.slots))

    def causal_routing(self) -> str | None:
        """The best way this model has to select without the future; None for a dense model."""
        routed = any(slot.routed for slot in self.slots)
        best = (r for r in ("predictor", "router", "threshold") if routed and r in self.routings)
        return next(best, None)

    def _routings(self, kind: str) -> tuple[str, ...]:
        if kind == "dense":
            return ROUTINGS
        own = kind in ("positional", "token_choice")  # their own rule never looks ahead
        learned = {
            # Attention received by a position comes from later ones.
            "threshold": kind != "attention",
            "router": own or (kind == "mod" and self.mod.auxiliary_weight > 0),
            "predictor": self.mod.predictor_weight > 0,
            "paced": self.mod.predictor_weight > 0,
        }
        return ("top_k", *(name for name, can in learned.items() if can))

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def num_groups(self) -> int:
        """How often the pattern repeats."""
        return self.num_layers // len(self.pattern)


@dataclass(frozen=True)
class TrainConfig:
    """One training run: batch, schedule, optimizer and evaluation.

    batch_size counts sequences per optimizer step; `accumulation` splits it into that many
    forward-backward passes. The schedule is linear warm-up, then a cosine that reaches
    `final_learning_rate_fraction` at exactly the last step.
    """

    batch_size: int
    seq_len: int
    steps: int
    learning_rate: float
    warmup_steps: int
    final_learning_rate_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulation: int = 1
    document_mask: bool = False
    eval_sequences: int = 256
    eval_every: int = 0
    seed: int = 0

    def __post_init__(self):
        _require_positive(
            self, "train", "batch_size", "seq_len", "steps", "learning_rate", "clip_norm",
            "accumulation", "eval_sequences", "eps",
        )  # fmt: skip
        require(
            0 <= self.warmup_steps <= self.steps, "train.warmup_steps", self.warmup_steps,
            f"must be between 0 and train.steps = {self.steps}",
        )  # fmt: skip
        require(
            self.batch_size % self.accumulation == 0, "train.accumulation", self.accumulation,
            f"must divide train.batch_size = {self.batch_size}",
        )  # fmt: skip
        floor = self.final_learning_rate_fraction
        require(0 <= floor <= 1, "train.final_learning_rate_fraction", floor, "must be in [0, 1]")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", value, "must be in [0, 1)")
        for name in ("weight_decay", "eval_every", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "must be 0 or more")
        require(self.seed < 2**31, "train.seed", self.seed, "must be below 2**31")

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len * self.steps


@dataclass(frozen=True)
class DataConfig:
    """Which token cache, and which order of it.

    name: the corpus ("stdlib", "text" files prepared under a name, "c4", "lm1b", ...).
    vocab: "bytes", "sentencepiece:SIZE", or the "FILE.model" that the corpus was prepared with.
    seed: fixes the permutation of windows in every epoch, shared by all runs of a sweep.
    max_epochs: a run that would read the corpus more often is refused.
    """

    name: str = "stdlib"
    vocab: str = "bytes"
    seed: int = 0
    max_epochs: float = 1.0

    def __post_init__(self):
        require(self.name != "", "data.name", self.name, "must name a prepared corpus")
        _require_positive(self, "data", "max_epochs")
        require(self.seed >= 0, "data.seed", self.seed, "must be 0 or more")


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides what a run computes; its hash names the run."""

    variant: str
    budget_flops: float
    model: ModelConfig
    train: TrainConfig
    data: DataConfig

    def __post_init__(self):
        require(
            self.variant != "" and all(c.isalnum() or c in "-_." for c in self.variant),
            "variant", self.variant, "must be made of letters, digits, '-', '_' and '.'",
        )  # fmt: skip
        require(len(self.variant) <= 64, "variant", self.variant, "must have at most 64 characters")
        require(self.budget_flops > 0, "budget_flops", self.budget_flops, "must be greater than 0")

    @property
    def run_id(self) -> str:
        """A readable slug and the first 8 hex digits of the hash of the canonical JSON."""
        # Through from_dict, so that 1 and 1.0 in a float field name the same run.
        values = to_dict(from_dict(RunSpec, to_dict(self)))
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        m = self.model
        budget = f"{self.budget_flops:.3g}".replace("e+", "e")
        return f"{self.variant}-{budget}-d{m.d_model}-l{m.num_layers}-{digest}"


@dataclass(frozen=True)
class Execution:
    """How runs are executed: nothing here changes what is computed or a run's name.

    layer_loop: "scan", "unroll", or "auto": unrolled on CPU, where the scan costs more than it
      saves, scanned elsewhere.
    remat: "none", "dots" (keep matrix products), or "full" (keep block inputs only).
    data, fsdp, tensor, expert: sizes of the mesh axes; `data` = 0 takes the remaining devices.
    """

    layer_loop: str = "auto"
    remat: str = "none"
    data: int = 0
    fsdp: int = 1
    tensor: int = 1
    expert: int = 1
    log_every: int = 10
    checkpoint_seconds: float = 300.0
    keep_checkpoints: int = 2
    tensorboard: bool = False

    def __post_init__(self):
        _require_one_of("execution.layer_loop", self.layer_loop, ("auto", "scan", "unroll"))
        _require_one_of("execution.remat", self.remat, ("none", "dots", "full"))
        require(self.data >= 0, "execution.data", self.data, "must be 0 (the rest) or more")
        _require_positive(
            self, "execution", "fsdp", "tensor", "expert", "log_every", "checkpoint_seconds",
            "keep_checkpoints",
        )  # fmt: skip


def to_dict(config: Any) -> dict[str, Any]:
    """A frozen config as nested plain dicts, ready for JSON."""
    return {name: _plain(getattr(config, name)) for name in _fields(type(config))}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return to_dict(value) if dataclasses.is_dataclass(value) else value


class _Field(NamedTuple):
    """A field's type; the JSON types that fit it without conversion; whether it has no default."""

    hint: Any
    fitting: frozenset[type]
    needed: bool


@functools.cache
def _fields(cls: type) -> dict[str, _Field]:
    hints, fields = get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        kinds = get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        fitting = frozenset({bool, int, float, str, types.NoneType}.intersection(kinds))
        needed = f.default is f.default_factory is dataclasses.MISSING
        fields[f.name] = _Field(hint, fitting, needed)
    return fields


def from_dict(cls: type[T], values: Mapping[str, Any], path: str = "") -> T:
    """Builds the frozen config `cls` from nested mappings, checking names and types.

    Raises InputError naming the field for an unknown or missing name, a value of another type,
    or one that the config itself refuses.
    """
    group = path.rstrip(".") or cls.__name__
    require(isinstance(values, Mapping), group, values, "must be a group of fields")
    fields, built = _fields(cls), {}
    for name, value in values.items():
        if name not in fields:
            known = f"unknown; known here: {', '.join(fields)}"
            raise InputError(f"{path}{name}", value, known)
        hint, fitting, _ = fields[name]
        fits = type(value) in fitting and (type(value) is not float or math.isfinite(value))
        built[name] = value if fits else _convert(hint, value, f"{path}{name}")
    missing = [name for name, field in fields.items() if field.needed and name not in built]
    if missing:
        raise InputError(f"{path}{missing[0]}", None, "missing, and has no default")
    return cls(**built)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_dict(hint, value, f"{where}.")  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        require(isinstance(value, list | tuple), where, value, "must be a list")
        return tuple(_convert(get_args(hint)[0], item, where) for item in value)
    if get_origin(hint) is dict:
        require(isinstance(value, Mapping), where, value, "must be a group of fields")
        return value
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        require(abs(value) < 10**308, where, value, "must be finite")
        value = float(value)
    if hint is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    accepted = hint if isinstance(hint, type | types.UnionType) else object
    ok = isinstance(value, accepted) and not (isinstance(value, bool) and hint is not bool)
    name = getattr(hint, "__name__", str(hint))
    require(ok, where, value, f"must be of type {name}")
    require(not isinstance(value, float) or math.isfinite(value), where, value, "must be finite")
    return value
