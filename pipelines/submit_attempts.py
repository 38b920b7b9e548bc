"""Submission ids. A job server keeps one for good, so a job that is submitted again is the next attempt of its id."""

import re
from collections.abc import Mapping

from ray.job_submission import JobDetails

STAGE_KEY = "userrep"  # in the metadata of every job that is submitted here


def attempt_number(submission_id: str, base: str) -> int:
    """1 for the id itself, n for `base-n`; 0: it is none of this base."""
    found = re.fullmatch(re.escape(base) + r"(?:-(\d+))?", submission_id)
    return int(found[1] or 1) if found else 0


def latest_attempt(jobs: Mapping[str, JobDetails], base: str) -> JobDetails | None:
    """The newest job of an id; None: it was never submitted."""
    numbers = {attempt_number(submission_id, base): job for submission_id, job in jobs.items()}
    newest = max(numbers, default=0)
    return numbers[newest] if newest else None


def next_attempt(latest: JobDetails | None, base: str) -> str:
    """Submission id of the attempt after one."""
    number = 1 if latest is None else attempt_number(str(latest.submission_id), base) + 1
    return base if number == 1 else f"{base}-{number}"
