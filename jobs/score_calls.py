"""The monitor's calls: a bounded number under way, their answers kept in monitor.jsonl.

The first line is the plan, each other one a Line. What is in the file is not asked again; what
failed is not in it, and is asked again by the next run.
"""

import sys
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from deployments.schemas import MAX_CONTINUATIONS, InvalidRequest, Scored
from jobs import lines
from jobs.call import NoAnswer
from jobs.errors import Refused, Stopped
from jobs.lines import LineWriter, cut_half_line
from jobs.monitor import (
    Line,
    Plan,
    branches,
    choose_bound,
    filled,
    irreducible,
    request,
    start_line,
    variant_texts,
)
from jobs.monitor_rates import start_rate
from jobs.rows import Row

GIVE_UP_AFTER = 100  # requests in a row without an answer

ScoreCall = Callable[[dict[str, Any]], list[Scored]]
"""A ScoreRequest to its answer. Raises InvalidRequest or NoAnswer where this one request cannot be
answered, JobError where none can."""


@dataclass(frozen=True)
class Task:
    """One request and the line that its answer fills in."""

    line: Line
    request: dict[str, Any]


def variant_ids(score: ScoreCall, request: dict[str, Any], phrase: str) -> list[list[int]]:
    """The phrase's tokenisations, which only the service knows. `request`: the prompt's fields."""
    texts = [{"text": text} for text in variant_texts(phrase)]
    return irreducible(one.token_ids for one in score({**request, "continuations": texts}))


def start_tasks(plan: Plan, prompts: Iterable[tuple[str, str]]) -> Iterator[Task]:
    """Of (prompt_id, text) pairs."""
    for prompt_id, text in prompts:
        line = start_line(plan, prompt_id)
        yield Task(line, request(plan, line, text, []))


def row_tasks(plan: Plan, rows: Iterable[Row], bound: float) -> Iterator[Task]:
    for row in rows:
        line = branches(row, plan, bound)
        yield Task(line, request(plan, line, row.prompt, row.token_ids))


def run_monitor(
    path: Path,
    plan: Plan,
    prompts: Iterable[tuple[str, str]],
    rows: Iterable[Row],
    score: ScoreCall,
    in_flight: int,
    stop: Callable[[], None] = lambda: None,
) -> int:
    """Adds to `path` what it lacks: the start of every prompt (prompt_id, text), then what the
    rollouts of the plan's arm and alpha in `rows` (read more than once) add. Returns how many
    requests failed. `stop` ends the calls under way when it leaves early, as on Ctrl-C, which
    would else wait for their answers.

    Raises Refused if the file holds another plan or is corrupt, Stopped once the service has
    stopped answering.
    """

    def rollouts() -> Iterator[Row]:
        cell = (plan.arm, plan.alpha)
        return (row for row in rows if row.error is None and (row.arm, row.alpha) == cell)

    cut_half_line(path)
    if path.exists() and path.stat().st_size:
        known = {(line.prompt_id, line.sample) for line in read_lines(path, plan)}
    else:
        with LineWriter(path) as writer:
            writer.append([plan])
        known = set()
    failed = _answer(path, plan, start_tasks(plan, prompts), known, score, in_flight, stop)
    at_start = start_rate(plan, read_lines(path, plan))
    bound = choose_bound(plan, rollouts(), at_start)
    tasks = row_tasks(plan, rollouts(), bound)
    return failed + _answer(path, plan, tasks, known, score, in_flight, stop)


def read_plan(path: Path) -> Plan:
    """Of the first line. Raises Refused for a file that is none of the monitor's."""
    cure = "delete the file to have it made again"
    for _, plan in lines.read_lines(path, Plan, "the monitor's plan", cure):
        return plan
    raise Refused(f"{path} is empty; {cure}")


def read_lines(path: Path, plan: Plan) -> Iterator[Line]:
    """Raises Refused for another plan's file and for a line that is none, with its number."""
    if read_plan(path) != plan:
        raise Refused(
            f"{path} is of another phrase, alpha or grid; delete the file to have it made again"
        )
    cure = "delete the line to have it asked again"
    for _, line in lines.read_lines(path, Line, "a line of the monitor's", cure, first=2):
        yield line


def _answer(
    path: Path,
    plan: Plan,
    tasks: Iterable[Task],
    known: set[tuple[str, int | None]],
    score: ScoreCall,
    in_flight: int,
    stop: Callable[[], None],
) -> int:
    """Appends the lines of those tasks that are not `known`, as they come; failures."""
    left = (task for task in tasks if (task.line.prompt_id, task.line.sample) not in known)
    failed = in_a_row = 0
    answers = _answers(left, score, in_flight, stop)
    with LineWriter(path) as writer, closing(answers) as done:
        for task, answer in done:
            if isinstance(answer, Exception):
                failed, in_a_row = failed + 1, in_a_row + 1
                if in_a_row == 1:
                    print(f"monitor: prompt {task.line.prompt_id}: {answer}", file=sys.stderr)
                if in_a_row >= GIVE_UP_AFTER:
                    raise Stopped(
                        f"{in_a_row} score requests in a row had no answer; the last: {answer}"
                    )
                continue
            in_a_row = 0
            writer.append([filled(task.line, answer, plan.temperature)])
    return failed


Answered = tuple[Task, list[Scored] | InvalidRequest | NoAnswer]


def _answers(
    tasks: Iterable[Task], score: ScoreCall, in_flight: int, stop: Callable[[], None]
) -> Generator[Answered, None, None]:
    """In any order, with at most `in_flight` calls under way; takes the tasks lazily."""

    def call(task: Task) -> Answered:
        continuations = task.request["continuations"]
        try:
            return task, [
                one
                for first in range(0, len(continuations), MAX_CONTINUATIONS)
                for one in score(
                    {
                        **task.request,
                        "continuations": continuations[first : first + MAX_CONTINUATIONS],
                    }
                )
            ]
        except (InvalidRequest, NoAnswer) as error:
            return task, error

    tasks = iter(tasks)
    pool = ThreadPoolExecutor(in_flight)
    window: set[Future[Answered]] = set()
    try:
        while True:
            window |= {pool.submit(call, t) for t in islice(tasks, in_flight - len(window))}
            if not window:
                return
            done, window = wait(window, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    except BaseException:  # also when closed: nobody reads the rest
        stop()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
