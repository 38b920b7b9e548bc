"""A process that releases a table and kills itself at a chosen point. Forked from a server that has all imports done.

Points are what changes the world: SQL statements, and files that are opened for writing, renamed, made or removed. They
are counted, so a number means the same point in every run, however busy the machine is.
"""

import os
import signal
import sys
import tempfile
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

from sqlalchemy import event
from sqlalchemy.engine import Engine

from userrep.publishing.gate import GateConfig
from userrep.publishing.release import release

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "shutil.copyfile", "shutil.move")


class Points:
    """Counts points, and ends the process at one of them."""

    def __init__(self, kill_at: int | None) -> None:
        self.count, self._kill_at = 0, kill_at

    def pass_one(self, *_: object) -> None:
        self.count += 1
        if self.count == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def audit(self, name: str, arguments: tuple) -> None:
        if name in CHANGES or (name == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES):
            self.pass_one()


def release_killed(table_dir: Path, name: str, tracking_uri: str, kill_at: int | None) -> int | None:
    """Releases a table in a process that dies at point `kill_at`.

    Returns:
        None if it was killed; the number of points if it came to its end.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_release, args=(table_dir, name, tracking_uri, kill_at, its))
    process.start()
    its.close()
    try:
        count = mine.recv()
    except EOFError:
        count = None
    process.join()
    assert process.exitcode == (-signal.SIGKILL if count is None else 0)
    return count


def _release(table_dir: Path, name: str, tracking_uri: str, kill_at: int | None, answer: Connection) -> None:
    tempfile.tempdir = str(table_dir.parent)  # nobody clears up after a killed process
    points = Points(kill_at)
    event.listen(Engine, "before_cursor_execute", points.pass_one)
    event.listen(Engine, "after_cursor_execute", points.pass_one)
    event.listen(Engine, "commit", points.pass_one)
    sys.addaudithook(points.audit)
    release(table_dir, name, "champion", tracking_uri=tracking_uri, experiment="killed", gate=GateConfig(force=True))
    answer.send(points.count)
