"""Scaling laws: sizes, designs of sweeps and their price, and what their cells say about the next size."""
