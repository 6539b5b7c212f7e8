"""Specs of a run, whose hash names it, and of its execution, which does not affect the name."""

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

from modjax.errors import require, require_name, require_plain_name
from modjax.specs.fields import Accepts, NotNegative, Positive, canonical, check, one_of
from modjax.specs.model import ModelSpec

FORMAT = 2  # of run names and weights: a run of another format cannot be resumed or opened
ROUTER_ROLES = ("router", "predictor")  # roles of the parameters that trained="routers" trains
# Activations of a layer that Execution.remat may keep. "hidden": an MLP's, before its activation.
KEPT = ("queries", "keys", "values", "context", "hidden")

Share = Annotated[float, Accepts("must be in [0, 1]", lambda share: 0 <= share <= 1)]
Decay = Annotated[float, Accepts("must be in [0, 1)", lambda decay: 0 <= decay < 1)]
Seed = Annotated[NotNegative[int], Accepts("must be below 2**31", lambda seed: seed < 2**31)]
Rest = Annotated[int, Accepts("must be 0 (the rest) or more", lambda size: size >= 0)]
Fewest = Annotated[int, Accepts("must be 0 (the fewest) or more", lambda size: size >= 0)]


def _is_remat(remat: str) -> bool:
    return remat in ("auto", "none", "full") or set(remat.split(",")) <= set(KEPT)


@dataclass(frozen=True)
class TrainConfig:
    """Batch, schedule, optimizer and evaluation of a training run.

    batch_size: sequences of an optimizer step, greater than 0.
    seq_len: tokens of a sequence, greater than 0.
    steps: optimizer steps, greater than 0.
    learning_rate: peak learning rate, greater than 0. A linear warm-up leads to it, and a cosine
      from there to `final_learning_rate_fraction` of it at exactly the last step.
    warmup_steps: steps of the warm-up, 0 to `steps`.
    final_learning_rate_fraction: in [0, 1].
    b1, b2, eps, weight_decay: of AdamW; b1 and b2 are in [0, 1).
    clip_norm: bound on the norm of the gradients, greater than 0.
    accumulation: forward and backward passes of a step; divides batch_size. If a loss balances
      experts, one more forward pass comes first, which FLOPs do not count.
    document_mask: whether attention stays within documents.
    eval_sequences: held-out sequences of an evaluation, greater than 0.
    eval_every: steps between evaluations; 0 evaluates after the last step only.
    trained: "all" parameters, or "routers" with predictors; all others stay bit-identical.
    seed: of the initial weights and of random routing, 0 to 2**31 - 1.
    objective: "next_token", the cross-entropy of the next token, or "base", KL(base || model),
      where the base is the model with every position processed. The latter needs trained="routers".
      FLOPs do not count the forward pass of the base. Evaluations report the cross-entropy.
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
    objective: Annotated[str, one_of("next_token", "base")] = "next_token"

    def __post_init__(self):
        check(self, "train")
        fixed = self.objective != "base" or self.trained == "routers"
        accepted = "needs train.trained = 'routers': otherwise the base would change in training"
        require(fixed, "train.objective", self.objective, accepted)
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
    """Token cache of a run, and the order in which it is read.

    name: corpus: "stdlib", "c4", "lm1b", ..., or the name of prepared text files.
    vocab: "bytes", "sentencepiece:SIZE", the "FILE.model" that the corpus was prepared with, or
      "NAME.json" for the tokenizer of the pretrained model NAME.
    seed: fixes the order of windows in every epoch, for all runs of a sweep; 0 or more.
    max_epochs: bound on the epochs of a run, greater than 0. A longer run is refused.
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
        """Part of the cache's name: "bytes", "sentencepiece-SIZE", or a file without folders."""
        return Path(self.vocab).name.replace(":", "-")


@dataclass(frozen=True)
class RunSpec:
    """Everything that decides what a run computes.

    variant: name of the arm, of letters, digits, '-', '_' and '.'.
    budget_flops: training FLOPs that the run was sized for, greater than 0.
    model, train, data: specs of the model, its training and its data.
    base: folder of a finished run whose weights start this run; None draws them from the seed.
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
        objective = self.train.objective
        able = objective != "base" or "all" in self.model.routings
        accepted = "needs a layer with the routing 'all', such as Skip(Attention())"
        require(able, "train.objective", objective, accepted)

    @cached_property
    def run_id(self) -> str:
        """A readable prefix, and 8 hex digits of a hash of the format and the canonical form."""
        values = {"format": FORMAT} | canonical(self)
        if self.base is not None:
            values["base"] = Path(self.base).name  # the run's id, wherever its folder is
        text = json.dumps(values, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(text.encode()).hexdigest()[:8]
        m = self.model
        budget = f"{self.budget_flops:.3g}".replace("e+", "e")
        return f"{self.variant}-{budget}-d{m.d_model}-l{m.num_layers}-{digest}"


@dataclass(frozen=True)
class Execution:
    """Settings that change neither what a run computes nor its name.

    layer_loop: "scan", "unroll", or "auto", which unrolls on CPU, where a scan costs more than it
      saves, and scans elsewhere.
    remat: what the backward pass recomputes: "none", "full" (all but the inputs of the layers),
      "full" but for some of the activations KEPT, such as "queries,keys,values,context", or "auto",
      the least that fits the devices' memory.
    data, fsdp, tensor, expert: sizes of the mesh axes, greater than 0; data = 0 takes the remaining
      devices, and fsdp = 0 the fewest that have enough memory together.
    log_every: steps between lines of metrics, greater than 0.
    checkpoint_seconds: seconds between checkpoints, greater than 0.
    keep_checkpoints: number of checkpoints to keep, greater than 0.
    tensorboard: whether to write metrics for TensorBoard too.
    """

    layer_loop: Annotated[str, one_of("auto", "scan", "unroll")] = "auto"
    remat: Annotated[
        str, Accepts(f"must be auto, none, full, or names of {', '.join(KEPT)}", _is_remat)
    ] = "auto"
    data: Rest = 0
    fsdp: Fewest = 0
    tensor: Positive[int] = 1
    expert: Positive[int] = 1
    log_every: Positive[int] = 10
    checkpoint_seconds: Positive[float] = 300.0
    keep_checkpoints: Positive[int] = 2
    tensorboard: bool = False

    def __post_init__(self):
        check(self, "execution")

    def settled(self) -> "Execution":
        """Returns the settings where memory does not matter: fsdp 1 for 0, remat none for auto."""
        remat = "none" if self.remat == "auto" else self.remat
        return replace(self, fsdp=self.fsdp or 1, remat=remat)
