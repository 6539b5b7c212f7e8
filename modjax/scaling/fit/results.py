"""Results of the fits: frozen dataclasses, each with its refusal in words, and their JSON form."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from modjax.errors import require
from modjax.records import RunRecord, causal_loss, causal_routing, write_json
from modjax.scaling.fit.parametric import Surface

SIZES = {
    "non_embedding": "params_non_embedding",
    "total": "params_total",
    "active": "params_active",
}
QUANTITIES = ("parameters", "forward_flops")

Range = tuple[float, float]


@dataclass(frozen=True)
class Parabola:
    """loss = c0 + c1 u + c2 u^2 with u = log10(x) - log10(sqrt(low * high)), of one arm and budget.

    x is `quantity`: "parameters", or "forward_flops" per token. low, high: the sampled range of x.
    noise: standard deviation of one run's loss about the parabolas of this budget, in nats.
    optimum, loss: the vertex; off_centre: its place in the sampled range of log10(x), from -1 to 1.
    refusal: why there is no vertex, in words; vertex and intervals are then None.
    """

    arm: str
    budget_flops: float
    quantity: str
    runs: int
    sizes: int
    low: float | None
    high: float | None
    coefficients: tuple[float, float, float] | None
    noise: float | None
    optimum: float | None
    optimum_interval: Range | None
    loss: float | None
    loss_interval: Range | None
    off_centre: float | None
    refusal: str | None

    def at(self, x: np.ndarray) -> np.ndarray:
        """Fitted loss at `x`; only for a parabola that was accepted."""
        assert self.coefficients is not None and self.low is not None and self.high is not None
        u = np.log10(x) - (math.log10(self.low) + math.log10(self.high)) / 2
        return np.polynomial.polynomial.polyval(u, self.coefficients)


@dataclass(frozen=True)
class PowerLaw:
    """`quantity` at the optimum = coefficient * budget_flops ** exponent, of one arm.

    quantity: "parameters", "forward_flops" or "loss". freedom: points less 2; 0 is an exact fit.
    """

    arm: str
    quantity: str
    points: int
    freedom: int
    coefficient: float | None
    exponent: float | None
    exponent_interval: Range | None
    refusal: str | None


@dataclass(frozen=True)
class Gap:
    """An arm against the baseline at one budget, each at its own optimum.

    loss: difference in nats, negative where the arm is better; percent: of the baseline's loss;
    flops_ratio: forward FLOPs per token of the arm's optimum over the baseline's.
    """

    arm: str
    baseline: str
    budget_flops: float
    loss: float | None
    loss_interval: Range | None
    percent: float | None
    percent_interval: Range | None
    flops_ratio: float | None
    flops_ratio_interval: Range | None
    refusal: str | None


@dataclass(frozen=True)
class SeedSpread:
    """Finished runs that differ in their seed only: mean and standard deviation of their loss.

    deviation: None for a single seed.
    """

    arm: str
    budget_flops: float
    d_model: int
    params: int
    seeds: int
    loss: float
    deviation: float | None


@dataclass(frozen=True)
class NoCausalLoss:
    """Finished runs of an arm that have no causal loss: `runs` of its `finished` ones.

    as_trained: their loss as trained, by cell.
    """

    arm: str
    runs: int
    finished: int
    why: str
    as_trained: tuple[SeedSpread, ...]


@dataclass(frozen=True)
class Fits:
    """Everything that `fit_all` finds. size: which parameters are counted, see `SIZES`.

    loss: "causal" or "trained", see `under`.
    routings: the routings of the causal losses, and the arms that each was taken for.
    no_causal_loss: runs that have none. Fits of the causal loss leave them out; fits of the loss as
      trained take them.
    """

    size: str
    loss: str
    baseline: str
    arms: tuple[str, ...]
    budgets: tuple[float, ...]
    seeds_per_cell: int
    draws: int
    parabolas: tuple[Parabola, ...]
    laws: tuple[PowerLaw, ...]
    gaps: tuple[Gap, ...]
    surfaces: tuple[Surface, ...]
    repeats: tuple[SeedSpread, ...]
    diverged: tuple[str, ...]
    routings: dict[str, tuple[str, ...]]
    no_causal_loss: tuple[NoCausalLoss, ...]

    def parabola(self, arm: str, budget_flops: float, quantity: str) -> Parabola | None:
        wanted = (arm, budget_flops, quantity)
        for p in self.parabolas:
            if (p.arm, p.budget_flops, p.quantity) == wanted:
                return p
        return None


class Compared(NamedTuple):
    """records: the runs to compare, by `eval_loss`. without: finished runs without a causal loss,
    as trained; under the loss "trained" they are among the records, too.
    """

    records: list[RunRecord]
    without: list[RunRecord]


def under(records: Sequence[RunRecord], loss: str) -> Compared:
    """Returns the runs that can be compared by `loss`, with that loss as their `eval_loss`.

    "causal": the loss under routing that never looks ahead. Runs without one are left out; a
    diverged run goes with its arm. "trained": the loss as the runs were trained, of every run.
    Raises InputError where no finished run has a causal loss.
    """
    finished = [r for r in records if r.status == "finished"]
    without = [r for r in finished if causal_routing(r) is None]
    if loss == "trained":
        return Compared(list(records), without)
    dropped = {r.run_id for r in without}
    arms = {r.variant for r in finished if r.run_id not in dropped}
    gone = {r.variant for r in without} - arms
    require(
        bool(arms) or not gone,
        "--loss",
        loss,
        f"no finished run has a causal loss, in any of the arms {', '.join(sorted(gone))}; "
        "--loss=trained compares them as they were trained",
    )
    kept = (r for r in records if r.run_id not in dropped and r.variant not in gone)
    return Compared([as_compared(r, loss) for r in kept], without)


def as_compared(r: RunRecord, loss: str) -> RunRecord:
    """Returns the record with `loss` and its bits per byte as those of its evaluation.

    A causal loss that is not finite makes the run a diverged one. The standard error stays that of
    the loss as trained.
    """
    value = r.eval_loss if loss == "trained" else causal_loss(r)
    if r.status != "finished" or r.eval_loss is None or value == r.eval_loss:
        return r
    if value is None:
        status = "finished" if causal_routing(r) is None else "diverged"
        return dataclasses.replace(r, status=status, eval_loss=None, eval_bits_per_byte=None)
    bits = r.eval_bits_per_byte and r.eval_bits_per_byte * value / r.eval_loss
    return dataclasses.replace(r, eval_loss=value, eval_bits_per_byte=bits)


def quantity_of(record: RunRecord, quantity: str, size: str) -> float:
    """The abscissa of a run: its parameters (as `size` counts them) or forward FLOPs per token."""
    return (
        record.forward_flops_per_token
        if quantity == "forward_flops"
        else getattr(record, SIZES[size])
    )


def save_json(path: Path, fits: Fits) -> None:
    """Writes the fits; an unbounded end of an interval becomes null."""
    write_json(path, to_json(fits))


def to_json(fits: Any) -> Any:
    """Any result of this module as plain JSON values."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None
        return value

    return json.loads(json.dumps(plain(dataclasses.asdict(fits))))
