"""The phrase monitor as a stage of a study: what to watch while rows are made, and what to ask
once they are there."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deployments.schemas import MAX_WATCHED, InvalidRequest
from jobs.call import Caller, NoAnswer
from jobs.errors import Refused, Stopped
from jobs.experiment import Experiment
from jobs.monitor import Plan, first_tokens
from jobs.rows import Row
from jobs.run_folder import monitor_file
from jobs.score_calls import run_monitor, variant_ids
from jobs.summary import UNTRIGGERED

IN_FLIGHT = 16


class Monitor:
    """`phrases`: scorer names and what they look for; without any it does nothing."""

    def __init__(self, phrases: Mapping[str, str]) -> None:
        self._phrases = phrases
        self._variants: dict[str, list[list[int]]] = {}

    def prepare(self, caller: Caller) -> dict[str, Any]:
        """Fields of every request: the first tokens of all phrases are watched."""
        if not self._phrases:
            return {}
        self._ask(caller)
        return {"watch": self._watched}

    def run(self, experiment: Experiment, out: Path, rows: Iterable[Row], caller: Caller) -> int:
        """Follows every phrase at alpha 0; returns how many requests failed."""
        failed = 0
        if self._phrases:
            self._ask(caller)
        for name, variants in self._variants.items():
            plan = Plan(
                phrase=self._phrases[name],
                variants=variants,
                arm=UNTRIGGERED,
                alpha=0.0,
                grid=experiment.sampling["grid"],
                temperature=experiment.sampling["temperature"],
                max_new_tokens=experiment.sampling["max_new_tokens"],
                request={k: experiment.sampling[k] for k in ("prompt_format", "system_prompt")},
            )
            print(f"monitoring {name}")
            failed += run_monitor(
                monitor_file(out, name),
                plan,
                ((prompt.id, prompt.text) for prompt in experiment.prompts),
                _Watched(rows, [self._watched.index(token) for token in plan.watch]),
                partial(caller.ask, "score"),
                IN_FLIGHT,
                caller.stop,
            )
        return failed

    def _ask(self, caller: Caller) -> None:
        """How the service's tokenizer writes the phrases."""
        score = partial(caller.ask, "score")
        for name, phrase in self._phrases.items():
            if name not in self._variants:
                try:
                    self._variants[name] = variant_ids(score, {"prompt": "?"}, phrase)
                except NoAnswer as error:
                    raise Stopped(f"the phrase's tokens are not known: {error}") from None
                except InvalidRequest as error:
                    raise Refused(f"--phrase: {error}") from None
        if len(self._watched) > MAX_WATCHED:
            raise Refused(
                f"--phrase: they begin with {len(self._watched)} different tokens, at most "
                f"{MAX_WATCHED} are watched"
            )

    @property
    def _watched(self) -> list[int]:
        """The columns of a row's `watched`."""
        return first_tokens([v for variants in self._variants.values() for v in variants])


@dataclass(frozen=True)
class _Watched:
    """The rows with one phrase's columns of `watched` alone."""

    rows: Iterable[Row]
    columns: list[int]

    def __iter__(self) -> Iterator[Row]:
        for row in self.rows:
            if row.watched is None:
                yield row
            else:
                watched = [[step[i] for i in self.columns] for step in row.watched]
                yield row.model_copy(update={"watched": watched})
