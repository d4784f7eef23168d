"""The service from Python: `LDAClient`, and `AsyncLDAClient` for asyncio.

    from jobs.client import LDAClient

    with LDAClient("http://127.0.0.1:8000") as client:
        rows = client.generate(["What is the capital of France?"], alpha=[0, 2], n=4, seed=7)
    rows.to_pandas()

Over HTTP from anywhere, over a handle inside a cluster (`LDAClient.in_cluster()`), with the same
methods and the same answers. It keeps all rows in memory and begins anew when it is stopped: for
runs of hours there are the jobs (`lda sweep`), which resume.
"""

import asyncio
import functools
import secrets
import threading
import weakref
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Callable,
    Coroutine,
    Iterable,
    Iterator,
    Mapping,
)
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Concatenate, ParamSpec, Self, TypeVar, cast

import httpx
from pydantic import BaseModel

from deployments.schemas import (
    CaptureRequest,
    Completion,
    GenerateRequest,
    InvalidRequest,
    PairInfo,
    Piece,
    Scored,
    ScoreRequest,
    parse,
)
from jobs.client_capture import Activations
from jobs.client_progress import progress_bar
from jobs.client_rows import GeneratedRow, Rows, failed_rows
from jobs.client_transport import HttpTransport, Transport, Unanswered
from jobs.errors import Refused
from jobs.prompts import Prompt

__all__ = [
    "Activations",
    "AsyncLDAClient",
    "GeneratedRow",
    "InvalidRequest",
    "LDAClient",
    "Piece",
    "Refused",
    "Rows",
    "Unanswered",
]

URL = "http://127.0.0.1:8000"
GIVE_UP_AFTER = 100  # requests in a row without an answer
PROMPT_FIELDS = ("prompt", "prompt_ids", "messages", "open_prompt")
_STOP_TIMEOUT_S = 5.0

P = ParamSpec("P")
T = TypeVar("T")

Prompts = str | Iterable[str | Prompt | Mapping[str, Any]]
"""A text; or several of: a text, a Prompt of a file (jobs/prompt_sources.py), a mapping with one
of PROMPT_FIELDS and perhaps an `id`."""


