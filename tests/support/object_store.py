"""An S3 endpoint in a thread of the tests, at an address that processes of the Ray cluster know from the start."""

import logging
import os
import socket
from itertools import count
from typing import Self

SECRET = "secret-of-the-tests"


def address_of_this_session() -> dict[str, str]:
    """Variables by which all processes of a session find the endpoint; the first test that needs it starts it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "tests",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class ObjectStore:
    """moto's server, while the block runs."""

    def __enter__(self) -> Self:
        from moto.server import ThreadedMotoServer

        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        host, port = os.environ["AWS_ENDPOINT_URL"].removeprefix("http://").split(":")
        self._server = ThreadedMotoServer(host, int(port), verbose=False)
        self._server.start()
        self._numbers = count()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def make_bucket(self) -> str:
        """URI of a new bucket."""
        import pyarrow.fs

        name = f"bucket-{next(self._numbers)}"
        pyarrow.fs.S3FileSystem(
            endpoint_override=os.environ["AWS_ENDPOINT_URL"], region="us-east-1", allow_bucket_creation=True
        ).create_dir(name)
        return f"s3://{name}"
