"""Scaling sweeps: what a sweep consists of, and what its cells say about the next size."""
