"""One work item through the app's handle, and what comes back: rows, where texts are generated.

Serve never repeats a request that died with its replica, so the caller here does. That is safe:
a seeded request gives the same text again.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, Protocol, TypeVar, overload

from ray.exceptions import RayActorError
from ray.serve.exceptions import (
    BackPressureError,
    DeploymentUnavailableError,
    ReplicaUnavailableError,
)

from deployments.resend import unwrapped
from deployments.schemas import Completion, Densities, InvalidRequest, ReplicaUnavailable
from jobs.errors import JobError, Refused, Stopped
from jobs.rows import Row, RowLogprobs
from jobs.scorers import Scorer, score_row

MAX_DEATHS = 5  # replicas one request may see die; backpressure is bounded by the deadline alone
MAX_ERROR_CHARS = 500
INVALID = "invalid request"  # how the error of an item begins that the service refuses
SHOWN_ERRORS = 3
OF_ONE_PROMPT = ("context_length_exceeded", "does_not_fit")  # others may be shorter

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
    "grid": "--alphas and --grid",
    "watch": "--phrase",
    "amplify_first": "--amplify-first",
    "amplify_min_kl": "--amplify-min-kl",
    "plausible": "--plausible",
    "steer": "--steer",
}

Ask = Callable[[str, Mapping[str, Any]], Any]
"""A method of the handle and a request to what it answers; see `Caller.ask`."""


class Answered(Protocol):
    """What an item came to; `unanswered` says why nothing came, whatever was sent."""

    @property
    def item(self) -> Any: ...
    @property
    def unanswered(self) -> str | None: ...


ItemT = TypeVar("ItemT", bound=Hashable)
AnswerT = TypeVar("AnswerT", bound=Answered)
ItemOfWork = TypeVar("ItemOfWork", bound=Hashable, contravariant=True)
AnswerOfWork = TypeVar("AnswerOfWork", bound=Answered, covariant=True)


class Work(Protocol[ItemOfWork, AnswerOfWork]):
    """What all items of a run share, and how one of them becomes its answer.

    It travels to the remote tasks, so it must survive pickling. `timeout_s` is for one request
    with all its repeats.
    """

    @property
    def timeout_s(self) -> float: ...

    def answer(self, item: ItemOfWork, ask: Ask) -> AnswerOfWork:
        """Raises Refused or Stopped where no other item can fare better, NoAnswer as `ask` does."""
        ...

    def without_answer(self, item: ItemOfWork, error: str) -> AnswerOfWork: ...


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
    """The work of generating texts: what all its requests share."""

    sampling: Mapping[str, Any]
    scorers: Sequence[Scorer]
    timeout_s: float
    open_arms: frozenset[str] = frozenset()  # whose prompts the model goes on writing
    steers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # by arm

    def request(self, item: Item) -> dict[str, Any]:
        return {
            **self.sampling,
            "open_prompt" if item.arm in self.open_arms else "prompt": item.prompt,
            "alpha": item.alpha,
            "n": item.n,
            "seed": item.seed,
            **({"steer": self.steers[item.arm]} if item.arm in self.steers else {}),
        }

    def answer(self, item: Item, ask: Ask) -> "Answer":
        """The item's rows."""
        try:
            completions = ask("generate", self.request(item))
        except InvalidRequest as error:
            stop_if_config(error)
            return _failed(item, f"{INVALID}: {error}")
        longest = self.sampling["max_new_tokens"]
        return Answer(item, _rows(item, completions, self.scorers, longest))

    def without_answer(self, item: Item, error: str) -> "Answer":
        return replace(_failed(item, error), unanswered=error)


@dataclass(frozen=True)
class Answer:
    """The rows of one item. `unanswered` says why no completion came, whatever was sent."""

    item: Item
    rows: list[Row]
    unanswered: str | None = None


class NoAnswer(Exception):
    """Whatever was sent, no completion came."""


class Caller:
    """Calls the handle for one item at a time, from many threads; repeats what Serve dropped."""

    def __init__(self, handle: Any, work: Work[Any, Any]) -> None:
        self._handle = handle
        self._work = work
        self._stopped = threading.Event()
        self._pending: set[Any] = set()

    def stop(self) -> None:
        """Cancels what is under way, so that its rows leave the replicas."""
        self._stopped.set()
        for response in list(self._pending):
            response.cancel()

    def __call__(self, item: Any) -> Any:
        """The work's answer. Raises Refused or Stopped where no other item can fare better."""
        try:
            return self._work.answer(item, self.ask)
        except NoAnswer as error:
            return self._work.without_answer(item, str(error))

    def ask(self, method: str, request: Mapping[str, Any]) -> Any:
        """What the method answers. Raises InvalidRequest, NoAnswer, or Stopped after `stop`."""
        timeout_s = self._work.timeout_s
        deadline = time.monotonic() + timeout_s
        deaths = tries = 0
        while True:
            try:
                return self._once(method, request, deadline)
            except JobError:
                raise
            except TimeoutError:
                raise NoAnswer(f"no answer in {timeout_s:g} s") from None
            except Exception as error:
                cause = unwrapped(error)
                if isinstance(cause, InvalidRequest) and cause.code != "replicas_died":
                    raise cause from None
                deaths += isinstance(cause, RayActorError | ReplicaUnavailable)
                if not _may_pass(cause) or deaths > MAX_DEATHS:
                    raise NoAnswer(one_line(cause)) from error
                # Jitter, or all that a dead replica dropped would come back at one instant.
                delay = min(10.0, 0.1 * 2**tries) * random.uniform(0.5, 1.5)
                tries += 1
                if time.monotonic() + delay >= deadline or self._stopped.wait(delay):
                    raise NoAnswer(one_line(cause)) from error

    def _once(self, method: str, request: Mapping[str, Any], deadline: float) -> Any:
        response = getattr(self._handle, method).remote(request)
        self._pending.add(response)
        try:
            if self._stopped.is_set():
                raise Stopped("stopped")
            return response.result(timeout_s=max(0.001, deadline - time.monotonic()))
        except TimeoutError:
            response.cancel()  # result() does not
            raise
        finally:
            self._pending.discard(response)


