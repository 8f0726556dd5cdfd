"""Progress display with the remaining time: a bar on a terminal, else a line every few seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from loftq_exp.ranks import is_main

SECONDS_BETWEEN_LINES = 10.0


class Advance(Protocol):
    """Updates a progress display; `note` is a short text such as the current loss."""

    def __call__(self, done: int, total: int, note: str = "") -> None: ...


@contextmanager
def progress(title: str) -> Iterator[Advance]:
    """Show the progress of one long task. Yield the function that updates it.

    Ranks above 0 show nothing.
    """
    console = Console()
    if not is_main():
        yield _nothing
    elif console.is_terminal:
        with _bar(title, console) as advance:
            yield advance
    else:
        yield _Lines(title, console)


@contextmanager
def _bar(title: str, console: Console) -> Iterator[Advance]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}", markup=False))  # fmt: skip
    with Progress(*columns, console=console) as display:
        task = display.add_task(title, total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            display.update(task, completed=done, total=total, note=note)

        yield advance


def _nothing(done: int, total: int, note: str = "") -> None:
    """Do nothing: ranks above 0 have no display."""


class _Lines:
    """The display without a terminal: at most one line every few seconds, and one at the end."""

    def __init__(self, title: str, console: Console) -> None:
        self.title, self.console = title, console
        self.began = time.monotonic()
        self.spoke = self.began - SECONDS_BETWEEN_LINES / 2

    def __call__(self, done: int, total: int, note: str = "") -> None:
        now = time.monotonic()
        if done < total and now - self.spoke < SECONDS_BETWEEN_LINES:
            return
        self.spoke = now
        elapsed = now - self.began
        left = f", {elapsed / done * (total - done):.0f} s left" if 0 < done < total else ""
        text = f"{self.title}: {done}/{total} in {elapsed:.0f} s{left}{'  ' + note if note else ''}"
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)
