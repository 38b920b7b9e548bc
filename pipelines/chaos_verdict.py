"""What a training run left behind, and whether it is what the undisturbed run left.

Lines of a run's ledger are in the order in which they were written; a step is the number of steps taken after it.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from userrep.data.views import ViewConfig, list_samples, manifest_row_groups, read_row_group
from userrep.manifest import IncompleteTableError, read_manifest, verify_files
from userrep.training.checkpoint import CHECKPOINTS, MODEL_FILE, checkpoint_step, list_checkpoints
from userrep.training.ledger import LEDGER_NAME, read_ledger
from userrep.training.settings import PretrainConfig, open_training_stream
from userrep.training.tracking import SPOOL_NAME, read_points

SHOWN = 3  # differences of one kind that are spelled out


@dataclass(frozen=True)
class Outcome:
    """What a run left behind.

    Attributes:
        lines: of its ledger.
        metric_steps: steps that have metrics in its spool.
        weights: bytes of the last checkpoint's weights; None where it is missing, damaged or of an earlier step.
    """

    lines: list[dict[str, Any]]
    metric_steps: frozenset[int]
    weights: bytes | None

    @property
    def hashes(self) -> dict[int, str]:
        """The hash at each step, as the first attempt that took it wrote it."""
        return {line["step"]: line["batch_hash"] for line in reversed(self.lines)}

    @property
    def num_useful(self) -> int:
        """Steps that had to be taken: each one once."""
        return len({line["step"] for line in self.lines})


def read_outcome(run_dir: Path, num_steps: int) -> Outcome:
    """Reads what a run of `num_steps` steps left in its directory, which need not exist."""
    points = frozenset(point["step"] for point, _ in read_points(run_dir / SPOOL_NAME))
    return Outcome(read_ledger(run_dir / LEDGER_NAME), points, _final_weights(run_dir / CHECKPOINTS, num_steps))


def find_differences(undisturbed: Outcome, outcome: Outcome, num_steps: int) -> list[str]:
    """Everything in which a run differs from the undisturbed one; empty when they are the same.

    Every line counts, so a step that is taken twice must have the same hash both times. An attempt must write nothing
    after a later attempt has.
    """
    problems = []
    steps = set(range(1, num_steps + 1))
    problems += _few("never taken: step", sorted(steps - outcome.hashes.keys()))
    problems += _few("without metrics: step", sorted(steps - outcome.metric_steps))
    expected = undisturbed.hashes
    other = [line["step"] for line in outcome.lines if line["batch_hash"] != expected.get(line["step"])]
    problems += _few("other samples than in the undisturbed run: step", other)
    stale = [line["step"] for before, line in pairwise(outcome.lines) if line["attempt"] < before["attempt"]]
    problems += _few("written by an attempt that had been replaced: step", stale)
    if outcome.weights is None:
        problems.append(f"there is no intact checkpoint of step {num_steps}")
    elif outcome.weights != undisturbed.weights:
        losses = {line["step"]: line["loss"] for line in undisturbed.lines}
        first = next((line["step"] for line in outcome.lines if line["loss"] != losses.get(line["step"])), None)
        place = "all losses are equal" if first is None else f"the loss differs from step {first} on"
        problems.append(f"final weights are not bit-equal; {place}")
    return problems


def count_starts(lines: list[dict[str, Any]]) -> list[int]:
    """Steps that were taken already where each attempt began, e.g. [0, 15] for a run resumed once."""
    is_start = [True, *(line["attempt"] != before["attempt"] for before, line in pairwise(lines))]
    return [line["step"] - 1 for line, starts in zip(lines, is_start, strict=False) if starts]


def recovery_s(lines: list[dict[str, Any]], fault_ms: int) -> float:
    """The longest time without a step that is new, from the fault on, in seconds; 0 when none came after it.

    Steps that are taken again are not new: until the run is past the point that it had reached, it is recovering.
    """
    longest, reached, previous_ms = 0, 0, 0
    for line in lines:
        if line["step"] <= reached:
            continue
        if line["time_ms"] >= fault_ms and reached:
            longest = max(longest, line["time_ms"] - max(previous_ms, fault_ms))
        reached, previous_ms = line["step"], line["time_ms"]
    return longest / 1000


def check_plan(undisturbed: Outcome, shards: Path, config: PretrainConfig) -> list[str]:
    """Whether the undisturbed run consumed the batches of the plan, and these every sample once in an epoch.

    The batches are prepared anew, in this process and without Ray, and their samples counted.

    Returns:
        Problems; empty when everything holds.
    """
    other, rolling, taken = [], "", []
    for step, batch in enumerate(open_training_stream(shards, config).batches(), start=1):
        keys = np.asarray(batch.user_keys)
        taken += keys.tolist()
        rolling = hashlib.blake2b(rolling.encode() + keys.tobytes(), digest_size=16).hexdigest()
        if undisturbed.hashes.get(step) != rolling:
            other.append(step)
    problems = _few("other samples than in the plan: step", other)
    available = _training_keys(shards, config.views)
    size = available.total()
    # An epoch follows the one before without a gap, also in the middle of a batch; the last one may be incomplete.
    for number, start in enumerate(range(0, len(taken), size)):
        epoch = Counter(taken[start : start + size])
        if repeated := (epoch - available).total():
            problems.append(f"epoch {number} holds {repeated} samples more than once")
        if epoch.total() == size and (missing := (available - epoch).total()):
            problems.append(f"epoch {number} leaves out {missing} samples")
    return problems


def _training_keys(shards: Path, views: ViewConfig) -> Counter[int]:
    """How many training samples each user key has."""
    keys: Counter[int] = Counter()
    for shard, number, _ in manifest_row_groups(read_manifest(shards).facts["shards"]):
        group = read_row_group(shards, shard, number)
        keys.update(group.keys[list_samples(group, views.kinds, "train").users].astype(np.int64).tolist())
    return keys


def _final_weights(checkpoints: Path, num_steps: int) -> bytes | None:
    newest = next(reversed(list_checkpoints(checkpoints)), None)
    try:
        if newest is None or checkpoint_step(newest) != num_steps:
            return None
        verify_files(newest, read_manifest(newest))
    except IncompleteTableError:
        return None
    return (newest / MODEL_FILE).read_bytes()


def _few(what: str, steps: list[int]) -> list[str]:
    if not steps:
        return []
    tail = f" and {len(steps) - SHOWN} more" if len(steps) > SHOWN else ""
    return [f"{what} {', '.join(map(str, steps[:SHOWN]))}{tail}"]
