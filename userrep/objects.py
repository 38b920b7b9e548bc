"""Objects of S3 buckets: list, get, put, delete; within seconds, or with an error that says what to do.

Endpoint, region and credentials come from the standard AWS variables of the process (or its instance profile), and are
held by no path, message, pickle or config. An object is named by `bucket/key`.
"""

import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from uuid import uuid4

import pyarrow.fs as pafs

CHUNK_BYTES = 8 << 20
TRANSFERS_AT_ONCE = 8
CONNECT_TIMEOUT_S, STALL_TIMEOUT_S, ATTEMPTS = 3, 5, 2  # the second: without a byte; together below `timeout_s`


class ObjectStoreError(OSError, ValueError):
    """The store was not reached, or refused. An OSError, so that what is patient with storage is patient with it."""


@cache
def filesystem(bucket: str) -> pafs.S3FileSystem:
    """The client for a bucket; one for each process."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    if region is None and endpoint is None:
        with _translated(bucket):
            region = pafs.resolve_s3_region(bucket)
    return pafs.S3FileSystem(
        endpoint_override=endpoint,
        region=region or "us-east-1",
        connect_timeout=CONNECT_TIMEOUT_S,
        request_timeout=STALL_TIMEOUT_S,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=ATTEMPTS),
        allow_delayed_open=True,  # a small object is one PUT
    )


def list_objects(prefix: str) -> dict[str, pafs.FileInfo]:
    """All objects below `bucket/prefix`, by their name relative to it. A bucket that is missing is an empty one."""
    with _translated(prefix):
        found = _client(prefix).get_file_info(pafs.FileSelector(prefix, recursive=True, allow_not_found=True))
    return {info.path[len(prefix) + 1 :]: info for info in found if info.is_file}


def read_object(name: str) -> bytes:
    """Content of a small object.

    Raises:
        FileNotFoundError: there is none.
    """
    with _translated(name), _client(name).open_input_stream(name) as stream:
        return stream.read()


def write_object(name: str, content: bytes) -> None:
    """Makes an object in one step."""
    with _translated(name), _client(name).open_output_stream(name) as stream:
        stream.write(content)


def download(name: str, path: Path) -> None:
    """Copies an object to a file, which appears whole.

    Raises:
        FileNotFoundError: there is no such object.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.tmp")
    try:
        with _translated(name), _client(name).open_input_stream(name) as source, temporary.open("wb") as target:
            while chunk := source.read(CHUNK_BYTES):
                target.write(chunk)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def upload(path: Path, name: str) -> None:
    """Copies a file to an object. A reader sees the old object or the complete new one."""
    with path.open("rb") as source, _translated(name), _client(name).open_output_stream(name) as target:
        while chunk := source.read(CHUNK_BYTES):
            target.write(chunk)


def copy_object(name: str, target: str) -> None:
    """Copies within the store."""
    with _translated(name):
        _client(name).copy_file(name, target)


def delete_objects(names: Iterable[str]) -> None:
    """Deletes objects; those that are gone already are no error."""

    def delete(name: str) -> None:
        with suppress(FileNotFoundError), _translated(name):
            _client(name).delete_file(name)

    _in_parallel([(delete, name) for name in names])


def delete_prefix(prefix: str) -> None:
    """Deletes all objects below `bucket/prefix`, a thousand with each request."""
    with suppress(FileNotFoundError), _translated(prefix):
        _client(prefix).delete_dir(prefix)


def download_all(pairs: Iterable[tuple[str, Path]]) -> None:
    """Several `download`s at once."""
    _in_parallel([(download, *pair) for pair in pairs])


def upload_all(pairs: Iterable[tuple[Path, str]]) -> None:
    """Several `upload`s at once."""
    _in_parallel([(upload, *pair) for pair in pairs])


def _in_parallel(calls: list[tuple]) -> None:
    with ThreadPoolExecutor(TRANSFERS_AT_ONCE) as pool:
        futures = [pool.submit(*call) for call in calls]
        try:
            for future in futures:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)  # not the rest, each of which would run into the same limit
            raise


def _client(name: str) -> pafs.S3FileSystem:
    return filesystem(name.partition("/")[0])


@contextmanager
def _translated(name: str) -> Iterator[None]:
    """Makes an error of the client one that says what to do; it holds no credentials, and its text is kept short."""
    try:
        yield
    except ObjectStoreError:
        raise
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no object s3://{name}") from error
    except OSError as error:
        text = str(error)
        if error.errno is not None and "AWS Error" not in text:
            raise  # of the local disk
        raise ObjectStoreError(f"s3://{name}: {_advice(text, name)} ({_first_line(text)})") from error


def _advice(text: str, name: str) -> str:
    bucket = name.partition("/")[0]
    if re.search(r"NETWORK_CONNECTION|curlCode|resolve", text):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS"
        return f"no answer from {_without_credentials(endpoint)}: check AWS_ENDPOINT_URL, AWS_REGION and the network"
    if "NO_SUCH_BUCKET" in text:
        return f"there is no bucket {bucket}: make it, or check the URI and AWS_ENDPOINT_URL"
    if re.search(
        r"ACCESS_DENIED|INVALID_ACCESS_KEY|SIGNATURE|UNAUTHORIZED|MISSING_AUTH|EXPIRED|HTTP (response code )?40[13]",
        text,
    ):
        return (
            f"bucket {bucket} refused access: check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or the role) on every "
            "node, and that it may list, read, write and delete there"
        )
    return "the object store failed; the same command goes on when it answers"


def _first_line(text: str) -> str:
    return (re.sub(r"\(Request ID.*", "", text).splitlines() or [""])[0].strip()[:300]


def _without_credentials(endpoint: str) -> str:
    return re.sub(r"//[^/@]*@", "//", endpoint)
