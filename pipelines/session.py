"""The Ray session of a job and the memory that the job takes."""

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import psutil

SAMPLE_INTERVAL_S = 0.5

QUIET_ENV = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # worker prints would appear twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # silences a warning on machines without a GPU
    "TOKENIZERS_PARALLELISM": "false",  # Ray runs one tokenizer per core already
    "MLFLOW_DISABLE_TELEMETRY": "true",
}

# A training step allocates and frees gigabytes in buffers of some MB; with huge pages the kernel clears them 2 MB at a
# time. Measured at width 128 and 512 users: 1.19 M page faults become 0.07 M, a step takes 0.55 instead of 0.68 CPU-s.
WORKER_ENV = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@contextmanager
def ray_session(is_verbose: bool) -> Iterator[None]:
    """Connects to the cluster that RAY_ADDRESS names, or starts a local one for the duration of the block."""
    # Before ray is imported: the processes of a local cluster inherit this environment.
    for key, value in (WORKER_ENV if is_verbose else WORKER_ENV | QUIET_ENV).items():
        os.environ.setdefault(key, value)
    import ray

    if ray.is_initialized():
        yield
        return
    level = logging.INFO if is_verbose else logging.ERROR
    if not is_verbose:
        for name in ("ray.data", "ray.train", "ray._private.authentication"):
            logging.getLogger(name).setLevel(level)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"ray\.")
    is_local = "RAY_ADDRESS" not in os.environ
    ray.init(
        # Without it Ray would join the last cluster that was started on this machine, or wait for it when it is dead.
        address="local" if is_local else None,
        logging_level=level,
        log_to_driver=is_verbose,
        configure_logging=is_verbose,
        include_dashboard=False if is_local else None,
    )
    ray.data.DataContext.get_current().enable_progress_bars = is_verbose
    try:
        yield
    finally:
        ray.shutdown()


class PeakMemory:
    """Samples the resident memory of this process and all its descendants.

    Pages shared between processes count once per process, so the sum is an upper bound.
    """

    def __init__(self) -> None:
        self.job_bytes = 0
        self.driver_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "PeakMemory":
        """Starts sampling."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stops sampling."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        driver = psutil.Process()
        while not self._stop.wait(SAMPLE_INTERVAL_S):
            total = 0
            for process in [driver, *driver.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.job_bytes = max(self.job_bytes, total)
            self.driver_bytes = max(self.driver_bytes, driver.memory_info().rss)
