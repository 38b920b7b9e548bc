"""Real data sets beside the repository, which may not be copied into it."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED_DATA = ROOT.parent / "shared" / "data"


def shared_data(name: str) -> Path:
    """The folder of a real data set; skips the test that asks where it is absent."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"real data set {name} is not at ../shared/data/{name} beside the repository")
    return folder
