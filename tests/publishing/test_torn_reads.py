"""A reader that pulls while another process publishes sees one table or the other, never parts of two."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.publishing.conftest import build_table
from userrep.publishing.client import pull
from userrep.publishing.connection import RegistryError
from userrep.publishing.registry import publish

PUBLISHER = """
import sys
from pathlib import Path
from tests.publishing.conftest import build_table
from userrep.publishing.registry import publish
folder, name, uri, count = Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])
for seed in range(1, count + 1):
    build_table(folder / str(seed), num_users=6, seed=seed)
    publish(folder / str(seed), name, "champion", tracking_uri=uri, experiment="torn")
"""


@pytest.mark.parametrize("count", [20, pytest.param(1000, marks=pytest.mark.slow)])
def test_no_read_is_torn_while_versions_are_published(tmp_path, name, sqlite_uri, count):
    tables, copy = tmp_path / "tables", tmp_path / "copy"
    build_table(tables / "0", num_users=6, seed=0)
    publish(tables / "0", name, "champion", tracking_uri=sqlite_uri, experiment="torn")
    command = [sys.executable, "-c", PUBLISHER, str(tables), name, sqlite_uri, str(count)]
    publisher = subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)
    seen = []
    try:
        while True:
            is_last = publisher.poll() is not None  # asked before, so that a read follows the last publish
            try:
                pulled = pull(f"{name}@champion", copy, tracking_uri=sqlite_uri)
            except RegistryError as error:  # sqlite waits 5 s for a writer, which a busy machine may hold up
                if "locked" not in str(error):
                    raise
                continue
            seed = pulled.manifest.config["seed"]
            for path in (tables / str(seed)).iterdir():
                assert (copy / path.name).read_bytes() == path.read_bytes()
            assert len(list(copy.iterdir())) == len(list((tables / str(seed)).iterdir()))
            assert pulled.dataset().count_rows() == 6
            seen.append(seed)
            if is_last:
                break
    finally:
        publisher.kill()
        _, errors = publisher.communicate()
    assert publisher.returncode == 0, errors
    assert seen[-1] == count
    assert seen == sorted(seen)  # and no reader goes back to an older version
    assert len(set(seen)) > 1
