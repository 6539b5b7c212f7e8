"""Counts what the reliability tests did, and prints it at their end."""

from collections import Counter
from pathlib import Path

import pytest

from tests.reliability.small import arguments, finish

_COUNTS: Counter[str] = Counter()


@pytest.fixture
def count():
    """Returns count(what, n), which adds n to a counter."""

    def count(what: str, n: int = 1) -> None:
        _COUNTS[what] += n

    return count


def pytest_terminal_summary(terminalreporter):
    for what, n in sorted(_COUNTS.items()):
        terminalreporter.write_line(f"reliability: {n} {what}")


@pytest.fixture
def sweep(modjax, data_dir):
    """Starts the sweep in a folder."""
    return lambda workdir, *more, **env: modjax(*arguments(workdir, data_dir, *more), **env)


@pytest.fixture
def undisturbed(sweep, tmp_path_factory) -> Path:
    """The folder of the same sweep, never disturbed; made once."""
    folder = tmp_path_factory.getbasetemp() / "undisturbed"
    if not (folder / "plan.json").exists():
        finish(sweep(folder))
    return folder
