"""Which fault hits which run, and when: a pure function of the seed."""

import random
from dataclasses import asdict, dataclass
from typing import Any, Literal

Kind = Literal["worker", "driver", "raylet", "stop", "bit_flip", "truncation", "mlflow", "storage", "node"]

MEANING: dict[Kind, str] = {
    "worker": "SIGKILL of a training worker",
    "driver": "SIGKILL of the command",
    "raylet": "SIGKILL of the raylet of the command's own cluster",
    "stop": "SIGSTOP of a training worker, which wakes up when its successor trains",
    "bit_flip": "one bit of the newest checkpoint flipped, then SIGKILL of all workers",
    "truncation": "a file of the newest checkpoint cut short, then SIGKILL of all workers",
    "mlflow": "SIGKILL of the MLflow server, which stays down",
    "storage": "run directory read-only for 10 s",
    "node": "SIGKILL of all processes of a node that trains; another node joins",
}
DAMAGES: tuple[Kind, ...] = ("bit_flip", "truncation")
INTERRUPTING: frozenset[Kind] = frozenset(MEANING) - {"mlflow", "storage"}  # the others must cost no step
LAST_STEPS = 10  # no fault in the last steps: it would come when the run is over


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        index: number of the run that it hits, from 0.
        kind: what happens.
        step: it happens as soon as so many steps are in the run's ledger.
        choice: which worker or file, 0 <= choice < 1 over all that there are.
        place: which byte of the file, 0 <= place < 1 of its size.
        bit: of that byte, 0..7.
        has_own_cluster: the command starts a local Ray cluster for itself; False: it uses one that outlives it.
    """

    index: int
    kind: Kind
    step: int
    choice: float
    place: float
    bit: int
    has_own_cluster: bool

    def describe(self) -> dict[str, Any]:
        """JSON-plain values."""
        return asdict(self)


def kinds_for(num_nodes: int, can_lock_storage: bool) -> tuple[Kind, ...]:
    """Kinds of faults that can be made on this many nodes of a cluster.

    Args:
        num_nodes: nodes; where there are several, one of them dies instead of the raylet of a cluster of one.
        can_lock_storage: whether `storage_lock` works here.
    """
    left_out: set[Kind] = {"node"} if num_nodes == 1 else {"raylet"}
    if not can_lock_storage:
        left_out.add("storage")
    return tuple(kind for kind in MEANING if kind not in left_out)


def make_schedule(
    num_faults: int, seed: int, kinds: tuple[Kind, ...], num_steps: int, checkpoint_every: int, num_nodes: int = 1
) -> list[Fault]:
    """Draws the faults; a longer schedule of the same seed begins with the shorter one.

    Args:
        num_faults: how many, >= 0.
        seed: of everything that is drawn.
        kinds: each comes once in every `len(kinds)` consecutive faults.
        num_steps: length of a run, more than `checkpoint_every + LAST_STEPS`.
        checkpoint_every: steps between checkpoints; one must exist before it can be damaged.
        num_nodes: with several nodes, no run has a cluster of its own.
    """
    rng = random.Random(seed)
    faults: list[Fault] = []
    while len(faults) < num_faults:
        for kind in rng.sample(kinds, len(kinds)):
            first_step = checkpoint_every + 1 if kind in DAMAGES else 1
            fault = Fault(
                index=len(faults),
                kind=kind,
                step=rng.randint(first_step, num_steps - LAST_STEPS),
                choice=rng.random(),
                place=rng.random(),
                bit=rng.randrange(8),
                # A raylet takes its cluster with it; a driver dies both ways, with its cluster and without.
                has_own_cluster=(rng.random() < 0.5 and kind == "driver" and num_nodes == 1) or kind == "raylet",
            )
            faults.append(fault)
    return faults[:num_faults]
