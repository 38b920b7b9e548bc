"""Tests, mirroring userrep/ and pipelines/."""
