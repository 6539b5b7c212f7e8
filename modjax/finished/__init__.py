"""A finished run, opened again: to look at it in Python, to evaluate it, to sample from it."""
