"""Many work items at once: Ray remote tasks that call the app's handle.

items --chunks--> remote tasks (0.1 CPU, `tasks` at a time)
                    --window--> handle calls (`in_flight` at a time each) --> answers
"""

import logging
import os
import signal
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cache
from itertools import islice
from typing import Any, Protocol

import ray
from ray import serve
from ray._private.services import find_gcs_addresses
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    RayServeException,
)

from deployments.resend import unwrapped
from deployments.schemas import PairInfo
from jobs import served_app
from jobs.call import AnswerT, Caller, ItemT, Work, one_line
from jobs.errors import JobError, Refused, Stopped

TASK_CPUS = 0.1  # small: a 1-CPU task could take a dead replica's CPU, and both wait for ever
TASK_ENV = {"MALLOC_ARENA_MAX": "1"}  # as in serve_config.yaml
MAX_TASK_CRASHES = 3
GIVE_UP_AFTER = 100  # requests in a row without an answer
LOST_TASK = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)
CONNECT_TIMEOUT_S = 60.0
CANCEL_TIMEOUT_S = 2.5  # `ray job stop` kills after 3
HOW_TO_SERVE = (
    "start the service first: RAY_AUTH_MODE=token serve run serve_config.yaml "
    "(and set RAY_AUTH_MODE=token in this shell, too)"
)


class Service(Protocol):
    """What a run needs of the application; the seam for the tests' fake."""

    def describe(self) -> PairInfo: ...

    def caller(self, work: Work[Any, Any]) -> Caller:
        """For calls from the driver itself."""
        ...

    def answers(
        self, items: Iterator[ItemT], work: Work[ItemT, AnswerT], requests: int
    ) -> Generator[list[AnswerT], None, None]:
        """One answer per item, in any order; an empty list where a second passed without one.

        `requests`: about how many items there are.
        """
        ...


def answered(batches: Iterable[list[AnswerT]]) -> Iterator[list[AnswerT]]:
    """The same batches. Raises Stopped once the service has stopped answering."""
    failures = 0
    for batch in batches:
        yield batch
        for answer in batch:
            failures = failures + 1 if answer.unanswered else 0
            if failures >= GIVE_UP_AFTER:
                raise Stopped(
                    f"{failures} requests in a row had no answer; the last: {answer.unanswered}"
                )


def work(items: Iterable[Any], caller: Caller, in_flight: int) -> Iterator[list[Any]]:
    """Answers as they come, with at most `in_flight` requests under way; takes items lazily."""
    pool = ThreadPoolExecutor(in_flight)
    window: set[Future[Any]] = set()
    try:
        for item in items:
            if len(window) >= in_flight:
                done, window = _some(window)
                yield [future.result() for future in done]
            window.add(pool.submit(caller, item))
        while window:
            done, window = _some(window)
            yield [future.result() for future in done]
    finally:
        caller.stop()
        pool.shutdown(wait=True, cancel_futures=True)


def _some(window: set[Future[Any]]) -> tuple[set[Future[Any]], set[Future[Any]]]:
    """Those that are done, at least one, and the others."""
    while True:
        # Waiting for ever, a task would not notice that Ray cancels it.
        done, others = wait(window, timeout=0.5, return_when=FIRST_COMPLETED)
        if done:
            return done, others


def work_in_task(
    chunk: list[Any], app: str, kind: Work[Any, Any], in_flight: int
) -> Iterator[list[Any]]:
    yield from work(chunk, Caller(_handle(app), kind), in_flight)


@cache
def _handle(app: str) -> Any:
    """One per worker process: making it takes 50 ms, and it keeps the list of replicas."""
    return served_app.handle(app)


@dataclass
class _Task:
    stream: Any  # of lists of answers
    left: dict[Any, None]
    crashes: int


