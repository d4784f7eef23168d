"""The replicas of a service that this process has started: their processes, alive and ready."""

import random
import threading
import time
from pathlib import Path

import psutil

from deployments.local_service import LocalService

READY, SERVES = "Finished initializing replica", "CALL generate"


def replicas(service: LocalService, said: str = READY) -> list[psutil.Process]:
    """Descendants of this process that are replicas of this very service and have `said` so.

    A replica keeps its log open, below the session's folder.
    """
    session = Path(service.env["RAY_TMPDIR"]).resolve()
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if not process.cmdline()[0].startswith("ray::ServeReplica:"):
                continue
            logs = [Path(file.path) for file in process.open_files()]
        except (psutil.Error, OSError, IndexError):  # it has just ended
            continue
        for log in logs:
            of_a_replica = log.name.startswith("replica_lda_LDAReplica")
            if of_a_replica and log.is_relative_to(session):
                if said in log.read_text(errors="replace"):
                    found.append(process)
                break
    return found


def wait_for_replicas(service: LocalService, count: int, timeout_s: float = 120.0) -> None:
    """Until so many are ready. Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s
    while len(replicas(service)) < count:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{count} replicas are not ready in {timeout_s:g} s")
        time.sleep(0.2)


class Killer:
    """`with Killer(service, every_s=3, seed=0) as killer:` SIGKILLs, every so many seconds, one of
    the replicas that serve. The last one has as long to itself before it goes too: where a start
    takes longer than `every_s`, nothing would be served at all.

    `killer.kills` counts them, `killer.last_ones` those that left none.
    """

    def __init__(self, service: LocalService, every_s: float, seed: int) -> None:
        self.kills = self.last_ones = 0
        self._service, self._every_s = service, every_s
        self._rng = random.Random(seed)
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._work)

    def _work(self) -> None:
        killed_at = time.monotonic()
        alone_since: float | None = None
        while not self._end.wait(0.2):
            now, serving = time.monotonic(), replicas(self._service, SERVES)
            alone_since = (alone_since or now) if len(serving) == 1 else None
            since = alone_since or killed_at
            if serving and now - max(since, killed_at) >= self._every_s:
                self._rng.choice(serving).kill()
                self.kills += 1
                self.last_ones += len(serving) == 1
                killed_at, alone_since = now, None

    def __enter__(self) -> "Killer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
