"""Where the time of a step goes."""

import time
from collections import defaultdict

import torch


class StageClock:
    """Adds up seconds per stage: set `engine.clock`, run, read `seconds` and `steps`.

    Stages: prefill, after, before (a stacked pair's single pass counts as after),
    mix_and_sample, bookkeeping, score. On a GPU each lap waits for the device, so a clocked run is
    slower than one without.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.steps = 0
        self._cuda = device.type == "cuda"
        self._since = time.perf_counter()

    def start(self) -> None:
        """What has passed since the last lap belongs to no stage."""
        self._since = time.perf_counter()

    def lap(self, stage: str) -> None:
        """The time since the last lap belongs to `stage`."""
        if self._cuda:
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[stage] += now - self._since
        self._since = now
