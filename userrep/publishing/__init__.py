"""Embedding tables: write, publish, pull. Needs neither torch nor ray."""
