"""Pulling: the published table or nothing."""

import json
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.publishing.conftest import build_table, left_in
from userrep.manifest import sha256_file
from userrep.publishing import client as client_module
from userrep.publishing.client import TableMismatchError, pull, resolve
from userrep.publishing.registry import publish
from userrep.publishing.table import lookup


def stored(uri: str, reference: str) -> Path:
    """Folder in which the registry keeps the files of a version."""
    return Path(unquote(urlsplit(resolve(reference, tracking_uri=uri).location).path))


@pytest.mark.parametrize("form", ["{}@champion", "{}@v1", "{}@V1", "{}/1"])
def test_what_was_published_is_pulled(published, table_dir, tmp_path, sqlite_uri, form):
    pulled = pull(form.format(published), tmp_path / "deep" / "copy", tracking_uri=sqlite_uri)
    assert pulled.directory == tmp_path / "deep" / "copy"
    assert left_in(pulled.directory) == left_in(table_dir)
    for path in table_dir.iterdir():
        assert (pulled.directory / path.name).read_bytes() == path.read_bytes()
    assert lookup(pulled.dataset(), ["user-3"])["user_id"].to_pylist() == ["user-3"]
    assert left_in(tmp_path / "deep") == ["copy"]


def test_a_verified_copy_is_not_downloaded_again(published, tmp_path, sqlite_uri, monkeypatch):
    first = pull(f"{published}@champion", tmp_path / "copy", tracking_uri=sqlite_uri)
    with monkeypatch.context() as patch:
        patch.setattr(client_module, "download", lambda *arguments: pytest.fail("downloaded"))
        assert pull(f"{published}/1", tmp_path / "copy", tracking_uri=sqlite_uri).manifest == first.manifest
    (tmp_path / "copy" / "part-00001.parquet").write_bytes(b"damaged")
    assert pull(f"{published}/1", tmp_path / "copy", tracking_uri=sqlite_uri).dataset().count_rows() == 40


def test_a_newer_version_replaces_the_copy(published, tmp_path, sqlite_uri):
    pull(f"{published}@champion", tmp_path / "copy", tracking_uri=sqlite_uri)
    rows = build_table(tmp_path / "new", num_users=7, seed=1)
    publish(tmp_path / "new", published, "champion", tracking_uri=sqlite_uri, experiment="tables")
    copy = pull(f"{published}@champion", tmp_path / "copy", tracking_uri=sqlite_uri)
    assert copy.dataset().to_table().sort_by("user_id").equals(rows)
    assert copy.version.version == 2


@pytest.mark.parametrize("content", ["foreign", "stray", "file"])
def test_a_pull_deletes_nothing_that_it_did_not_write(published, tmp_path, sqlite_uri, content):
    to = tmp_path / "mine"
    if content == "file":
        to.write_text("mine")
    elif content == "foreign":
        to.mkdir()
        (to / "thesis.tex").write_text("mine")
    else:
        pull(f"{published}@champion", to, tracking_uri=sqlite_uri)
        (to / "thesis.tex").write_text("mine")
    before = left_in(to) if to.is_dir() else to.read_text()
    with pytest.raises(TableMismatchError, match="pull to another directory"):
        pull(f"{published}@champion", to, tracking_uri=sqlite_uri)
    assert before == (left_in(to) if to.is_dir() else to.read_text())


def flip_a_bit(files: Path) -> None:
    content = bytearray((files / "part-00001.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (files / "part-00001.parquet").write_bytes(content)


def truncate_a_part(files: Path) -> None:
    content = (files / "part-00001.parquet").read_bytes()
    (files / "part-00001.parquet").write_bytes(content[:-10])


def edit_manifest(folder: Path, **changes) -> None:
    values = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**values, **changes}))


def name_a_path_outside(files: Path) -> None:
    values = json.loads((files / "manifest.json").read_text())["files"]
    edit_manifest(files, files=[{**values[0], "path": "../x"}, *values])
    shutil.copy(files / "part-00001.parquet", files.parent / "x")


def swap_the_manifest(files: Path) -> None:
    build_table(files.parent / "other", seed=9)
    shutil.copy(files.parent / "other" / "manifest.json", files / "manifest.json")


def swap_the_table(files: Path) -> None:
    build_table(files.parent / "other", seed=9)
    for path in (files.parent / "other").iterdir():
        shutil.copy(path, files / path.name)


DAMAGE = [
    (flip_a_bit, "part-00001.parquet has sha256"),
    (truncate_a_part, "part-00001.parquet has .* bytes"),
    (lambda files: (files / "part-00001.parquet").unlink(), "part-00001.parquet is missing"),
    (lambda files: (files / "manifest.json").unlink(), "manifest.json is missing"),
    (name_a_path_outside, "its manifest has sha256"),
    (swap_the_manifest, "its manifest has sha256"),
    (swap_the_table, "its manifest has sha256"),
]
# Whoever can also set the version's tags is stopped by the content: paths, then the rows' own identity.
FORGED = [
    (name_a_path_outside, "'../x', which lies outside"),
    (swap_the_manifest, "its manifest is of table"),
    (swap_the_table, "its manifest is of table"),
    (lambda files: edit_manifest(files, schema_version=99), "schema version 99"),
    (lambda files: edit_manifest(files, table="shards"), "kind 'shards'"),
]


@pytest.mark.parametrize(
    ("damage", "message", "forge_tag"), [(*case, False) for case in DAMAGE] + [(*case, True) for case in FORGED]
)
@pytest.mark.parametrize("has_copy", [False, True], ids=["new", "over-a-copy"])
def test_a_damaged_table_is_refused_and_leaves_nothing(
    published, tmp_path, sqlite_uri, fresh_client, damage, message, forge_tag, has_copy
):
    folder = tmp_path / "folder"
    folder.mkdir()
    if has_copy:
        build_table(folder / "copy", num_users=3, seed=5)
    files = stored(sqlite_uri, f"{published}@champion")
    damage(files)
    if forge_tag:
        fresh_client.set_model_version_tag(published, "1", "manifest_sha256", sha256_file(files / "manifest.json"))
    before = {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    with pytest.raises(TableMismatchError, match=message):
        pull(f"{published}@champion", folder / "copy", tracking_uri=sqlite_uri)
    assert {path: path.read_bytes() for path in folder.rglob("*.*") if path.is_file()} == before
    assert left_in(folder) == (["copy"] if has_copy else [])
