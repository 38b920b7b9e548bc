"""Who is spoken to, with which token, and what the errors say: never the token."""

import os
from pathlib import Path

import aiohttp
import pytest
import requests
from ray.exceptions import AuthenticationError

from pipelines.console import Console
from pipelines.job_server import check_address, check_transport, connect, explained, is_loopback, read_token
from tests.pipelines.job_client import ADDRESS, FakeClient, server_of
from userrep.config import ConfigError

SECRET = "s3cret-of-the-cluster"


def token_file(directory: Path, mode: int = 0o600, text: str = SECRET + "\n") -> Path:
    path = directory / ".ray" / "auth_token"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_token_is_found_where_ray_finds_it(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    assert read_token(home) is None
    path = token_file(tmp_path, text="of-home")
    other = tmp_path / "other"
    other.write_text("of-path\n")
    other.chmod(0o400)
    for environment, value in (
        (home, "of-home"),
        (home | {"RAY_AUTH_TOKEN_PATH": str(other)}, "of-path"),
        (home | {"RAY_AUTH_TOKEN_PATH": str(other), "RAY_AUTH_TOKEN": "of-env"}, "of-env"),
    ):
        token = read_token(environment)
        assert token is not None
        assert token.value == value
        assert value not in repr(token)
    assert read_token(home | {"RAY_AUTH_MODE": "disabled"}) is None
    assert path.is_file()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_token_that_others_can_read_is_refused(mode: int, tmp_path: Path) -> None:
    path = token_file(tmp_path, mode)
    with pytest.raises(ConfigError, match=f"chmod 600 {path}") as refused:
        read_token({"HOME": str(tmp_path)})
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize("text", ["", " \n", "two words s3", "s3\nx-header: y", "s3\u00e9"])
def test_what_is_no_token_is_refused_unseen(text: str, tmp_path: Path) -> None:
    path = token_file(tmp_path, text=text)
    with pytest.raises(ConfigError, match="no token") as refused:
        read_token({"RAY_AUTH_TOKEN_PATH": str(path)})
    assert "s3" not in str(refused.value).replace(str(tmp_path), "")


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        read_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none"), "HOME": str(tmp_path)})


@pytest.mark.parametrize(
    "address",
    ["10.0.0.1:6379", "ray://head:10001", "localhost:8265", "http://", "http://h:x", "http://[::1", "http://h?a=1", ""],
)
def test_what_is_no_job_server_is_refused(address: str) -> None:
    with pytest.raises(ConfigError, match="is not the URL of a job server"):
        check_address(address)


def test_credentials_in_an_address_are_refused_unseen() -> None:
    with pytest.raises(ConfigError, match="holds credentials") as refused:
        check_address(f"https://user:{SECRET}@head")
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("http://127.0.0.1:8265", True),
        ("http://127.8.9.1", True),
        ("http://localhost:8265", True),
        ("http://[::1]:8265", True),
        ("http://0.0.0.0:8265", False),
        ("http://10.0.0.1:8265", False),
        ("http://localhost.example:8265", False),
        ("http://127.0.0.1.example", False),
    ],
)
def test_loopback_is_judged_by_the_host(address: str, expected: bool) -> None:
    assert is_loopback(check_address(address)) is expected


def test_plain_http_to_another_machine_is_refused_with_and_without_a_token() -> None:
    token = read_token({"RAY_AUTH_TOKEN": SECRET})
    remote = "http://head.example:8265"
    for held, problem in ((None, "there is no token"), (token, "would travel in clear")):
        with pytest.raises(ConfigError, match=problem) as refused:
            check_transport(remote, held, is_insecure=False)
        assert "--insecure" in str(refused.value)
        assert SECRET not in str(refused.value)
        assert check_transport(remote, held, is_insecure=True).startswith("warning: ")
        for address in ("https://head.example", ADDRESS):
            assert check_transport(address, held, is_insecure=False) == ""


def test_nothing_is_sent_to_an_address_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "request", lambda *args, **kwargs: pytest.fail("it was spoken to"))
    with pytest.raises(ConfigError, match="would travel in clear"):
        connect("http://head.example:8265", Console(), environment={"RAY_AUTH_TOKEN": SECRET})


def response(status: int, text: str = "") -> requests.Response:
    made = requests.Response()
    made.status_code, made._content = status, text.encode()
    return made


@pytest.mark.parametrize(
    ("status", "message"), [(401, "asks for a token and got none"), (403, "refuses this token"), (502, "no job server")]
)
def test_refusals_are_clear_and_the_header_carries_the_token(
    status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = []

    def answer(method: str, url: str, **arguments: dict) -> requests.Response:
        headers.append(arguments["headers"])
        return response(status)

    monkeypatch.setattr(requests, "request", answer)
    with pytest.raises((ConfigError, RuntimeError), match=message) as refused:
        connect(ADDRESS, Console(), environment={"RAY_AUTH_TOKEN": SECRET})
    assert headers == [{"Authorization": f"Bearer {SECRET}"}]
    assert SECRET not in str(refused.value)


@pytest.mark.parametrize(
    "error",
    [requests.ConnectionError(SECRET), ConnectionError(SECRET), TimeoutError(), aiohttp.ClientError(SECRET)],
)
def test_a_server_that_does_not_answer_is_named(error: Exception) -> None:
    with pytest.raises(RuntimeError, match=f"no job server answers at {ADDRESS}") as refused, explained(ADDRESS):
        raise error
    assert SECRET not in str(refused.value)


def test_an_answer_of_the_server_is_its_last_line() -> None:
    text = "Request failed with status code 500: Traceback (most recent call last):\n  File x\nValueError: no room."
    with pytest.raises(RuntimeError, match=r"answers with an error: ValueError: no room$"), explained(ADDRESS):
        raise RuntimeError(text)
    with pytest.raises(ConfigError, match="asks for a token"), explained(ADDRESS):
        raise AuthenticationError("Authentication required: x")


def test_a_job_that_is_not_there_is_named() -> None:
    server = server_of(FakeClient())
    for ask in (server.job, server.log, server.stop):
        with pytest.raises(ConfigError, match="has no job absent"):
            ask("absent")


def test_default_environment_is_that_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "RAY_AUTH_MODE" in os.environ
    monkeypatch.setattr(requests, "request", lambda *args, **arguments: response(401))
    with pytest.raises(ConfigError, match="asks for a token"):
        connect(ADDRESS, Console())
