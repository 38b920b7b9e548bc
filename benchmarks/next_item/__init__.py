"""Rivals in next-item recommendation, tuned and ranked by one protocol: see `__main__.py`."""
