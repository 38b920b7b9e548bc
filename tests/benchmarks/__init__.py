"""Tests of the benchmarks: rivals compute the same, and what is measured is what happened."""
