"""Finished runs, opened again: in Python, to evaluate, to sample from and to export them."""
