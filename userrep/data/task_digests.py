"""What tells two sets of tasks apart: digests of all that training and evaluation read of them."""

import json
from hashlib import sha256

from userrep.config import HASH_CHARS
from userrep.data.tasks import Task, TaskSet


def digest_prefixes(tasks: TaskSet, chosen: tuple[Task, ...], with_texts: bool) -> tuple[str, ...]:
    """Hex digests (12 characters) of all that training and evaluation read until each of the tasks has been taught.

    Args:
        tasks: of the data set.
        chosen: those of them that are taught, in their order.
        with_texts: whether texts of the items are read, `ContinualConfig.reads_texts`.
    """
    digests = []
    digest = sha256(f"{tasks.sequences.num_items} {tasks.sequences.items.shape}".encode())
    digest.update(tasks.sequences.items.tobytes())
    if with_texts:
        digest.update(json.dumps(tasks.sequences.texts).encode())
    for task in chosen:
        digest.update(f"{task.name} {task.kind} {task.num_classes} {len(task.rows)}".encode())
        for values in (task.rows, task.labels, task.split):
            digest.update(values.tobytes())
        digests.append(digest.hexdigest()[:HASH_CHARS])
    return tuple(digests)


def digest_tasks(tasks: TaskSet, chosen: tuple[Task, ...], with_texts: bool) -> str:
    """Hex digest (12 characters) of all that training and evaluation read; see `digest_prefixes`."""
    return digest_prefixes(tasks, chosen, with_texts)[-1]
