"""Runs a function on several gloo processes of this machine and returns what each rank returned."""

import os
import pickle
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> list[Any]:
    """Results in rank order; an exception on any rank is raised here with its traceback."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = mp.get_context("spawn")
    queue = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(function, rank, world_size, port, queue, args)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    outcomes = dict(queue.get() for _ in processes)
    for process in processes:
        process.join()
    for rank, outcome in outcomes.items():
        if isinstance(outcome, str):
            raise AssertionError(f"rank {rank} failed:\n{outcome}")
    return [pickle.loads(outcomes[rank]) for rank in range(world_size)]


def _run(
    function: Callable[..., Any], rank: int, world_size: int, port: int, queue: Any, args: tuple[Any, ...]
) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
        # As plain bytes: tensors in shared memory would vanish with this process.
        queue.put((rank, pickle.dumps(function(rank, *args))))
    except Exception:
        queue.put((rank, traceback.format_exc()))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
