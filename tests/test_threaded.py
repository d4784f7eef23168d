import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest
from models import random_pair
from reference import reference

from lda_core import Engine, EngineConfig, EngineStopped, EngineThread, Request


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    thread = EngineThread(Engine(random_pair(), EngineConfig(max_slots=8)))
    yield thread
    thread.stop(timeout_s=30)


def requests(n: int, new: int = 12) -> list[Request]:
    return [Request((5, 6 + i), seed=i, max_new_tokens=new, ignore_eos=True) for i in range(n)]


def submit(thread: EngineThread, wanted: list[Request]):
    return thread.submit([thread.engine.accept(request) for request in wanted])


def test_futures_from_many_threads_equal_the_reference(thread: EngineThread) -> None:
    wanted = requests(24)
    results: dict[int, list[int]] = {}

    def ask(i: int) -> None:
        results[i] = submit(thread, [wanted[i]])[0].result(timeout=60).token_ids

    askers = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    assert [results[i] for i in range(24)] == [reference(thread.engine.pair, r) for r in wanted]


def test_a_cancelled_future_takes_its_row_out(thread: EngineThread) -> None:
    long, short = submit(thread, [*requests(1, new=120), *requests(1, new=3)])
    waiting = submit(thread, requests(20, new=100))
    short.result(timeout=60)
    assert long.cancel()
    assert all(future.cancel() for future in waiting)
    deadline = time.monotonic() + 30
    while not thread.engine.idle and time.monotonic() < deadline:
        time.sleep(0.005)
    assert thread.engine.idle
    with pytest.raises(CancelledError):
        long.result(timeout=1)
    again = requests(3)
    assert [f.result(timeout=60).token_ids for f in submit(thread, again)] == [
        reference(thread.engine.pair, r) for r in again
    ]


def test_stop_drains_and_then_refuses(thread: EngineThread) -> None:
    futures = submit(thread, requests(12, new=40))
    thread.stop(timeout_s=60)
    assert all(len(future.result(timeout=0).token_ids) == 40 for future in futures)
    with pytest.raises(EngineStopped):
        submit(thread, requests(1))


def test_a_failing_step_fails_every_future_and_the_check(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = iter(range(3))
    original = thread.engine.step

    def fail_later() -> object:
        if next(steps, None) is None:
            raise RuntimeError("device lost")
        return original()

    monkeypatch.setattr(thread.engine, "step", fail_later)
    thread.check(stuck_after_s=60)
    futures = submit(thread, requests(20))
    for future in futures:
        with pytest.raises(EngineStopped, match="device lost"):
            future.result(timeout=30)
    with pytest.raises(EngineStopped, match="device lost"):
        thread.check(stuck_after_s=60)
    with pytest.raises(EngineStopped):
        submit(thread, requests(1))


def test_a_stuck_step_is_noticed_and_an_idle_engine_is_not_stuck(
    thread: EngineThread, monkeypatch: pytest.MonkeyPatch
) -> None:
    time.sleep(3.5)  # idle for longer than the limit below
    thread.check(stuck_after_s=3.0)
    release = threading.Event()
    original = thread.engine.step
    monkeypatch.setattr(thread.engine, "step", lambda: (release.wait(30), original())[1])
    future = submit(thread, requests(1))[0]
    with pytest.raises(EngineStopped, match="no step"):
        for _ in range(1000):
            time.sleep(0.01)
            thread.check(stuck_after_s=0.2)
    release.set()
    assert len(future.result(timeout=30).token_ids) == 12