@dataclass
class RayService:
    """The application on a Ray cluster, called from remote tasks.

    `tasks` None: one for each of the model's replicas, and at least two.
    """

    app: str
    tasks: int | None
    in_flight: int
    _ready: bool = field(default=False, repr=False)

    def connect(self) -> None:
        """Raises Refused where there is no cluster or no such application."""
        if self._ready:
            return
        if not ray.is_initialized():
            address = _address()
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level="warning",
                )
            except (ConnectionError, RayError, ValueError, RuntimeError) as error:
                raise Refused(f"no Ray cluster: {one_line(error)}\n{HOW_TO_SERVE}") from None
            finally:
                signal.signal(signal.SIGTERM, on_sigterm)  # ray.init() puts its own in place
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        try:
            _handle(self.app)
        except RayServeException as error:
            raise Refused(f"no application {self.app!r}: {error}\n{HOW_TO_SERVE}") from None
        self._ready = True

    def describe(self) -> PairInfo:
        self.connect()
        response = _handle(self.app).describe.remote()
        try:
            pair: PairInfo = response.result(timeout_s=CONNECT_TIMEOUT_S)
        except TimeoutError:
            response.cancel()
            raise Refused(
                f"application {self.app!r} did not answer in {CONNECT_TIMEOUT_S:g} s; "
                "see `serve status`"
            ) from None
        except (RayError, RayServeException) as error:
            raise Refused(f"application {self.app!r}: {one_line(unwrapped(error))}") from None
        return pair

    def caller(self, work: Work[Any, Any]) -> Caller:
        self.connect()
        return Caller(_handle(self.app), work)

    def answers(
        self, items: Iterator[ItemT], work: Work[ItemT, AnswerT], requests: int
    ) -> Generator[list[AnswerT], None, None]:
        self.connect()
        tasks = self.tasks or max(2, _replicas(self.app))
        # Long chunks keep the window full; no longer than an even share, or one task has it all.
        size = max(1, min(16 * self.in_flight, -(-requests // tasks)))
        # No retries by Ray: a stream begun again comes in another order. Those left are sent anew.
        remote = ray.remote(work_in_task).options(
            num_cpus=TASK_CPUS,
            max_retries=0,
            num_returns="streaming",
            runtime_env={"env_vars": TASK_ENV},
        )
        crashed: deque[tuple[list[ItemT], int]] = deque()
        running: list[_Task] = []
        try:
            while True:
                while len(running) < tasks:
                    chunk, crashes = (
                        crashed.popleft() if crashed else (list(islice(items, size)), 0)
                    )
                    if not chunk:
                        break
                    stream = remote.remote(chunk, self.app, work, self.in_flight)
                    running.append(_Task(stream, dict.fromkeys(chunk), crashes))
                if not running:
                    return
                ready, _ = ray.wait([t.stream for t in running], num_returns=1, timeout=1.0)
                batch: list[AnswerT] = []
                for task in [t for t in running if t.stream in ready]:
                    try:
                        batch += _next(task)
                    except StopIteration:
                        running.remove(task)
                    except RayTaskError as error:
                        cause = unwrapped(error)
                        if isinstance(cause, JobError):
                            raise cause from None
                        raise Stopped(f"in a remote task: {one_line(cause)}") from error
                    except RayError as error:
                        if not isinstance(error, LOST_TASK):
                            raise Stopped(f"no remote task: {one_line(error)}") from error
                        running.remove(task)
                        left = list(task.left)
                        if task.crashes + 1 < MAX_TASK_CRASHES:
                            crashed.append((left, task.crashes + 1))
                        else:
                            batch += [work.without_answer(i, one_line(error)) for i in left]
                yield batch
        finally:
            _cancel(running)


def _address() -> str:
    """Raises Refused where it is not clear which cluster is meant: rows of the wrong pair would
    look like any others."""
    if address := os.environ.get("RAY_ADDRESS"):
        return address
    running = sorted(find_gcs_addresses())
    if len(running) > 1:
        raise Refused(
            f"{len(running)} Ray clusters run here: set RAY_ADDRESS to one of " + ", ".join(running)
        )
    return "auto"


def _next(task: _Task) -> list[Any]:
    answers: list[Any] = ray.get(next(task.stream))
    for answer in answers:
        del task.left[answer.item]
    return answers


def _cancel(running: list[_Task]) -> None:
    """Ends the tasks, and waits a little for it: they die with the driver, and only a task that
    is still there can take its requests back from the replicas."""
    left = [task.stream for task in running]
    for stream in left:
        ray.cancel(stream)
    deadline = time.monotonic() + CANCEL_TIMEOUT_S
    while left and time.monotonic() < deadline:
        for stream in ray.wait(left, num_returns=1, timeout=0.2)[0]:
            try:
                ray.get(next(stream))
            except (StopIteration, RayError):
                left.remove(stream)


def _replicas(app: str) -> int:
    """Running replicas of the pair."""
    deployments = serve.status().applications[served_app.application(app)].deployments
    model = deployments.get(served_app.model_deployment(app))
    return int(model.replica_states.get("RUNNING", 0)) if model else 0