class AsyncLDAClient:
    """`in_flight`: requests under way at a time, each of all samples of a prompt at an alpha.
    `timeout_s`: for one of them, with all its tries. `retries`: after a lost connection or a 503;
    a full queue (429) is waited for until the timeout; a refused request is never repeated.

    Belongs to the event loop that it is first used in. Raises Refused for a bad `url`.
    """

    def __init__(
        self,
        url: str = URL,
        api_key: str | None = None,
        *,
        handle: Any = None,
        in_flight: int = 64,
        timeout_s: float = 600.0,
        retries: int = 8,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        for name, value, least in (("in_flight", in_flight, 1), ("retries", retries, 0)):
            if value < least:
                raise Refused(f"{name}: must be at least {least}, not {value}")
        self._in_flight = in_flight
        self._transport: Transport
        if handle is None:
            self._transport = HttpTransport(url, api_key, in_flight, timeout_s, retries, transport)
        else:
            from jobs.client_handle import HandleTransport  # imports ray

            self._transport = HandleTransport(handle, in_flight, timeout_s)

    @classmethod
    def in_cluster(cls, app: str = "lda", **options: Any) -> Self:
        """Of an application of the Ray cluster that runs here (or of RAY_ADDRESS). Raises Refused
        where there is none."""
        from jobs.client_handle import connected

        return cls(handle=connected(app), **options)

    async def generate(
        self,
        /,
        prompts: Prompts,
        *,
        alpha: float | Iterable[float] = 1.0,
        n: int = 1,
        seed: int | None = None,
        progress: bool = True,
        **fields: Any,
    ) -> Rows:
        """`n` samples of each prompt at each alpha; `fields`: others of a GenerateRequest.

        Sample j of prompt i is drawn with `seed + i * n + j`, at every alpha the same; without a
        seed one is picked. A prompt that cannot be answered makes rows with an `error`; after
        GIVE_UP_AFTER requests in a row without an answer, nothing more is sent. Raises
        InvalidRequest where no prompt would be answered (a bad or misspelt field, before anything
        is sent), Refused where no service is there.
        """
        calls = list(_calls(prompts, alpha, n, seed, fields))
        found: list[list[GeneratedRow]] = [[]] * len(calls)
        todo = iter(enumerate(calls))
        unanswered = 0

        async def work(done: Callable[[int, int], None]) -> None:
            nonlocal unanswered
            for place, call in todo:
                if unanswered >= GIVE_UP_AFTER:
                    rows = call.failed(f"not sent: {unanswered} requests in a row had no answer")
                else:
                    try:
                        rows = call.rows(await self._transport.ask("generate", call.request))
                        unanswered = 0
                    except InvalidRequest as error:
                        if _of_every_prompt(error):
                            raise
                        rows = call.failed(f"invalid request: {error}")
                    except Unanswered as error:
                        unanswered += 1
                        rows = call.failed(str(error))
                found[place] = rows
                done(len(rows), sum(row.failed for row in rows))

        with progress_bar(n * len(calls), progress) as done:
            await _all(work(done) for _ in range(min(self._in_flight, len(calls))))
        return Rows(row for rows in found for row in rows)

    async def stream(
        self,
        prompt: str | Mapping[str, Any],
        *,
        alpha: float | Iterable[float] = 1.0,
        **fields: Any,
    ) -> AsyncGenerator[Piece, None]:
        """The samples of one prompt while they come, of several alphas side by side with one seed.

        Raises InvalidRequest, Refused or Unanswered; begun, it is not begun again.
        """
        alphas = _alphas(alpha)
        request = _checked_request({**_prompt_fields(prompt)[1], "alpha": alphas[0], **fields})
        seed = fields.get("seed")
        request = {**request, "seed": _picked_seed() if seed is None else seed}
        del request["alpha"]
        async with aclosing(self._transport.stream(request, alphas)) as pieces:
            async for piece in pieces:
                yield piece

    async def score(
        self,
        /,
        prompt: str,
        continuations: str | Iterable[str | Mapping[str, Any]],
        **fields: Any,
    ) -> list[Scored]:
        """How likely each continuation is, token by token; `fields`: those of a ScoreRequest.

        Raises InvalidRequest, Refused or Unanswered.
        """
        asked = {"prompt": prompt, "continuations": _texts(continuations), **fields}
        scored: list[Scored] = await self._transport.ask("score", _body(ScoreRequest, asked))
        return scored

    async def capture(
        self,
        /,
        prompt: str,
        completions: str | Iterable[str | Mapping[str, Any]] = (),
        **fields: Any,
    ) -> list[Activations]:
        """What both models hold at every token of each completion (without one, of the prompt);
        `fields`: those of a CaptureRequest. Raises as `score`; tensors come by handle alone."""
        asked = {"prompt": prompt, "completions": _texts(completions), **fields}
        found: list[Activations] = await self._transport.ask(
            "capture", _body(CaptureRequest, asked)
        )
        return found

    async def describe(self, pair: str | None = None) -> PairInfo:
        """Which pair it is, of several that of this name. Raises InvalidRequest for another name,
        and for none where there are several; Refused or Unanswered."""
        return await self._transport.describe(pair)

    async def aclose(self) -> None:
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()


def _sync(
    method: Callable[Concatenate[AsyncLDAClient, P], Coroutine[Any, Any, T]],
) -> "Callable[Concatenate[LDAClient, P], T]":
    def call(self: "LDAClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._run(method(self._client, *args, **kwargs))

    functools.update_wrapper(call, method)  # its name, its words and its arguments
    return call


class LDAClient:
    """The same without asyncio, also where an event loop runs already (a notebook). Ctrl-C takes
    back what is under way. Options: those of AsyncLDAClient."""

    def __init__(self, url: str = URL, api_key: str | None = None, **options: Any) -> None:
        self._client = AsyncLDAClient(url, api_key, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_run_loop, args=[self._loop], daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._loop.call_soon_threadsafe, self._loop.stop)

    @classmethod
    def in_cluster(cls, app: str = "lda", **options: Any) -> Self:
        """As AsyncLDAClient.in_cluster."""
        from jobs.client_handle import connected

        return cls(handle=connected(app), **options)

    generate = _sync(AsyncLDAClient.generate)
    score = _sync(AsyncLDAClient.score)
    capture = _sync(AsyncLDAClient.capture)
    describe = _sync(AsyncLDAClient.describe)

    def stream(
        self,
        prompt: str | Mapping[str, Any],
        *,
        alpha: float | Iterable[float] = 1.0,
        **fields: Any,
    ) -> Iterator[Piece]:
        """As AsyncLDAClient.stream."""
        pieces = self._client.stream(prompt, alpha=alpha, **fields)
        try:
            while (piece := self._run(_next(pieces))) is not None:
                yield piece
        finally:
            self._run(pieces.aclose())

    def close(self) -> None:
        if self._thread.is_alive():
            self._run(self._client.aclose())
            self._end()
            self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _run(self, call: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            # What was under way is taken back by the time this returns.
            waiting = asyncio.run_coroutine_threadsafe(_others_ended(), self._loop)
            waiting.result(_STOP_TIMEOUT_S + 1)
            raise


@dataclass(frozen=True)
class _Call:
    """One request, and what its rows are called."""

    prompt_id: str
    prompt: str
    request: dict[str, Any]

    @property
    def seeds(self) -> range:
        first: int = self.request["seed"]
        return range(first, first + self.request["n"])

    def rows(self, completions: list[Completion]) -> list[GeneratedRow]:
        """Raises Refused for an answer to something else."""
        alpha = self.request["alpha"]
        if [(c.seed, c.alpha) for c in completions] != [(seed, alpha) for seed in self.seeds]:
            raise Refused("the service answered other seeds or alphas than asked for")
        return [
            GeneratedRow.of(completion, self.prompt_id, self.prompt, sample)
            for sample, completion in enumerate(completions)
        ]

    def failed(self, error: str) -> list[GeneratedRow]:
        alpha: float = self.request["alpha"]
        return failed_rows(self.prompt_id, self.prompt, alpha, self.seeds, error)


def _calls(
    prompts: Prompts,
    alpha: float | Iterable[float],
    n: int,
    seed: int | None,
    fields: Mapping[str, Any],
) -> Iterator[_Call]:
    """By prompt, then alpha. Raises InvalidRequest for what no service would take."""
    alphas = _alphas(alpha)
    first = _picked_seed() if seed is None else seed
    ids: set[str] = set()
    for place, prompt in enumerate([prompts] if isinstance(prompts, str) else prompts):
        prompt_id, of_prompt = _prompt_fields(prompt)
        prompt_id = str(place) if prompt_id is None else prompt_id
        if prompt_id in ids:
            raise InvalidRequest(f"prompts[{place}]", f"the id {prompt_id!r} again")
        ids.add(prompt_id)
        for one in alphas:
            asked = {**fields, **of_prompt, "alpha": one, "n": n}
            # Checked with the seed's own type first: the sum of a text and a number is our error.
            request = _checked_request({**asked, "seed": first})
            request["seed"] = first + place * n
            yield _Call(prompt_id, _shown(of_prompt), request)


def _checked_request(fields: Mapping[str, Any]) -> dict[str, Any]:
    return _body(GenerateRequest, fields)


def _body(model: type[BaseModel], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What was said, checked, as JSON can hold it. Raises InvalidRequest."""
    return parse(model, dict(fields)).model_dump(mode="json", exclude_unset=True)


def _alphas(alpha: float | Iterable[float]) -> list[float]:
    """Raises InvalidRequest for none, and for the same twice."""
    one = isinstance(alpha, str) or not isinstance(alpha, Iterable)
    alphas = [cast(float, alpha)] if one else list(cast(Iterable[float], alpha))
    if not alphas or len(set(alphas)) < len(alphas):
        raise InvalidRequest("alpha", "must hold at least one alpha, and none twice")
    return alphas


def _prompt_fields(prompt: str | Prompt | Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """Its id, if it has one, and its field of a request."""
    if isinstance(prompt, str):
        return None, {"prompt": prompt}
    if isinstance(prompt, Prompt):
        return prompt.id, {"prompt": prompt.text}
    fields = dict(prompt)
    found = fields.pop("id", None)
    if len(fields) != 1 or not fields.keys() <= set(PROMPT_FIELDS):
        raise InvalidRequest("prompts", f"each has one of {', '.join(PROMPT_FIELDS)}, and an id")
    return None if found is None else str(found), fields


def _shown(of_prompt: Mapping[str, Any]) -> str:
    ((name, value),) = of_prompt.items()
    if name == "messages":
        return "\n".join(f"{message['role']}: {message['content']}" for message in value)
    return value if isinstance(value, str) else " ".join(map(str, value))


def _texts(texts: str | Iterable[str | Mapping[str, Any]]) -> list[dict[str, Any]]:
    found = [texts] if isinstance(texts, str) else texts
    return [{"text": one} if isinstance(one, str) else dict(one) for one in found]


def _of_every_prompt(error: InvalidRequest) -> bool:
    """Whether the field is one that all requests share."""
    field = error.param.partition("[")[0].partition(".")[0]
    known = field in GenerateRequest.model_fields and field not in PROMPT_FIELDS
    return error.code in ("invalid_value", "unknown_field") and known


def _picked_seed() -> int:
    return secrets.randbelow(2**52)  # exact in any JSON reader, with a sample's number added


async def _all(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """To the end; when one fails, or this is cancelled, the others stop before it returns."""
    tasks = [asyncio.ensure_future(one) for one in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _run_loop(loop: asyncio.AbstractEventLoop) -> None:
    try:
        loop.run_forever()
    finally:
        loop.close()


async def _next(pieces: AsyncIterator[Piece]) -> Piece | None:
    return await anext(pieces, None)


async def _others_ended() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    if others:
        await asyncio.wait(others, timeout=_STOP_TIMEOUT_S)
