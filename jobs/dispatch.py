"""From work items to rows: requests through the app's handle, from Ray remote tasks.

    items --chunks--> remote tasks (0.1 CPU, `tasks` at a time)
                        --window--> handle calls (`in_flight` at a time each) --> rows

Serve never repeats a request that died with its replica, so the caller here does. That is safe:
a seeded request gives the same text again.
"""

import json
import os
import random
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from functools import cache
from hashlib import sha256
from itertools import islice
from typing import Any, Protocol

import ray
from ray import serve
from ray.exceptions import (
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    RayServeException,
    ReplicaUnavailableError,
)

from deployments.schemas import Completion, InvalidRequest, PairInfo
from jobs.errors import JobError, Refused, Stopped
from jobs.rows import Row
from jobs.scorers import Scorer, ScorerError, score_all

TASK_CPUS = 0.1  # small: a 1-CPU task could take a dead replica's CPU, and both wait for ever
MAX_DEATHS = 5  # replicas one request may see die; backpressure is bounded by the deadline alone
MAX_TASK_CRASHES = 3
GIVE_UP_AFTER = 100  # requests in a row without an answer
LOST_TASK = (WorkerCrashedError, NodeDiedError, OutOfMemoryError, ObjectLostError)
CONNECT_TIMEOUT_S = 60.0
CANCEL_TIMEOUT_S = 2.5  # `ray job stop` kills after 3
MAX_ERROR_CHARS = 500

# Fields of a request that come from the command line, and the option each comes from: refused
# once, they are refused for every prompt.
OPTION_OF = {
    "alpha": "--alphas",
    "n": "--samples",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "max_new_tokens": "--max-new-tokens",
    "ignore_eos": "--ignore-eos",
    "prompt_format": "--prompt-format",
    "system_prompt": "--system-prompt",
}


@dataclass(frozen=True)
class Item:
    """One request: samples `first` to `first + n - 1` of one prompt of one arm at one alpha."""

    arm: str
    prompt_id: str
    prompt: str
    alpha: float
    first: int
    n: int
    base_seed: int

    @property
    def seed(self) -> int:
        return self.base_seed + self.first

    @property
    def samples(self) -> range:
        return range(self.first, self.first + self.n)


