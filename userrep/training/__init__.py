"""One training loop for many objectives."""
