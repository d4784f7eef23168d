"""A client's requests by handle, inside the cluster: no HTTP, and tensors as they are."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from deployments.resend import unwrapped
from deployments.schemas import InvalidRequest, PairInfo, Piece
from jobs.call import Caller, NoAnswer, one_line
from jobs.client_capture import from_tensors
from jobs.client_transport import Unanswered
from jobs.dispatch import RayService

T = TypeVar("T")
_END = object()


def connected(app: str) -> Any:
    """The handle of an application of the running cluster. Raises Refused without one."""
    from ray import serve

    RayService(app, tasks=None, in_flight=1).connect()
    return serve.get_app_handle(app)


@dataclass(frozen=True)
class _Patience:
    """All that a caller's `ask` wants to know of its work."""

    timeout_s: float


class HandleTransport:
    """Asks again as the jobs do: see `jobs.call.Caller`. Each call waits in a thread, so that it
    works in any event loop."""

    def __init__(self, handle: Any, in_flight: int, timeout_s: float) -> None:
        self._handle, self._timeout_s = handle, timeout_s
        self._threads = ThreadPoolExecutor(in_flight, "lda-client")

    async def ask(self, method: str, request: Mapping[str, Any]) -> Any:
        caller = Caller(self._handle, cast(Any, _Patience(self._timeout_s)))
        try:
            answer = await self._in_thread(lambda: caller.ask(method, request))
        except NoAnswer as error:
            raise Unanswered(str(error)) from error
        except asyncio.CancelledError:
            caller.stop()  # the rows leave the replica, and the thread ends
            raise
        return [from_tensors(one) for one in answer] if method == "capture" else answer

    async def describe(self, pair: str | None) -> PairInfo:
        def ask() -> PairInfo:
            response = self._handle.describe.remote(pair)
            info: PairInfo = response.result(timeout_s=self._timeout_s)
            return info

        try:
            return await self._in_thread(ask)
        except Exception as error:
            raise _told(error) from error

    async def stream(
        self, request: Mapping[str, Any], alphas: list[float]
    ) -> AsyncGenerator[Piece, None]:
        """The pieces of all alphas as they come, each alpha a request of its own."""
        method = self._handle.options(stream=True).stream
        queue: asyncio.Queue[Any] = asyncio.Queue()
        answers = [method.remote({**request, "alpha": alpha}) for alpha in alphas]

        async def drain(answer: Any) -> None:
            try:
                while (pieces := await self._in_thread(partial(next, answer, None))) is not None:
                    for piece in pieces:
                        queue.put_nowait(piece)
                queue.put_nowait(_END)
            except Exception as error:
                queue.put_nowait(error)

        tasks = [asyncio.ensure_future(drain(answer)) for answer in answers]
        going = len(tasks)
        try:
            while going:
                piece = await queue.get()
                if isinstance(piece, Exception):
                    raise _told(piece)
                if piece is _END:
                    going -= 1
                else:
                    yield piece
        finally:
            if going:
                for answer in answers:
                    answer.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def aclose(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, call: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)


def _told(error: Exception) -> Exception:
    cause = unwrapped(error)
    return cause if isinstance(cause, InvalidRequest) else Unanswered(one_line(cause))