def seed_of(*parts: object) -> int:
    """52 bits of sha256 of the parts: with a sample number added still exact in any JSON reader."""
    digest = sha256(json.dumps(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 12


@dataclass(frozen=True)
class Generation:
    """What all requests of a run share. `timeout_s` is for one request with all its repeats."""

    sampling: Mapping[str, Any]
    scorers: Sequence[Scorer]
    timeout_s: float

    def request(self, item: Item) -> dict[str, Any]:
        return {
            **self.sampling,
            "prompt": item.prompt,
            "alpha": item.alpha,
            "n": item.n,
            "seed": item.seed,
        }


@dataclass(frozen=True)
class Answer:
    """The rows of one item. `unanswered` says why no completion came, whatever was sent."""

    item: Item
    rows: list[Row]
    unanswered: str | None = None


class Service(Protocol):
    """What a run needs of the application; the seam for the tests' fake."""

    def describe(self) -> PairInfo: ...

    def answers(
        self, items: Iterator[Item], generation: Generation, requests: int
    ) -> Generator[list[Answer], None, None]:
        """One answer per item, in any order; an empty list where a second passed without one.

        `requests`: about how many items there are.
        """
        ...


def answered(batches: Iterable[list[Answer]]) -> Iterator[list[Answer]]:
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


# -- one request ------------------------------------------------------------------------------


class Caller:
    """Calls the handle for one item at a time, from many threads; repeats what Serve dropped."""

    def __init__(self, handle: Any, generation: Generation) -> None:
        self._handle = handle
        self._generation = generation
        self._stopped = threading.Event()
        self._pending: set[Any] = set()

    def stop(self) -> None:
        """Cancels what is under way, so that its rows leave the replicas."""
        self._stopped.set()
        for response in list(self._pending):
            response.cancel()

    def __call__(self, item: Item) -> Answer:
        """Raises Refused or Stopped where no other item can fare better."""
        deadline = time.monotonic() + self._generation.timeout_s
        deaths = tries = 0
        while True:
            try:
                completions = self._generate(item, deadline)
                return Answer(item, _rows(item, completions, self._generation.scorers))
            except JobError:
                raise
            except TimeoutError:
                return _unanswered(item, f"no answer in {self._generation.timeout_s:g} s")
            except Exception as error:
                cause = _cause(error)
                if isinstance(cause, InvalidRequest):
                    _stop_if_config(cause)
                    return _failed(item, f"invalid request: {cause}")
                deaths += isinstance(cause, RayActorError)
                if not _may_pass(cause) or deaths > MAX_DEATHS:
                    return _unanswered(item, _one_line(cause))
                # Jitter, or all that a dead replica dropped would come back at one instant.
                delay = min(10.0, 0.1 * 2**tries) * random.uniform(0.5, 1.5)
                tries += 1
                if time.monotonic() + delay >= deadline or self._stopped.wait(delay):
                    return _unanswered(item, _one_line(cause))

    def _generate(self, item: Item, deadline: float) -> list[Completion]:
        response = self._handle.generate.remote(self._generation.request(item))
        self._pending.add(response)
        try:
            if self._stopped.is_set():
                raise Stopped("stopped")
            result: list[Completion] = response.result(
                timeout_s=max(0.001, deadline - time.monotonic())
            )
            return result
        except TimeoutError:
            response.cancel()  # result() does not
            raise
        finally:
            self._pending.discard(response)


def _cause(error: BaseException) -> BaseException:
    """What went wrong in the service, without the wrapping of the way back."""
    while isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error = error.cause
    return error


def _may_pass(error: BaseException) -> bool:
    return isinstance(
        error,
        BackPressureError | RayActorError | ReplicaUnavailableError | DeploymentUnavailableError,
    )


def _stop_if_config(error: InvalidRequest) -> None:
    if error.param in OPTION_OF and error.code != "context_length_exceeded":
        raise Refused(f"the service refuses {OPTION_OF[error.param]}: {error.message}")


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > MAX_ERROR_CHARS:  # a traceback, whose last words say what it was
        text = text[:50] + " ... " + text[-MAX_ERROR_CHARS:]
    return f"{type(error).__name__}: {text}"


def _rows(item: Item, completions: list[Completion], scorers: Sequence[Scorer]) -> list[Row]:
    got = [(c.seed, c.alpha) for c in completions]
    if got != [(item.base_seed + i, item.alpha) for i in item.samples]:
        raise Stopped(
            f"the service answered other seeds or alphas than asked for: {got[:3]} for "
            f"{item.n} from seed {item.seed} at alpha {item.alpha:g}"
        )
    return [_row(item, i, c, scorers) for i, c in zip(item.samples, completions, strict=True)]


def _row(item: Item, sample: int, completion: Completion, scorers: Sequence[Scorer]) -> Row:
    row = _failed_row(item, sample, "").model_copy(
        update={
            "completion": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "eos_index": completion.eos_index,
            "error": completion.error,
        }
    )
    if completion.finish_reason == "error" or completion.error is not None:
        return row.model_copy(update={"error": completion.error or "failed without a reason"})
    try:
        scores = score_all(scorers, completion.text_before_eos)
        late = score_all(scorers, completion.text_after_eos)
    except ScorerError as error:
        return row.model_copy(update={"error": str(error)})
    return row.model_copy(
        update={
            "activated": any(s.fired for s in scores.values()),
            "activated_after_eos": any(s.fired for s in late.values()),
            "scores": scores,
        }
    )


def _failed_row(item: Item, sample: int, error: str) -> Row:
    return Row(
        arm=item.arm,
        prompt_id=item.prompt_id,
        prompt=item.prompt,
        alpha=item.alpha,
        sample=sample,
        seed=item.base_seed + sample,
        completion=None,
        token_ids=[],
        finish_reason="error",
        eos_index=None,
        activated=None,
        activated_after_eos=None,
        scores={},
        error=error,
    )


def _failed(item: Item, error: str) -> Answer:
    return Answer(item, [_failed_row(item, i, error) for i in item.samples])


def _unanswered(item: Item, error: str) -> Answer:
    return replace(_failed(item, error), unanswered=error)


# -- many requests ----------------------------------------------------------------------------


def work(items: Iterable[Item], caller: Caller, in_flight: int) -> Iterator[list[Answer]]:
    """Answers as they come, with at most `in_flight` requests under way; takes items lazily."""
    pool = ThreadPoolExecutor(in_flight)
    window: set[Future[Answer]] = set()
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


def _some(window: set[Future[Answer]]) -> tuple[set[Future[Answer]], set[Future[Answer]]]:
    """Those that are done, at least one, and the others."""
    while True:
        # Waiting for ever, a task would not notice that Ray cancels it.
        done, others = wait(window, timeout=0.5, return_when=FIRST_COMPLETED)
        if done:
            return done, others


def work_in_task(
    chunk: list[Item], app: str, generation: Generation, in_flight: int
) -> Iterator[list[Answer]]:
    yield from work(chunk, Caller(_handle(app), generation), in_flight)


@cache
def _handle(app: str) -> Any:
    """One per worker process: making it takes 50 ms, and it keeps the list of replicas."""
    return serve.get_app_handle(app)


@dataclass
class _Task:
    stream: Any  # of lists of answers
    left: dict[Item, None]
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
            on_sigterm = signal.getsignal(signal.SIGTERM)
            try:
                ray.init(
                    address=os.environ.get("RAY_ADDRESS", "auto"),
                    log_to_driver=False,
                    logging_level="warning",
                )
            except (ConnectionError, RayError, ValueError, RuntimeError) as error:
                raise Refused(f"no Ray cluster: {_one_line(error)}\n{HOW_TO_SERVE}") from None
            finally:
                signal.signal(signal.SIGTERM, on_sigterm)  # ray.init() puts its own in place
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
            raise Refused(f"application {self.app!r}: {_one_line(_cause(error))}") from None
        return pair

    def answers(
        self, items: Iterator[Item], generation: Generation, requests: int
    ) -> Generator[list[Answer], None, None]:
        self.connect()
        tasks = self.tasks or max(2, _replicas(self.app))
        # Long chunks keep the window full; no longer than an even share, or one task has it all.
        size = max(1, min(16 * self.in_flight, -(-requests // tasks)))
        # No retries by Ray: a stream begun again comes in another order. Those left are sent anew.
        remote = ray.remote(work_in_task).options(
            num_cpus=TASK_CPUS, max_retries=0, num_returns="streaming"
        )
        crashed: deque[tuple[list[Item], int]] = deque()
        running: list[_Task] = []
        try:
            while True:
                while len(running) < tasks:
                    chunk, crashes = (
                        crashed.popleft() if crashed else (list(islice(items, size)), 0)
                    )
                    if not chunk:
                        break
                    stream = remote.remote(chunk, self.app, generation, self.in_flight)
                    running.append(_Task(stream, dict.fromkeys(chunk), crashes))
                if not running:
                    return
                ready, _ = ray.wait([t.stream for t in running], num_returns=1, timeout=1.0)
                batch: list[Answer] = []
                for task in [t for t in running if t.stream in ready]:
                    try:
                        batch += _next(task)
                    except StopIteration:
                        running.remove(task)
                    except RayTaskError as error:
                        cause = _cause(error)
                        if isinstance(cause, JobError):
                            raise cause from None
                        raise Stopped(f"in a remote task: {_one_line(cause)}") from error
                    except RayError as error:
                        if not isinstance(error, LOST_TASK):
                            raise Stopped(f"no remote task: {_one_line(error)}") from error
                        running.remove(task)
                        left = list(task.left)
                        if task.crashes + 1 < MAX_TASK_CRASHES:
                            crashed.append((left, task.crashes + 1))
                        else:
                            batch += [_unanswered(i, _one_line(error)) for i in left]
                yield batch
        finally:
            _cancel(running)


def _next(task: _Task) -> list[Answer]:
    answers: list[Answer] = ray.get(next(task.stream))
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
    """Running replicas of the application's largest deployment: the model's."""
    deployments = serve.status().applications[app].deployments.values()
    return max(int(d.replica_states.get("RUNNING", 0)) for d in deployments)


HOW_TO_SERVE = "start the service first: serve run serve_config.yaml"
