"""What a user sees while a stage runs: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PLAIN_INTERVAL_S = 10.0


class Console:
    """Messages and progress on stderr; stdout stays free for results."""

    def __init__(self, is_verbose: bool = False) -> None:
        self.is_verbose = is_verbose
        self._rich = rich.console.Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        """Prints one line."""
        self._rich.print(text, markup=False, soft_wrap=True)

    @contextmanager
    def progress(self, description: str, unit: str) -> Iterator[Callable[..., None]]:
        """Gives a function `advance(done, total, amount, note="")`; `amount` counts `unit`s and gives the rate.

        Args:
            description: what is going on, e.g. `ingest: reading`.
            unit: what the rate is measured in, e.g. `rows`.
        """
        show = self._bar if self._rich.is_terminal else self._lines
        with show(description, unit) as advance:
            yield advance

    @contextmanager
    def _bar(self, description: str, unit: str) -> Iterator[Callable[..., None]]:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            TextColumn("{task.percentage:>3.0f}%  {task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=False),
            TextColumn("{task.fields[note]}"),
        )
        started = time.perf_counter()
        with Progress(*columns, console=self._rich, transient=True) as bar:
            task = bar.add_task(description, total=None, rate="", note="")

            def advance(done: int, total: int, amount: int, note: str = "") -> None:
                rate = f"{amount / max(1e-9, time.perf_counter() - started):,.0f} {unit}/s"
                bar.update(task, completed=done, total=total, rate=rate, note=note)

            yield advance

    @contextmanager
    def _lines(self, description: str, unit: str) -> Iterator[Callable[..., None]]:
        started = last_shown = time.perf_counter()

        def advance(done: int, total: int, amount: int, note: str = "") -> None:
            nonlocal last_shown
            now = time.perf_counter()
            if now - last_shown < PLAIN_INTERVAL_S:
                return
            last_shown = now
            elapsed = now - started
            left = elapsed / max(1, done) * (total - done)
            rate = f"{amount / elapsed:,.0f} {unit}/s"
            self.say(f"{description}: {done}/{total}, {rate}, about {left:.0f} s left {note}".rstrip())

        yield advance


def stdout(text: str) -> None:
    """Prints a result."""
    sys.stdout.write(text + "\n")
