"""One MLflow client per call: explicit URIs, bounded waiting, no output, errors in the user's words.

Only `MlflowClient` is used; MLflow's global tracking URI is neither read nor set.

What works where (measured with mlflow-skinny 3.17.2, pyarrow 25.0.1; no numpy, pandas, torch, ray, sqlalchemy):

- `http://` server with proxied artifacts (MLflow's default): list, resolve, pull and publish.
- `sqlite:///`: nothing; mlflow-skinny registers no database store (`UnsupportedModelRegistryStoreURIException`). Adding
  sqlalchemy and alembic is enough to pull; pandas and numpy are still not needed.

Traps that this file answers:

- A call to a dead server blocks for 246 s by default (7 retries, 120 s timeout). Limits are environment variables of
  MLflow, read at each request, so they are set for the duration of a call; a value that the user has set stays.
- A relative `sqlite:///x.db` means another database in every working directory, and a wrong path creates an empty one.
- A database whose making is interrupted, or done twice at once, can never be opened: it is made aside.
- `set_terminated` prints a link to stdout; stores log to stderr; downloads draw progress bars.
"""

import importlib.util
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

import requests
from google.protobuf.json_format import ParseError
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

DATABASE_SCHEMES = ("sqlite", "postgresql", "mysql", "mssql")
UNREADABLE = ("builtins", "json.decoder", ParseError.__module__)  # modules of what MLflow raises on a malformed answer
TABLE_TAG = "userrep.table"  # on a registered model: its versions are tables of this kind


class RegistryError(ValueError):
    """A request that the MLflow server or database did not fulfil. The message says what to do."""


class UnreachableRegistryError(RegistryError):
    """Nothing answered at the tracking URI in time, or this install cannot speak to it."""


class UnknownTableError(RegistryError):
    """No published table has this name."""


class UnknownVersionError(RegistryError):
    """The table exists, but not this alias or version."""


@dataclass(frozen=True)
class Limits:
    """How long one HTTP request may take: `timeout_s` seconds of silence, tried 1 + `retries` times."""

    timeout_s: int
    retries: int


READ_LIMITS = Limits(timeout_s=10, retries=1)  # a dead server is reported within 20 s, a refused connection at once
# MLflow repeats also a POST that timed out; had the server done it, there would be a second version. Rerun instead.
WRITE_LIMITS = Limits(timeout_s=60, retries=0)
TRANSFER_LIMITS = Limits(timeout_s=60, retries=3)  # a proxying server answers an upload only after it has stored it


@contextmanager
def connect(
    tracking_uri: str, *, limits: Limits = READ_LIMITS, create: bool = False, verbose: bool = False
) -> Iterator[MlflowClient]:
    """Gives a client for one exchange and translates what MLflow raises inside the block.

    Not for two threads at once: limits and log levels are set process-wide while the block runs. Blocks do not nest.

    Args:
        tracking_uri: `http(s)://...` or a database URI; a sqlite path must be absolute.
        limits: bounds on each HTTP request.
        create: whether a sqlite database that does not exist is created.
        verbose: let MLflow log and print.

    Raises:
        UnreachableRegistryError: nothing answers there, or this install cannot speak to it.
        RegistryError: the URI is not usable, or MLflow refused a request.
    """
    check_uri(tracking_uri, create=create)
    variables = {
        "MLFLOW_HTTP_REQUEST_TIMEOUT": str(limits.timeout_s),
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": str(limits.retries),
    }
    if not verbose:
        variables |= {"MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
    with _environment(variables), _log_level(logging.NOTSET if verbose else logging.WARNING):
        try:
            if create and urlsplit(tracking_uri).scheme.startswith("sqlite"):
                _create_sqlite(tracking_uri)
            yield MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)
        except MlflowException as error:
            raise _translated(error, tracking_uri) from error
        except requests.exceptions.RequestException as error:  # a file that stops halfway
            raise _unreachable(error, tracking_uri) from error
        # SystemError: protobuf's, of a key that is no Unicode.
        except (ParseError, RecursionError, SystemError, ValueError) as error:
            if type(error).__module__ not in UNREADABLE:
                raise
            problem = f"{type(error).__name__}: {str(error)[:200]}"
            raise RegistryError(
                f"the answer of MLflow at {redacted(tracking_uri)} cannot be read ({problem}): is it an MLflow server?"
            ) from error


