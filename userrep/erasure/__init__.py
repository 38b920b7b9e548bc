"""Erasing users: what is the same wherever they are. Needs pyarrow only (no numpy, no torch)."""