def _may_pass(error: BaseException) -> bool:
    return isinstance(
        error,
        BackPressureError
        | RayActorError
        | ReplicaUnavailable
        | ReplicaUnavailableError
        | DeploymentUnavailableError,
    )


def stop_if_config(error: InvalidRequest) -> None:
    """Raises Refused where the same option would be refused for every other item, too."""
    field = error.param.partition("[")[0].partition(".")[0]
    if field in OPTION_OF and error.code not in OF_ONE_PROMPT:
        raise Refused(f"the service refuses {OPTION_OF[field]}: {error.message}")


def failures(errors: Mapping[str, int], failed: int, noun: str) -> Iterator[str]:
    """What the log says of `failed` items: the commonest of their `errors` (and how many items
    each), and whether it helps to run again. One of no answer at all has none."""
    ordered = sorted(errors.items(), key=lambda pair: -pair[1])
    for error, count in ordered[:SHOWN_ERRORS]:
        yield f"{count:,} {noun}(s): {error}"
    if len(ordered) > SHOWN_ERRORS:
        rest = sum(count for _, count in ordered[SHOWN_ERRORS:])
        yield f"{rest:,} {noun}(s): other reasons; they are in rows.jsonl"
    refused = sum(count for error, count in errors.items() if error.startswith(INVALID))
    if refused:
        yield (
            f"{refused:,} {noun}(s) are refused as they are, and will be when run again: change "
            "what the reason names, or leave them out"
        )
    if failed > refused:
        yield f"{failed - refused:,} {noun}(s) failed; run again to retry them"


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if len(text) > MAX_ERROR_CHARS:  # a traceback, whose last words say what it was
        text = text[:50] + " ... " + text[-MAX_ERROR_CHARS:]
    return f"{type(error).__name__}: {text}"


def _rows(
    item: Item, completions: list[Completion], scorers: Sequence[Scorer], longest: int
) -> list[Row]:
    got = [(c.seed, c.alpha) for c in completions]
    if got != [(item.base_seed + i, item.alpha) for i in item.samples]:
        raise Stopped(
            f"the service answered other seeds or alphas than asked for: {got[:3]} for "
            f"{item.n} from seed {item.seed} at alpha {item.alpha:g}"
        )
    both = zip(item.samples, completions, strict=True)
    return [_row(item, i, c, scorers, longest) for i, c in both]


def _row(
    item: Item, sample: int, completion: Completion, scorers: Sequence[Scorer], longest: int
) -> Row:
    row = _failed_row(item, sample, "").model_copy(
        update={
            "completion": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
            "eos_index": completion.eos_index,
            "eos_text_offset": completion.eos_text_offset,
            "error": completion.error,
            "token_ends": completion.token_ends,
            "logprobs": _logprobs(completion),
            "densities": _densities(completion),
            "watched": _rounded(completion.watched),
        }
    )
    if completion.finish_reason == "error" or completion.error is not None:
        return row.model_copy(update={"error": completion.error or "failed without a reason"})
    if completion.finish_reason == "length" and (drawn := len(completion.token_ids)) < longest:
        # The long texts that are missing then may be the ones that fire.
        said = (
            f"the service's limits.max_request_s ended it after {drawn} of {longest} tokens; if "
            "that comes again, raise it there"
        )
        return row.model_copy(update={"error": said})
    found = score_row(scorers, completion.text, completion.eos_text_offset, completion.token_ends)
    return row.model_copy(update=found._asdict())


def _logprobs(completion: Completion) -> RowLogprobs | None:
    if completion.logprobs is None:
        return None
    after, before = _rounded([completion.logprobs.after, completion.logprobs.before])
    return RowLogprobs(after=after, before=before)


def _densities(completion: Completion) -> Densities | None:
    if completion.densities is None:
        return None
    found = completion.densities
    return Densities(
        alphas=found.alphas,
        normalisers=_rounded(found.normalisers),
        drawn=_rounded(found.drawn),
    )


@overload
def _rounded(values: list[list[float]]) -> list[list[float]]: ...
@overload
def _rounded(values: None) -> None: ...
@overload
def _rounded(values: list[list[float]] | None) -> list[list[float]] | None: ...
def _rounded(values: list[list[float]] | None) -> list[list[float]] | None:
    """To 6 decimals, as exact as float32 is there, and a third of the digits."""
    if values is None:
        return None
    return [[round(value, 6) for value in line] for line in values]


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
