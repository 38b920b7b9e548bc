"""Tables in an S3 bucket: old or new, whole and verified, whatever is interrupted and whoever reads."""

import shutil
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support.object_store import SECRET
from userrep import objects, storage, table_versions
from userrep.config import ConfigError
from userrep.manifest import IncompleteTableError, Manifest, describe_file, write_manifest
from userrep.mirror import locate, object_name, shown

NAMES = ("a.bin", "deep/b.bin", "c.bin")


def fill(directory: Path, content: str) -> None:
    """A committed table of three files."""
    for name in NAMES:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(f"{content} of {name}")
    files = tuple(describe_file(directory, directory / name) for name in NAMES)
    write_manifest(directory, Manifest(table="test", stage="test", config={"content": content}, files=files))


def write_table(table: Path, content: str) -> None:
    with table_versions.staged_table(table) as staging:
        fill(staging, content)


def read_table(table: Path) -> set[str]:
    version = table_versions.open_table(table)
    content = storage.manifest_of(version).config["content"]
    return {content} | {(version / name).read_text().removesuffix(f" of {name}") for name in NAMES}


def forget(uri: str) -> None:
    """What another node knows: nothing."""
    shutil.rmtree(locate(uri), ignore_errors=True)
    storage._refreshed.clear()


@pytest.fixture
def table(bucket: str) -> Path:
    path = locate(f"{bucket}/jobs/table")
    write_table(path, "old")
    return path


def objects_of(table: Path) -> set[str]:
    name = object_name(table)
    assert name is not None
    return set(objects.list_objects(name))


def test_a_path_is_what_it_was_and_a_uri_is_a_mirror_that_says_it(tmp_path: Path) -> None:
    assert locate(tmp_path) == tmp_path
    assert object_name(tmp_path) is None
    for text in ("s3://bucket/a/b", Path("s3://bucket/a/b")):
        assert object_name(locate(text)) == "bucket/a/b"
        assert shown(locate(text) / "c") == "s3://bucket/a/b/c"


@pytest.mark.parametrize("uri", ["gs://bucket/a", "s3://key:hidden@bucket/a", "s3:///a", "s3://bucket/../x"])
def test_what_is_no_place_in_a_bucket_is_refused_and_not_repeated(uri: str) -> None:
    with pytest.raises(ConfigError) as refused:
        locate(uri)
    assert "hidden" not in str(refused.value)


def test_a_local_table_is_staged_as_ever(tmp_path: Path) -> None:
    write_table(tmp_path / "table", "old")
    write_table(tmp_path / "table", "new")
    assert read_table(tmp_path / "table") == {"new"}
    assert [path.name for path in tmp_path.iterdir()] == ["table"]
    assert storage.fetch(tmp_path / "table") == table_versions.open_table(tmp_path / "table") == tmp_path / "table"


def test_another_node_reads_what_was_committed(table: Path, bucket: str) -> None:
    forget(bucket)
    assert read_table(table) == {"old"}
    write_table(table, "new")
    assert read_table(table) == {"new"}
    assert len(objects_of(table)) == len(NAMES) + 2, "the old version is gone: files, manifest, pointer"


