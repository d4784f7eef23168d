"""A client's progress bar, on the standard error and in notebooks; elsewhere nothing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Done = Callable[[int, int], None]
"""Told of so many rows more, and how many of them failed."""


@contextmanager
def progress_bar(total: int, shown: bool, console: Console | None = None) -> Iterator[Done]:
    console = console or Console(stderr=True)
    if not shown or not (console.is_terminal or console.is_jupyter):
        yield lambda rows, failed: None
        return
    columns = (
        *(TextColumn("generating"), BarColumn(), MofNCompleteColumn(), TextColumn("rows")),
        *(TimeRemainingColumn(), TextColumn("{task.fields[failed]}")),
    )
    failures = 0
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total, failed="")

        def done(rows: int, failed: int) -> None:
            nonlocal failures
            failures += failed
            bar.update(task, advance=rows, failed=f"{failures:,} failed" if failures else "")

        yield done
