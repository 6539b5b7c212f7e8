"""Routers and rules of Skip, and the records of what it ran.

Legend: B batch, L positions, R scores of a position, D model width, A layers of one kind.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from modjax import specs
from modjax.nn.call import At, Call, Out
from modjax.nn.params import make_param, measured, read
from modjax.nn.records import Record, running_mean
from modjax.nn.routing.losses import masked_mean
from modjax.nn.routing.routers import Linear, linear

FASTER = 10  # times as far as a weight that the bias moves in an update


class Zero(Linear):
    """Linear scores r = h w, with w = 0 at the start."""

    def __init__(self, spec: specs.Router, shape: specs.Shape, *, outputs: int, rngs: nnx.Rngs):
        zeros = jnp.zeros((shape.d_model, outputs))
        self.w = make_param(zeros, ("replicated", None), role="router", decays=False)


class Centred(Zero):
    """Linear scores r = (h - mean) w + b of centred inputs."""

    def __init__(self, spec: specs.Router, shape: specs.Shape, *, outputs: int, rngs: nnx.Rngs):
        super().__init__(spec, shape, outputs=outputs, rngs=rngs)
        zeros = jnp.zeros((outputs,))
        self.b = make_param(zeros, ("replicated",), role="router", decays=False)
        self.mean = measured((shape.d_model,))

    def __call__(self, h_BLD: jax.Array, at: At, call: Call, cache: None = None) -> Out:
        h_BLD, counted = h_BLD.astype(jnp.float32), at.count(*h_BLD.shape[:2])[:, None] > 0
        centred_BLD = h_BLD - jax.lax.stop_gradient(read(self.mean))[None, None]
        scores_BLR = linear(centred_BLD, read(self.w)) + FASTER * read(self.b)[None, None]
        of_each_dim = jax.vmap(masked_mean, (2, None), 1)
        mean_BD = of_each_dim(jax.lax.stop_gradient(h_BLD), at.valid_BL)
        return Out(scores_BLR, records={"": Mean(jnp.where(counted, mean_BD, jnp.inf))})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mean(Record):
    """Record of the mean input of each row, (B, D), infinite for a row of padding."""

    mean_BD: jax.Array

    def observed(self, measured, updates, tokens=None):
        return {"mean": running_mean(measured["mean"], self.mean_BD, updates)}


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Skipped(Record):
    """Record of the positions at which a Skip ran its layer.

    scores_BL: scores, pooled if sequences decide; infinite where a position always runs.
    wanted_BL: positions that were to run. selected_BL: those that ran; the others were dropped.
    """

    scores_BL: jax.Array
    wanted_BL: jax.Array
    selected_BL: jax.Array

    def counts(self, valid_BL):
        masks = {"selected": self.selected_BL, "wanted": self.wanted_BL, "positions": valid_BL}
        return {
            name: jnp.sum(mask & valid_BL, axis=-1, dtype=jnp.float32)
            for name, mask in masks.items()
        }

    @classmethod
    def outcome(cls, counts):
        """Returns metrics by name, from the counts of each layer by its path: see `_shares`."""
        stacked = jax.tree.map(lambda *each: np.stack(each), *counts.values())
        return {f"skip_{name}": float(value) for name, value in _shares(stacked).items()}

    @classmethod
    def statistics(cls, records, valid_BL):
        """Returns scalars of one forward pass, such as skip/capacity: see `_shares`."""
        each = [jax.vmap(lambda r: r.counts(valid_BL))(record) for record in records.values()]
        stacked: Any = jax.tree.map(lambda *parts: jnp.concatenate(parts), *each)
        return {f"skip/{name}": value for name, value in _shares(stacked).items()}


def _shares(counts: dict[str, Any]) -> dict[str, Any]:
    """Returns shares of positions from counts, each (A, B), of NumPy or JAX.

    capacity, overflow: shares that ran, and that were dropped, averaged over layers.
    least, most: the least and the largest share of a layer that ran.
    variance: p (1 - p) averaged over layers and sequences, for the share p of a sequence that ran.
      It is 0 if a layer decides alike at all positions of a sequence.
    """
    number_AB = counts["positions"]  # 0 for a row of padding
    share_AB = counts["selected"] / number_AB.clip(1)
    number_A = number_AB.sum(axis=1).clip(1)
    share_A, wanted_A = (counts[n].sum(axis=1) / number_A for n in ("selected", "wanted"))
    return {
        "capacity": share_A.mean(),
        "overflow": (wanted_A - share_A).mean(),
        "least": share_A.min(),
        "most": share_A.max(),
        "variance": (share_AB * (1 - share_AB)).sum() / number_AB.clip(0, 1).sum().clip(1),
    }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Penalised(Record):
    """Loss of `MindSkip`. The arguments are those of `SkipRule.report`."""

    gates_BL: jax.Array
    valid_BL: jax.Array
    capacity: float = field(metadata={"static": True})
    rule: specs.MindSkip = field(metadata={"static": True})

    def loss(self, tokens=None, totals=None):
        share = self._share()
        if self.rule.excess:
            exceeds = (totals or {"share": share})["share"] > self.capacity
            share = jnp.where(exceeds, share - self.capacity, 0.0)
        return self.rule.penalty * share

    def totals(self):
        return {"share": self._share()} if self.rule.excess else {}

    def _share(self) -> jax.Array:
        """Returns the share of positions that run, with a gradient."""
        count = jnp.maximum(jnp.sum(self.valid_BL), 1).astype(jnp.float32)
        return jnp.sum(jnp.where(self.valid_BL, self.gates_BL, 0.0)) / count


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Followed(Record):
    """Scores that the threshold of `Quantile` follows. The arguments are those of `report`.

    quantile_B: the score that leaves the mean capacity of all layers; set by `together`.
    """

    scores_BL: jax.Array
    valid_BL: jax.Array
    quantile_B: jax.Array
    capacity: float = field(metadata={"static": True})
    rate: float = field(metadata={"static": True})

    @classmethod
    def together(cls, records):
        each = list(records.values())
        valid = jnp.concatenate([record.valid_BL.ravel() for record in each])
        scores = jnp.concatenate([record.scores_BL.ravel() for record in each])
        ran = sum(r.capacity * jnp.sum(r.valid_BL).astype(jnp.float32) for r in each)
        descending = -jnp.sort(jnp.where(valid, -scores, jnp.inf))
        always = jnp.sum(jnp.isposinf(descending))
        quantile = descending[jnp.maximum(jnp.round(ran).astype(jnp.int32) - 1, always)]
        return {
            name: replace(record, quantile_B=jnp.full_like(record.quantile_B, quantile))
            for name, record in records.items()
        }

    def observed(self, measured, updates, tokens=None):
        old, quantile = measured["threshold"], jnp.mean(self.quantile_B)
        known = jnp.isfinite(quantile)  # unless no layer had a position to decide about
        return {"threshold": jnp.where(known, old + self.rate * (quantile - old), old)}


class SkipRule(nnx.Module):
    """Base class of the rules of Skip, which run a layer where its score reaches a threshold."""

    def __init__(
        self, spec: specs.SkipRule, shape: specs.Shape, *, capacity: float, rngs: nnx.Rngs
    ):
        self.spec: Any = spec
        self.capacity = capacity

    def bound(self) -> jax.Array:
        """Returns the threshold, a float32 scalar without a gradient."""
        raise NotImplementedError

    def report(self, scores_BL: jax.Array, gates_BL: jax.Array, valid_BL: jax.Array) -> Record:
        """Returns the record of the rule, for its loss and its threshold.

        scores_BL: as `Skipped` has them.
        gates_BL: decisions, 0 or 1, with the straight-through gradient into the scores.
        valid_BL: False marks padding.
        """
        raise NotImplementedError


class MindSkip(SkipRule):
    """Rule with the threshold 0, that is sigmoid(r) >= 1/2 (arXiv 2410.13184)."""

    def bound(self):
        return jnp.float32(0)

    def report(self, scores_BL, gates_BL, valid_BL):
        return Penalised(gates_BL, valid_BL, self.capacity, self.spec)


class Quantile(SkipRule):
    """Rule whose threshold follows a quantile of the scores of all layers that have it."""

    def __init__(
        self, spec: specs.Quantile, shape: specs.Shape, *, capacity: float, rngs: nnx.Rngs
    ):
        super().__init__(spec, shape, capacity=capacity, rngs=rngs)
        self.threshold = measured((1,))

    def bound(self):
        return jax.lax.stop_gradient(read(self.threshold))[0]

    def report(self, scores_BL, gates_BL, valid_BL):
        none_B = jnp.zeros_like(scores_BL[:, 0])
        return Followed(scores_BL, valid_BL, none_B, self.capacity, self.spec.rate)
