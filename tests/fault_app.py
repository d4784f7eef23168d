"""The application of the config file with a replica that fails on demand: for tests alone.

A prompt with one of the words below makes its replica fail when its row comes to be decoded.
"""

import asyncio
import os
import time
from pathlib import Path
from typing import Any

from ray.serve import Application

from deployments import app
from deployments.app import AppArgs
from deployments.replica import LDAReplica
from lda_core.batch import Row

POISON = "POISON"  # its replica dies, each time
HANG = "HANG"  # its replica's engine hangs for ever, if no other has hung
BUG = "BUG"  # raises what nobody expects
FOLDER = "LDA_FAULTS"  # environment variable: what happened leaves a file there


class FaultyReplica(LDAReplica):
    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._folder = Path(os.environ[FOLDER])
        self._step = self._engine.engine.step
        self._engine.engine.step = self._fail_or_step  # type: ignore[method-assign]
        self._note("start")

    def _note(self, what: str) -> None:
        (self._folder / f"{what}.{time.time_ns()}").touch()

    def _fail_or_step(self) -> list[Row]:
        if any(self._has(POISON, row) for row in self._engine.engine._rows):
            self._note("poison")
            os._exit(1)
        if any(self._has(HANG, row) for row in self._engine.engine._rows):
            if not list(self._folder.glob("hang.*")):
                self._note("hang")
                while True:
                    time.sleep(1)
        return self._step()

    def _has(self, word: str, row: Row) -> bool:
        return word in self._pair.tokenizer.decode(row.request.prompt_ids)

    async def generate(self, request: Any, until: float | None = None) -> Any:
        if BUG in (request.prompt or ""):
            raise KeyError("a bug")
        return await super().generate(request, until)

    async def counts(self) -> tuple[int, int, int, int]:
        """The process; rows that live, rows that wait, steps so far."""
        await asyncio.sleep(0)
        engine = self._engine.engine
        return os.getpid(), engine.live_rows, engine.waiting_rows, engine.stats.steps


def build_app(args: AppArgs) -> Application:
    app._Replica = app._Replica.options(func_or_class=FaultyReplica)
    return app.build_app(args)
