"""Memory and estimated time of all runs of a plan on a topology."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from modjax.aot.compile import compile_step, mesh_for
from modjax.aot.report import report_on
from modjax.specs import Execution, RunSpec, TrainConfig
from modjax.training.fitting import DoesNotFit
from modjax.training.optimizer import Schedule


class Fit(NamedTuple):
    """A train step on a topology.

    memory: bytes per chip; of temporaries alone if the step does not compile for lack of memory,
      and None if no mesh and remat was found.
    step_seconds: the compiler's estimate; None if the step does not compile.
    """

    fits: bool
    memory: int | None
    step_seconds: float | None


def fits_of(
    specs: Sequence[RunSpec],
    execution: Execution,
    topology: str,
    slices: int,
    say: Callable[[str], None],
) -> dict[str, Fit]:
    """Returns the train step of each run, by run id. Runs that share a program compile it once.

    say: receives a line before each compilation.
    Raises InputError for a run that does not suit the mesh, before anything compiles.
    """
    programs: dict[Any, list[RunSpec]] = {}
    for spec in specs:
        programs.setdefault((spec.model, _compiled_in(spec.train)), []).append(spec)
    for spec, *_ in programs.values():
        mesh_for(spec, execution, topology, slices)
    found = {}
    for number, (spec, *others) in enumerate(programs.values()):
        say(f"compiling {number + 1} of {len(programs)}: {spec.run_id} for {topology} ...")
        fit = _fit(spec, execution, topology, slices)
        found |= dict.fromkeys([one.run_id for one in (spec, *others)], fit)
    return found


def _compiled_in(train: TrainConfig) -> TrainConfig:
    """Returns a configuration that is equal for all runs that share a compiled train step."""
    given = dict.fromkeys(Schedule._fields, 0) | {"steps": 1, "learning_rate": 1.0}
    return dataclasses.replace(train, eval_sequences=1, eval_every=0, **given)


def _fit(spec: RunSpec, execution: Execution, topology: str, slices: int) -> Fit:
    try:
        report = report_on(compile_step(spec, execution, topology, slices))
    except DoesNotFit as error:
        return Fit(False, error.needed, None)
    return Fit(report.memory.fits, report.memory.total, report.seconds)