def check_uri(tracking_uri: str, *, create: bool = False) -> None:
    """Refuses tracking URIs that cannot work or that would silently mean something else.

    Raises:
        RegistryError: says what is wrong and which form to use.
    """
    shown, scheme = redacted(tracking_uri), urlsplit(tracking_uri).scheme
    if scheme in ("http", "https", "databricks"):
        return
    if not is_database(tracking_uri):
        raise RegistryError(
            f"tracking URI {shown!r} is not supported: use http(s)://HOST:PORT or sqlite:////ABSOLUTE/PATH.db"
        )
    if importlib.util.find_spec("sqlalchemy") is None or importlib.util.find_spec("alembic") is None:
        raise UnreachableRegistryError(
            f"tracking URI {shown!r} is a database, which this bare install cannot open: use the http:// address of an "
            "MLflow server, or install `userrep[train]` (or `pip install sqlalchemy alembic`)"
        )
    if scheme.startswith("sqlite"):
        path = _sqlite_path(tracking_uri)
        if not path.is_absolute():
            raise RegistryError(
                f"tracking URI {shown!r} depends on the working directory: use {'sqlite:///' + str(path.absolute())!r}"
            )
        wanted, what = (path.parent, "directory") if create else (path, "database")
        if not wanted.exists():
            raise UnreachableRegistryError(f"there is no {what} {wanted}: check the tracking URI")


def is_database(tracking_uri: str) -> bool:
    """Whether the URI names a database that this process opens itself, as opposed to a server."""
    return urlsplit(tracking_uri).scheme.partition("+")[0] in DATABASE_SCHEMES


def redacted(uri: str) -> str:
    """The URI without user and password, for messages and records."""
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2])) if "@" in parts.netloc else uri


def _sqlite_path(tracking_uri: str) -> Path:
    return Path(unquote(tracking_uri.partition("///")[2].partition("?")[0]))


def _create_sqlite(tracking_uri: str) -> None:
    """Makes a database that is missing, in one step.

    MLflow takes seconds to make its tables. Killed meanwhile, or done by two processes at once, that leaves a file that
    no MLflow opens any more (3.17.2: `table _alembic_tmp_experiments already exists`).
    """
    path = _sqlite_path(tracking_uri)
    if path.exists():
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a killed process that had the same id
    address, mark, options = tracking_uri.partition("?")
    MlflowClient(f"{address.rpartition('/')[0]}/{temporary.name}{mark}{options}")
    with suppress(FileExistsError):  # another process was faster
        os.link(temporary, path)
    temporary.unlink()


def _translated(error: MlflowException, tracking_uri: str) -> RegistryError:
    shown, text = redacted(tracking_uri), str(error)
    # MLflow raises outside of any `from`, so the network failure is the context, not the cause.
    if isinstance(error.__context__, requests.exceptions.RequestException):
        return _unreachable(error.__context__, tracking_uri)
    if re.search(r"error code 40[13]\b|PERMISSION_DENIED|UNAUTHENTICATED", text):
        return RegistryError(
            f"the MLflow server {shown} refused access: check MLFLOW_TRACKING_USERNAME, MLFLOW_TRACKING_PASSWORD (or "
            f"MLFLOW_TRACKING_TOKEN), and that the server's --allowed-hosts holds this address ({text[:200]})"
        )
    return RegistryError(f"MLflow at {shown} refused the request: {text[:600]}")


def _unreachable(error: BaseException, tracking_uri: str) -> UnreachableRegistryError:
    return UnreachableRegistryError(
        f"no answer from the MLflow server {redacted(tracking_uri)} ({type(error).__name__}): check that it runs there"
    )


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    ours = [key for key in variables if key not in os.environ]
    os.environ.update({key: variables[key] for key in ours})
    try:
        yield
    finally:
        for key in ours:
            os.environ.pop(key, None)


@contextmanager
def _log_level(level: int) -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("mlflow", "alembic")] if level else []
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, old in zip(loggers, before, strict=True):
            logger.setLevel(old)
