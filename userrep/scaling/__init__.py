"""Scaling laws: sizes, designs of sweeps, and what they cost before they run."""
