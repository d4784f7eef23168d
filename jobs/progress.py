"""How a run is going: a live bar on a terminal, else one plain line every few seconds."""

import sys
import time
from collections.abc import Iterable, Mapping
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from jobs.rows import Cell, Row
from jobs.summary import alpha_text

EVERY_S = 5.0
BAR_CELLS = 24


class Progress:
    """Counts rows as they come. `done` rows and `hits` are those of earlier runs."""

    def __init__(
        self, total: int, done: int, hits: Mapping[Cell, int], stream: TextIO | None = None
    ) -> None:
        self._total, self._done, self._failed = total, done, 0
        self._earlier = done
        self._hits = dict(hits)
        self._stream = stream or sys.stdout
        self._started = self._shown = time.monotonic()
        self._live: Live | None = None
        if self._stream.isatty():
            console = Console(file=self._stream)
            self._live = Live(console=console, get_renderable=self._bar, refresh_per_second=4)

    def update(self, rows: Iterable[Row]) -> None:
        """Call it with no rows, too, so that a stalled run says so."""
        for row in rows:
            self._done += row.error is None
            self._failed += row.error is not None
            self._hits[row.arm, row.alpha] += bool(row.activated)
        if self._live is None and time.monotonic() - self._shown >= EVERY_S:
            self._print()

    def line(self) -> str:
        new = self._done - self._earlier + self._failed
        elapsed = time.monotonic() - self._started
        rate = new / elapsed if elapsed > 0 else 0.0
        left = self._total - self._done - self._failed
        eta = _clock(left / rate) if rate else "?"
        hits = " ".join(
            ("" if arm == "untriggered" else f"{arm}:") + f"{alpha_text(alpha)}={count:,}"
            for (arm, alpha), count in self._hits.items()
        )
        return (
            f"{self._done + self._failed:,}/{self._total:,} rows, {rate:.1f} rows/s, ETA {eta}, "
            f"hits per alpha {hits}, failed {self._failed:,}"
        )

    def _bar(self) -> Text:
        share = (self._done + self._failed) / max(1, self._total)
        full = round(BAR_CELLS * share)
        return Text("█" * full + "░" * (BAR_CELLS - full) + f" {share:4.0%} " + self.line())

    def _print(self) -> None:
        self._shown = time.monotonic()
        print(self.line(), file=self._stream, flush=True)

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        else:
            self._print()


def _clock(seconds: float) -> str:
    minutes, s = divmod(int(seconds + 0.5), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02}:{s:02}"
