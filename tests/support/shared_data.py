"""Real data sets and numeric fixtures beside the repository, which may not be copied into it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


def shared_data(name: str) -> Path:
    """The folder of a real data set; skips the test that asks where it is absent."""
    return shared_path(f"data/{name}")


def shared_path(name: str) -> Path:
    """A file or folder beside the repository; skips the test that asks where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"{name} is not at ../shared/{name} beside the repository")
    return path
