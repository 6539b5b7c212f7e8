"""Wall time of a run, by activity and per step."""

import statistics
import time


class Clock:
    """Stopwatch of a run: seconds by activity over all restarts, and seconds per step.

    The activities add up to the wall time, except `data_wait`, which is a part of `train`.
    """

    def __init__(self):
        names = ("setup", "compile", "train", "eval", "checkpoint", "data_wait")
        self.seconds: dict[str, float] = dict.fromkeys(names, 0.0)
        self._per_step: list[float] = []
        self._lap = time.perf_counter()

    def lap(self, name: str, step: int | None = None) -> None:
        """Adds the time since the last lap to the activity `name`.

        step: the time per step is then measured anew, from the end of this step.
        """
        now = time.perf_counter()
        self.seconds[name] += now - self._lap
        self._lap = now
        if step is not None:
            self._step, self._reached = step, now

    def reached(self, step: int) -> None:
        """Records the seconds per step since the last measured step. `step` has just ended."""
        now = time.perf_counter()
        self._per_step.append((now - self._reached) / (step - self._step))
        self._step, self._reached = step, now

    def median_step(self) -> float:
        """Returns the median of the measured seconds per step, or 0."""
        return statistics.median(self._per_step) if self._per_step else 0.0
