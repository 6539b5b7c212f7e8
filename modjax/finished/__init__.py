"""A finished run, opened again: to look at it in Python, to evaluate it, to sample from it."""

from modjax.finished.runs import Finished, choose, compare, load, open_run

__all__ = ["Finished", "choose", "compare", "load", "open_run"]
