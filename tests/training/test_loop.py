"""Whole runs, in this process."""
