"""The engine in a thread of its own: submit from anywhere, get a future for every row."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from functools import partial
from typing import Any

from lda_core.batch import Row
from lda_core.capture import Captured, CaptureRow
from lda_core.engine import Engine
from lda_core.errors import EngineStopped, EngineStuck
from lda_core.request import Completion, Scored
from lda_core.scoring import ScoreRow

AnyRow = Row | ScoreRow | CaptureRow

logger = logging.getLogger(__name__)


class EngineThread:
    """Owns an Engine. Cancelling a future takes its row out at the next step.

    If a step raises, the engine's state is not to be trusted: all futures fail with
    EngineStopped, nothing more is accepted, `check` says so, and `on_failure` is called in the
    engine's thread. Whoever asked may ask again elsewhere; the same seed gives the same text.
    """

    def __init__(self, engine: Engine, on_failure: Callable[[], None] | None = None) -> None:
        self.engine = engine
        self._on_failure = on_failure
        self._wake = threading.Condition()
        self._inbox: dict[AnyRow, Future[Any]] = {}  # guarded by _wake
        self._closing = False
        self._failure: BaseException | None = None
        self._futures: dict[AnyRow, Future[Any]] = {}  # the engine thread's own
        self._beat = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="lda-engine", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[Row]) -> list[Future[Completion]]:
        """One future per row of `engine.accept`; all join together.

        Raises EngineStopped after `stop` or a failure.
        """
        return self._submit(rows)

    def submit_scores(self, rows: Sequence[ScoreRow]) -> list[Future[Scored]]:
        """One future per row of `engine.accept_score`; worked off between decode steps.

        A future raises DoesNotFit where memory runs out with its row alone. Raises EngineStopped
        after `stop` or a failure.
        """
        return self._submit(rows)

    def submit_captures(self, rows: Sequence[CaptureRow]) -> list[Future[Captured]]:
        """One future per row of `engine.accept_capture`, as `submit_scores`."""
        return self._submit(rows)

    def _submit(self, rows: Sequence[AnyRow]) -> list[Future[Any]]:
        futures: list[Future[Any]] = [Future() for _ in rows]
        for row, future in zip(rows, futures, strict=True):
            future.add_done_callback(partial(_leave_if_cancelled, row))
        with self._wake:
            if self._closing or not self._thread.is_alive() or self._failure is not None:
                raise EngineStopped("the engine has stopped")
            self._inbox.update(zip(rows, futures, strict=True))
            self._wake.notify()
        return futures

    def check(self, stuck_after_s: float) -> None:
        """Raises EngineStopped if the thread has died, EngineStuck if it has shown no step for
        that long."""
        if self._failure is not None:
            raise EngineStopped(f"the engine failed: {self._failure!r}")
        if not self._thread.is_alive():
            raise EngineStopped("the engine thread has ended")
        silent_s = time.monotonic() - self._beat
        if silent_s > stuck_after_s:
            raise EngineStuck(f"the engine has shown no step for {silent_s:.0f} s")

    def stop(self, timeout_s: float = 60.0) -> None:
        """Takes no more rows, finishes (drains) those it has, ends the thread."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join(timeout_s)

    def _run(self) -> None:
        try:
            while self._receive():
                out: list[AnyRow] = [*self.engine.step(), *self.engine.piece_step()]
                for row in out:
                    _resolve(self._futures.pop(row), row)
        except BaseException as error:  # whatever it is, nobody may be left waiting
            with self._wake:
                self._failure = error
                self._futures.update(self._inbox)
            logger.exception("the engine failed")
            for future in self._futures.values():
                try:
                    future.set_exception(EngineStopped(f"the engine failed: {error!r}"))
                except InvalidStateError:
                    pass  # done or cancelled meanwhile
            if self._on_failure is not None:
                self._on_failure()

    def _receive(self) -> bool:
        """Takes in new rows, waits while there is nothing to do; False when it is time to end."""
        with self._wake:
            while not (self._inbox or self._futures or self._closing):
                self._beat = time.monotonic()
                self._wake.wait(timeout=1.0)
            self._beat = time.monotonic()
            for row in self._inbox:
                if isinstance(row, ScoreRow):
                    self.engine.enqueue_score(row)
                elif isinstance(row, CaptureRow):
                    self.engine.enqueue_capture(row)
                else:
                    self.engine.enqueue(row)
            self._futures.update(self._inbox)
            self._inbox.clear()
            return bool(self._futures)


def _leave_if_cancelled(row: AnyRow, future: Future[Any]) -> None:
    if future.cancelled():
        row.left = True


def _resolve(future: Future[Any], row: AnyRow) -> None:
    answer: Completion | Scored | Captured | None
    if isinstance(row, ScoreRow):
        answer = row.scored
    elif isinstance(row, CaptureRow):
        answer = row.captured
    else:
        answer = row.completion
    try:
        if answer is not None:
            future.set_result(answer)
        elif row.refused is not None:
            future.set_exception(row.refused)
        else:  # it left
            future.cancel()
    except InvalidStateError:
        pass  # cancelled between its last step and now: nobody is waiting
