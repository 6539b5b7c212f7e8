"""The work of a worker: `check` looks at runs before they start, and `train` trains one."""

from modjax.checks.runs import check
from modjax.training.loop import train

__all__ = ["check", "train"]
