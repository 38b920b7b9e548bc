"""What may stand in a rendered file: no credentials, no control characters."""

import re
from typing import Any

CREDENTIALS_IN_URI = re.compile(r"://[^/\s]*@")
# An assignment to what is named as a secret, or an access key of Amazon.
SECRET = re.compile(
    r"(?i:(password|passwd|secret|token|access[-_]?key(?:[-_]id)?|api[-_]?key|secret[-_]?key)\s*[=:]\s*\S)|\b(AKIA|ASIA)[A-Z0-9]{16}\b"
)


def texts_of(value: Any) -> list[str]:
    """All texts in plain values, keys left out."""
    if isinstance(value, dict):
        return [text for item in value.values() for text in texts_of(item)]
    if isinstance(value, list | tuple):
        return [text for item in value for text in texts_of(item)]
    return [value] if isinstance(value, str) else []


def check_text(text: str) -> None:
    """Refuses what must not, or cannot, stand in a crontab or a manifest.

    Raises:
        ValueError: credentials in a URI (which the message does not repeat), or a control character.
    """
    if CREDENTIALS_IN_URI.search(text):
        raise ValueError(
            "a URI holds credentials before its host, which would be readable in what is rendered; leave them out, "
            "and give MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD in a Kubernetes secret, or a crontab's "
            "--env-file"
        )
    if not text.isprintable():
        raise ValueError(f"{text!r} holds a control character or a line break; a rendered text has one line for it")


def check_values(values: dict[str, Any]) -> None:
    """Checks all texts of a values file, from which files for other people are rendered.

    Raises:
        ValueError: as `check_text`, or what looks like a secret of its own (which the message does not repeat).
    """
    for text in texts_of(values):
        check_text(text)
        found = SECRET.search(text)
        if found:
            raise ValueError(
                f"a value holds what looks like a secret ({found[1] or found[2]}...), which everybody could read in "
                "rendered files; put it into a Kubernetes secret or a file of the machine, and give the name of that"
            )