@pytest.mark.parametrize("num_done", range(5))
def test_an_interrupted_commit_leaves_the_old_table(
    table: Path, bucket: str, num_done: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [num_done]
    with monkeypatch.context() as patch:

        def dying(write: object) -> object:
            def call(*arguments: object) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise KeyboardInterrupt
                write(*arguments)  # type: ignore[operator]

            return call

        for name in ("upload", "write_object"):
            patch.setattr(objects, name, dying(getattr(objects, name)))
        with pytest.raises(KeyboardInterrupt):
            write_table(table, "new")
    assert read_table(table) == {"old"}
    forget(bucket)
    assert read_table(table) == {"old"}
    write_table(table, "new")
    assert read_table(table) == {"new"}
    assert len(objects_of(table)) == len(NAMES) + 2, "nothing of the interrupted attempt is left"


def test_concurrent_fetches_of_a_node_make_one_copy(table: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(bucket)
    fetched = list[str]()
    download = objects.download
    monkeypatch.setattr(objects, "download", lambda name, path: (fetched.append(path.name), download(name, path)))
    with ThreadPoolExecutor(6) as pool:  # the lock is of an open file, so threads are as far apart as processes
        assert list(pool.map(read_table, [table] * 6)) == [{"old"}] * 6
    assert sorted(fetched) == ["a.bin", "b.bin", "c.bin", "manifest.json"]


def test_a_table_that_is_replaced_while_it_is_read_is_old_or_new(table: Path, bucket: str) -> None:
    seen: list[set[str]] = []
    stop = threading.Event()

    def write() -> None:
        for number in range(12):
            write_table(table, str(number))
        stop.set()

    writer = threading.Thread(target=write)
    writer.start()
    reader = locate(f"{bucket}/jobs/table")
    while not stop.is_set():
        version = table_versions.current(reader)
        try:
            seen.append({storage.manifest_of(version).config["content"]})
        except IncompleteTableError:
            assert table_versions.current(reader) != version, "only a version that was superseded may be gone"
    writer.join()
    assert all(len(content) == 1 for content in seen)
    assert read_table(table) == {"11"}


def test_an_interrupted_fetch_goes_on(table: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    forget(bucket)
    fetched = list[str]()
    download = objects.download

    def recording(name: str, path: Path) -> None:
        fetched.append(path.name)
        if len(fetched) == 2:
            raise objects.ObjectStoreError("no answer")
        download(name, path)

    monkeypatch.setattr(objects, "download", recording)
    monkeypatch.setattr(objects, "TRANSFERS_AT_ONCE", 1)
    with pytest.raises(objects.ObjectStoreError):
        table_versions.open_table(table)
    assert read_table(table) == {"old"}
    assert fetched.count("a.bin") == 1, "what was there already is not fetched again"


def test_damage_and_loss_are_named(table: Path, bucket: str) -> None:
    version = table_versions.current(table)
    name = object_name(version)
    objects.write_object(f"{name}/c.bin", b"old of C.bin")
    forget(bucket)
    with pytest.raises(IncompleteTableError, match=r"s3://.*/c\.bin differs from the checksum"):
        table_versions.open_table(table)
    objects.delete_objects([f"{name}/c.bin"])
    with pytest.raises(IncompleteTableError, match=r"no object s3://.*/c\.bin.*build the table again"):
        table_versions.open_table(table)
    objects.write_object(f"{name}/manifest.json", b"{")
    with pytest.raises(IncompleteTableError, match="is damaged"):
        table_versions.open_table(table)
    objects.write_object(f"{object_name(table)}/CURRENT", b"../../other")
    with pytest.raises(IncompleteTableError, match="CURRENT is damaged"):
        table_versions.open_table(table)


def test_a_damaged_copy_is_fetched_again(table: Path, bucket: str) -> None:
    forget(bucket)
    version = table_versions.open_table(table)
    (version / "a.bin").write_text("xxx of a.bin")
    (version / "manifest.json").unlink()
    assert read_table(table) == {"old"}


def test_tasks_of_several_nodes_fill_a_version_together(table: Path) -> None:
    with table_versions.staged_table(table) as staging:
        fill(staging, "new")
        (staging / "manifest.json").unlink()
        storage.send(staging, "*.bin", "deep/*")
        for name in NAMES:
            (staging / name).unlink()  # this node has not written them
        storage.receive(staging, "*")
        fill(staging, "new")
    assert read_table(table) == {"new"}


def test_old_copies_are_forgotten(table: Path, bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    version = table_versions.open_table(table)
    kept = version.with_name("version-1")
    shutil.copytree(version, kept)
    table_versions.open_table(table)
    assert kept.exists()
    monkeypatch.setattr(table_versions, "UNUSED_S", -1)
    table_versions.open_table(table)
    assert not kept.exists()
    assert version.exists()


def test_small_files_and_directories(bucket: str) -> None:
    directory = locate(f"{bucket}/run")
    directory.mkdir(parents=True)
    (directory / "state.json").write_text("1")
    storage.send(directory, "state.json", "absent.json")
    objects.write_object(f"{object_name(directory)}/state.json", b"2")
    storage.refresh(directory / "state.json", max_age_s=60)
    assert (directory / "state.json").read_text() == "2"
    objects.write_object(f"{object_name(directory)}/state.json", b"3")
    storage.refresh(directory / "state.json", max_age_s=60)
    assert (directory / "state.json").read_text() == "2"
    storage.refresh(directory / "state.json")
    assert (directory / "state.json").read_text() == "3"
    storage.remove(directory / "state.json")
    storage.refresh(directory / "state.json")
    assert not (directory / "state.json").exists()
    for step in ("step-1", "step-2"):
        (directory / step / "deep").mkdir(parents=True)
        fill(directory / step, step)
        storage.push(directory / step)
    objects.delete_objects([f"{object_name(directory)}/step-1/manifest.json"])
    forget(bucket)
    assert storage.directories(directory, "step-*") == {directory / "step-1": False, directory / "step-2": True}
    storage.rename(directory / "step-2", directory / "damaged")
    storage.remove(directory / "step-1")
    assert storage.directories(directory, "*") == {directory / "damaged": True}
    storage.check(directory)
    assert objects_of(directory) == {f"damaged/{name}" for name in (*NAMES, "manifest.json")}


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("content-length", 0)))
        body = b"<Error><Code>AccessDenied</Code><Message>Access Denied</Message></Error>"
        self.send_response(403)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def __getattr__(self, name: str) -> object:
        if name.startswith("do_"):
            return self.do_GET
        raise AttributeError(name)

    def log_message(self, format: str, *_: object) -> None:
        pass


def problem_at(endpoint: str, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What every operation says where the endpoint is no use."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    objects.filesystem.cache_clear()
    messages = []
    for operation in (storage.check, table_versions.current, storage.manifest_of, storage.fetch):
        with pytest.raises(objects.ObjectStoreError) as failed:
            operation(path)
        messages.append(str(failed.value))
    objects.filesystem.cache_clear()
    return messages


def test_an_endpoint_that_is_no_use_is_named_within_seconds(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = locate(f"{bucket}/jobs")
    with ThreadingHTTPServer(("127.0.0.1", 0), _Refusing) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        refused = problem_at(f"http://127.0.0.1:{server.server_port}", path, monkeypatch)
        server.shutdown()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        silent = problem_at(f"http://user:hidden@127.0.0.1:{closed.getsockname()[1]}", path, monkeypatch)
    for message in refused:
        assert "refused access: check AWS_ACCESS_KEY_ID" in message
    for message in silent:
        assert "no answer from" in message
        assert "hidden" not in message
    assert SECRET not in "".join(refused + silent)


def test_a_bucket_that_is_missing_is_named() -> None:
    with pytest.raises(objects.ObjectStoreError, match="there is no bucket no-such-bucket"):
        storage.check(locate("s3://no-such-bucket/jobs"))
