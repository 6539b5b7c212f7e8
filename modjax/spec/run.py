"""What a run computes, and how it is executed.

A `RunSpec` says what is computed and is hashed into the run's name; an `Execution` says how
(mesh, layer loop, rematerialisation, logging) and never changes that name.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from modjax.errors import (
    require,
    require_name,
    require_one_of,
    require_plain_name,
    require_positive,
)
from modjax.spec.fields import canonical, from_dict, to_dict
from modjax.spec.model import ModelSpec

FORMAT = 2  # of names and weights of runs: one of another format can't be resumed or opened
TRAINED = ("all", "routers")
ROUTER_ROLES = ("router", "predictor")  # of the parameters that "routers" are


@dataclass(frozen=True)
class TrainConfig:
    """One training run: batch, schedule, optimizer and evaluation.

    batch_size counts sequences per optimizer step; `accumulation` splits it into that many
    forward-backward passes; where experts are balanced by a loss, a forward pass over all of them
    goes before, which is not counted as FLOPs. The schedule is linear warm-up, then a cosine that
    reaches `final_learning_rate_fraction` at exactly the last step. `trained`: "all" parameters, or
    the "routers" with their predictors alone, where all else stays as it is, bit for bit.
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
    trained: str = "all"
    seed: int = 0

    def __post_init__(self):
        require_positive(
            self,
            "train",
            "batch_size",
            "seq_len",
            "steps",
            "learning_rate",
            "clip_norm",
            "accumulation",
            "eval_sequences",
            "eps",
        )
        require(
            0 <= self.warmup_steps <= self.steps,
            "train.warmup_steps",
            self.warmup_steps,
            f"must be between 0 and train.steps = {self.steps}",
        )
        require(
            self.batch_size % self.accumulation == 0,
            "train.accumulation",
            self.accumulation,
            f"must divide train.batch_size = {self.batch_size}",
        )
        floor = self.final_learning_rate_fraction
        require(0 <= floor <= 1, "train.final_learning_rate_fraction", floor, "must be in [0, 1]")
        for name in ("b1", "b2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"train.{name}", value, "must be in [0, 1)")
        for name in ("weight_decay", "eval_every", "seed"):
            value = getattr(self, name)
            require(value >= 0, f"train.{name}", value, "must be 0 or more")
        require_one_of("train.trained", self.trained, TRAINED)
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
        require_name("data.name", self.name)
        require_name("data.vocab", self.vocabulary)
        require_positive(self, "data", "max_epochs")
        require(self.seed >= 0, "data.seed", self.seed, "must be 0 or more")

    @property
    def vocabulary(self) -> str:
        """The vocabulary's part of the cache's name; a file counts by its own name."""
        return Path(self.vocab).name.replace(":", "-")


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides what a run computes; its hash names the run.

    base: the folder of a finished run, whose weights this one starts from; None, the seed's.
    """

    variant: str
    budget_flops: float
    model: ModelSpec
    train: TrainConfig
    data: DataConfig
    base: str | None = None

    def __post_init__(self):
        require_plain_name("variant", self.variant)
        require(self.budget_flops > 0, "budget_flops", self.budget_flops, "must be greater than 0")

    @property
    def run_id(self) -> str:
        """A readable slug and the first 8 hex digits of a hash of the format and the canonical
        JSON, which leaves defaults out: a new field renames no run, and a default never changes."""
        # Through from_dict, so that 1 and 1.0 in a float field name the same run.
        values = {"format": FORMAT} | canonical(from_dict(RunSpec, to_dict(self)))
        if self.base is not None:
            values["base"] = Path(self.base).name  # its run, wherever the folder lies
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
        require_one_of("execution.layer_loop", self.layer_loop, ("auto", "scan", "unroll"))
        require_one_of("execution.remat", self.remat, ("none", "dots", "full"))
        require(self.data >= 0, "execution.data", self.data, "must be 0 (the rest) or more")
        require_positive(
            self,
            "execution",
            "fsdp",
            "tensor",
            "expert",
            "log_every",
            "checkpoint_seconds",
            "keep_checkpoints",
        )
