"""Wall time of a run, by activity and per step."""

import statistics
import time


class Clock:
    """Seconds by activity, over all restarts. All but `data_wait`, a part of `train`, add up."""

    def __init__(self):
        names = ("setup", "compile", "train", "eval", "checkpoint", "data_wait")
        self.seconds: dict[str, float] = dict.fromkeys(names, 0.0)
        self._mark = time.perf_counter()

    def lap(self, name: str) -> None:
        """Counts the time since the last lap towards `name`."""
        now = time.perf_counter()
        self.seconds[name] += now - self._mark
        self._mark = now


class Pace:
    """Seconds per step between logged steps that nothing interrupted."""

    def __init__(self, step: int):
        self._per_step: list[float] = []
        self.restart(step)

    def restart(self, step: int) -> None:
        self._step, self._mark = step, time.perf_counter()

    def reached(self, step: int) -> None:
        now = time.perf_counter()
        self._per_step.append((now - self._mark) / (step - self._step))
        self._step, self._mark = step, now

    def median(self) -> float:
        return statistics.median(self._per_step) if self._per_step else 0.0
