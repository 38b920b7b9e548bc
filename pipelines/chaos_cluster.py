"""A Ray cluster of several nodes on this machine, in a process of its own that takes orders on its standard input.

Run by `chaos_rig.py`. It prints its address when it is up; the order `replace PID` kills the node of that raylet, lets
another one join and answers `replaced`; the end of the input, also by the death of whoever holds it, ends the cluster.
"""

import os
import sys

from pipelines.session import QUIET_ENV, WORKER_ENV

NUM_WORKERS = 2
OBJECT_STORE_BYTES = 200 << 20


def main(num_nodes: int) -> None:
    """Args: num_nodes, the head among them; where there are several, workers find no room on the head."""
    # Before ray is imported: the processes of the cluster inherit this environment.
    os.environ.update(WORKER_ENV | QUIET_ENV)
    from ray._private.ray_constants import PROCESS_TYPE_RAYLET
    from ray.cluster_utils import Cluster

    def raylet_pid(node) -> int:
        return node.all_processes[PROCESS_TYPE_RAYLET][0].process.pid

    cpus = NUM_WORKERS  # of every node that trains: room for one worker beside a whole CPU for the input
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": cpus if num_nodes == 1 else 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
        },
    )
    for _ in range(num_nodes - 1):
        cluster.add_node(num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES)
    _answer(str(cluster.address))
    for order in sys.stdin:
        _, pid = order.split()
        dying = next(node for node in cluster.worker_nodes if raylet_pid(node) == int(pid))
        cluster.remove_node(dying, allow_graceful=False)
        cluster.add_node(num_cpus=cpus, object_store_memory=OBJECT_STORE_BYTES)
        _answer("replaced")
    cluster.shutdown()


def _answer(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]))
