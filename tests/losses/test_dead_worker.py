"""A worker that dies is an error on all others, not a hang."""

import os
import signal
import socket
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from userrep.losses.contrastive import info_nce
from userrep.losses.negatives import Negatives

WORLD_SIZE = 3
DEADLINE_S = 30


def _work(rank: int, port: int, outcomes: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=WORLD_SIZE)
    outcomes.put("ready")
    for step in range(10**6):
        if rank == 1 and step == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        rows = F.normalize(torch.randn(4, 8), dim=-1).requires_grad_()
        try:
            negatives = Negatives.gather((torch.arange(4) + 4 * rank,))
            info_nce(rows, rows.detach(), torch.tensor(2.0), negatives).backward()
        except RuntimeError as error:
            outcomes.put(f"{step} {error}")
            return


def test_a_dead_worker_is_an_error_on_all_others() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    outcomes: Any = context.Queue()
    processes = [context.Process(target=_work, args=(rank, port, outcomes)) for rank in range(WORLD_SIZE)]
    for process in processes:
        process.start()
    try:
        for _ in range(WORLD_SIZE):
            assert outcomes.get(timeout=120) == "ready"
        # `get` raises where nothing comes: the bar is that every survivor knows within the deadline.
        errors = [outcomes.get(timeout=DEADLINE_S) for _ in range(WORLD_SIZE - 1)]
        assert all(error.startswith("3 ") for error in errors)
    finally:
        for process in processes:
            process.kill()
            process.join()
