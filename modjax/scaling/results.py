"""What the fits return: frozen results, each with its refusal in words, and their JSON form."""

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modjax.errors import require
from modjax.records import Record, write_json
from modjax.scaling.parametric import Surface

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
class Repeat:
    """Finished runs that differ in their seed only: mean and standard deviation of their loss."""

    arm: str
    budget_flops: float
    d_model: int
    params: int
    seeds: int
    loss: float
    deviation: float


@dataclass(frozen=True)
class Fits:
    """Everything that `fit_all` finds. size: which parameters are counted, see `SIZES`.

    loss: "trained", as the runs were trained, or "causal", see `under`.
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
    repeats: tuple[Repeat, ...]
    diverged: tuple[str, ...]

    def parabola(self, arm: str, budget_flops: float, quantity: str) -> Parabola | None:
        wanted = (arm, budget_flops, quantity)
        for p in self.parabolas:
            if (p.arm, p.budget_flops, p.quantity) == wanted:
                return p
        return None


def under(records: Sequence[Record], loss: str) -> list[Record]:
    """The records with the loss that fits and figures take.

    "trained": as trained. "causal": of routed runs that under routing which never looks ahead, and
    its bits per byte; the standard error stays that of the loss as trained. A run that was scored
    so without a finite loss counts as diverged.
    Raises InputError for a routed run that was not scored so.
    """
    if loss == "trained":
        return list(records)
    without = [
        r.run_id
        for r in records
        if r.status == "finished"
        and r.causal_routing is None
        and r.causal_loss is None
        # A router may have no parameters, and a capacity of 1 skips nothing.
        and (r.flops.get("router", 0) > 0 or r.params_active < r.params_non_embedding)
    ]
    require(
        not without,
        "--loss",
        loss,
        f"{len(without)} routed runs have no causal loss, such as {without[0] if without else ''}",
    )
    return [_causal(r) for r in records]


def _causal(r: Record) -> Record:
    if r.causal_loss is None and r.causal_routing is not None and r.status == "finished":
        changes = {"status": "diverged", "eval_loss": None, "eval_bits_per_byte": None}
        return dataclasses.replace(r, **changes)
    if r.causal_loss is None or r.eval_loss is None:
        return r
    bits = r.eval_bits_per_byte and r.eval_bits_per_byte * r.causal_loss / r.eval_loss
    return dataclasses.replace(r, eval_loss=r.causal_loss, eval_bits_per_byte=bits)


def quantity_of(record: Record, quantity: str, size: str) -> float:
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
