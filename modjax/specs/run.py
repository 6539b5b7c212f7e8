"""Specs of a run, whose hash names it, and of its execution, which changes no name."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from modjax.errors import require, require_name, require_plain_name
from modjax.specs.fields import Accepts, NotNegative, Positive, canonical, check, one_of
from modjax.specs.model import ModelSpec

FORMAT = 2  # of names and weights of runs: one of another format can't be resumed or opened
ROUTER_ROLES = ("router", "predictor")  # of the parameters that "routers" are

Share = Annotated[float, Accepts("must be in [0, 1]", lambda share: 0 <= share <= 1)]
Decay = Annotated[float, Accepts("must be in [0, 1)", lambda decay: 0 <= decay < 1)]
Seed = Annotated[NotNegative[int], Accepts("must be below 2**31", lambda seed: seed < 2**31)]
Rest = Annotated[int, Accepts("must be 0 (the rest) or more", lambda size: size >= 0)]


@dataclass(frozen=True)
class TrainConfig:
    """One training run: batch, schedule, optimizer and evaluation.

    batch_size: sequences of an optimizer step. accumulation: forward-backward passes of a step.
      Where a loss balances experts, one more forward pass goes before, not counted as FLOPs.
    The schedule is linear warm-up, then a cosine that reaches `final_learning_rate_fraction` at
    exactly the last step.
    trained: "all" parameters, or the "routers" and predictors; the rest stays bit for bit.
    """

    batch_size: Positive[int]
    seq_len: Positive[int]
    steps: Positive[int]
    learning_rate: Positive[float]
    warmup_steps: int
    final_learning_rate_fraction: Share = 0.1
    b1: Decay = 0.9
    b2: Decay = 0.98
    eps: Positive[float] = 1e-8
    weight_decay: NotNegative[float] = 0.1
    clip_norm: Positive[float] = 1.0
    accumulation: Positive[int] = 1
    document_mask: bool = False
    eval_sequences: Positive[int] = 256
    eval_every: NotNegative[int] = 0
    trained: Annotated[str, one_of("all", "routers")] = "all"
    seed: Seed = 0

    def __post_init__(self):
        check(self, "train")
        fits = 0 <= self.warmup_steps <= self.steps
        accepted = f"must be between 0 and train.steps = {self.steps}"
        require(fits, "train.warmup_steps", self.warmup_steps, accepted)
        fits = self.batch_size % self.accumulation == 0
        accepted = f"must divide train.batch_size = {self.batch_size}"
        require(fits, "train.accumulation", self.accumulation, accepted)

    @property
    def tokens(self) -> int:
        return self.batch_size * self.seq_len * self.steps


@dataclass(frozen=True)
class DataConfig:
    """The token cache of a run, and the order in which it is read.

    name: the corpus ("stdlib", "text" files prepared under a name, "c4", "lm1b", ...).
    vocab: "bytes", "sentencepiece:SIZE", or the "FILE.model" that the corpus was prepared with.
    seed: fixes the permutation of windows in every epoch, shared by all runs of a sweep.
    max_epochs: a run that would read the corpus more often is refused.
    """

    name: str = "stdlib"
    vocab: str = "bytes"
    seed: NotNegative[int] = 0
    max_epochs: Positive[float] = 1.0

    def __post_init__(self):
        require_name("data.name", self.name)
        require_name("data.vocab", self.vocabulary)
        check(self, "data")

    @property
    def vocabulary(self) -> str:
        """The vocabulary's part of the cache's name; a file counts by its own name."""
        return Path(self.vocab).name.replace(":", "-")


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides what a run computes.

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
        """A readable slug, and 8 hex digits of a hash of the format and the canonical form."""
        values = {"format": FORMAT} | canonical(self)
        if self.base is not None:
            values["base"] = Path(self.base).name  # its run, wherever the folder lies
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        m = self.model
        budget = f"{self.budget_flops:.3g}".replace("e+", "e")
        return f"{self.variant}-{budget}-d{m.d_model}-l{m.num_layers}-{digest}"


@dataclass(frozen=True)
class Execution:
    """Settings that change neither what is computed nor a run's name.

    layer_loop: "scan", "unroll", or "auto": unrolled on CPU, where the scan costs more than it
      saves, scanned elsewhere.
    remat: "none", "dots" (keep matrix products), or "full" (keep block inputs only).
    data, fsdp, tensor, expert: sizes of the mesh axes; `data` = 0 takes the remaining devices.
    """

    layer_loop: Annotated[str, one_of("auto", "scan", "unroll")] = "auto"
    remat: Annotated[str, one_of("none", "dots", "full")] = "none"
    data: Rest = 0
    fsdp: Positive[int] = 1
    tensor: Positive[int] = 1
    expert: Positive[int] = 1
    log_every: Positive[int] = 10
    checkpoint_seconds: Positive[float] = 300.0
    keep_checkpoints: Positive[int] = 2
    tensorboard: bool = False

    def __post_init__(self):
        check(self, "execution")
