"""Finished runs, opened again: to look at them in Python, to evaluate them, to sample from them."""
