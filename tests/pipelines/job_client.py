"""A job server in memory, with the interface of Ray's client."""

import json
from collections.abc import AsyncIterator
from typing import Any

from ray.dashboard.modules.job.pydantic_models import JobType
from ray.job_submission import JobDetails, JobStatus

from pipelines.job_server import JobServer, Token
from pipelines.submit_versions import MARK, local_versions

ADDRESS = "http://127.0.0.1:8265"


def details(submission_id: str, status: JobStatus, **facts: Any) -> JobDetails:
    return JobDetails(
        type=JobType.SUBMISSION, job_id=None, submission_id=submission_id, status=status, entrypoint="", **facts
    )


class FakeClient:
    """Jobs stay as they are put; one that is submitted has succeeded, and tells `versions` if that is its purpose."""

    def __init__(self, versions: dict[str, str] | None = None) -> None:
        self.versions = local_versions() if versions is None else versions
        self.known: dict[str, JobDetails] = {}
        self.logs: dict[str, str] = {}
        self.submitted: list[dict[str, Any]] = []
        self.pieces: list[list[str | Exception]] = []
        self.sent_files: dict[str, bytes] = {}

    def put(self, submission_id: str, status: JobStatus, **facts: Any) -> None:
        self.known[submission_id] = details(submission_id, status, **facts)

    def list_jobs(self) -> list[JobDetails]:
        return list(self.known.values())

    def get_job_info(self, submission_id: str) -> JobDetails:
        if submission_id not in self.known:
            raise RuntimeError(f"Request failed with status code 404: Job {submission_id} does not exist.")
        return self.known[submission_id]

    def submit_job(self, *, submission_id: str, entrypoint: str, **arguments: Any) -> str:
        if submission_id in self.known:
            raise RuntimeError(
                f"Request failed with status code 500: Job with submission_id {submission_id} already exists."
            )
        self.submitted.append({"submission_id": submission_id, "entrypoint": entrypoint, **arguments})
        self.put(submission_id, JobStatus.SUCCEEDED, metadata=arguments.get("metadata"))
        if submission_id.startswith("userrep-versions"):
            self.logs[submission_id] = f"Running entrypoint {entrypoint}\n{MARK}{json.dumps(self.versions)}\n"
        return submission_id

    def get_job_logs(self, submission_id: str) -> str:
        self.get_job_info(submission_id)
        return self.logs.get(submission_id, "")

    async def tail_job_logs(self, submission_id: str) -> AsyncIterator[str]:
        for piece in self.pieces.pop(0) if self.pieces else []:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    def stop_job(self, submission_id: str) -> bool:
        if self.get_job_info(submission_id).status.is_terminal():
            return False
        self.put(submission_id, JobStatus.STOPPED)
        return True


def server_of(client: FakeClient, token: str = "") -> JobServer:
    return JobServer(client, ADDRESS, Token(token, "a test") if token else None)  # pyright: ignore[reportArgumentType]
