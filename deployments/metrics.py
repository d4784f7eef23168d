"""What a replica counts, for Prometheus (Ray exports it, tagged with deployment and replica)."""

from dataclasses import asdict

from ray.serve import metrics

from lda_core import Engine
from lda_core.bandwidth import copy_bandwidth
from lda_core.memory import GIB

_TOTALS = {
    "steps": "decode steps of the pair",
    "tokens": "tokens drawn",
    "prefix_lookups": "prompts that new rows needed, one for all rows that join together",
    "prefix_hits": "of these, the ones that did not have to be read again",
    "prefilled_tokens": "prompt tokens read",
    "scored_tokens": "tokens read and not drawn",
    "captured_tokens": "tokens whose activations were captured",
    "out_of_memory": "times that the device had no memory for a step",
    "ties": "draws that were too close to call and decided by a pass of their row alone",
    "overdue": "rows that their deadline ended, or that were still waiting at it",
    "busy_s": "seconds that steps took, prompts read in them too",
    "floor_bytes": "bytes that steps had to read at least: weights, live keys and values once",
}
_NAMES = {"busy_s": "lda_step_seconds"}  # others: lda_<total>
_NOW = {
    "lda_rows": "rows that decode",
    "lda_waiting_rows": "rows that wait for a slot",
    "lda_slots": "rows that can decode at once",
    "lda_kv_tokens": "tokens of keys and values that live rows may need together",
    "lda_copy_bytes_per_s": "what a copy within the device's memory reads and writes",
    "lda_floor_fraction": "of the time of the last steps, what reading their floor_bytes at that "
    "speed would take",
}
# Small, beside the models, but more than caches hold.
_COPIED_MEGABYTES = 64


class EngineMetrics:
    """Counters `lda_<total>` of one engine, and gauges of what is so now.

    `update` adds what has come since the last time: called when requests end and every few seconds.
    Ray forgets a gauge that is not set again.
    """

    def __init__(self, engine: Engine, noise_floor: dict[float, float]) -> None:
        self._engine = engine
        self._seen: dict[str, float] = dict.fromkeys(_TOTALS, 0)
        self._counters = {
            name: metrics.Counter(_NAMES.get(name, f"lda_{name}"), description=text)
            for name, text in _TOTALS.items()
        }
        self._gauges = {name: metrics.Gauge(name, description=text) for name, text in _NOW.items()}
        self._bytes_per_s = copy_bandwidth(engine.pair.device, _COPIED_MEGABYTES)
        self._fraction = 0.0
        self._noise_floor = noise_floor
        self._noise = metrics.Gauge(
            "lda_noise_floor",
            description="largest change of a mixed logit in another batch",
            tag_keys=("alpha",),
        )
        self.update()

    def update(self) -> None:
        engine = self._engine
        now = asdict(engine.stats)
        if (seconds := now["busy_s"] - self._seen["busy_s"]) > 0:
            read = now["floor_bytes"] - self._seen["floor_bytes"]
            self._fraction = read / self._bytes_per_s / seconds
        states = (
            *(engine.live_rows, engine.waiting_rows, engine.config.max_slots, engine.kv_tokens),
            *(self._bytes_per_s, self._fraction),
        )
        for gauge, value in zip(self._gauges.values(), states, strict=True):
            gauge.set(value)
        for alpha, change in self._noise_floor.items():
            self._noise.set(change, tags={"alpha": f"{alpha:g}"})
        for name, counter in self._counters.items():
            if new := now[name] - self._seen[name]:
                counter.inc(new)
                self._seen[name] = now[name]


def memory_words(engine: Engine) -> str:
    """One line for the log: where the memory goes, and what fits in it."""
    budget = engine.budget
    kv = budget.kv_tokens * budget.kv_per_token
    rows = ", ".join(
        f"{min(engine.config.max_slots, budget.rows(length - new, new))} of {length}"
        for length, new in ((128, 64), (250, 64), (512, 64))
    )
    return (
        f"weights {budget.weights / GIB:.2f} GiB, keys and values {kv / GIB:.2f} GiB "
        f"({budget.kv_tokens} tokens), prefix pool {budget.prefix_pool / GIB:.2f} GiB, "
        f"activations up to {budget.activations / GIB:.2f} GiB; rows at once: {rows} tokens"
    )
