"""What a replica counts, for Prometheus (Ray exports it, tagged with deployment and replica)."""

from dataclasses import asdict

from ray.serve import metrics

from lda_core import Engine
from lda_core.memory import GIB

_TOTALS = {
    "steps": "decode steps of the pair",
    "tokens": "tokens drawn",
    "prefix_lookups": "prompts that new rows needed, one for all rows that join together",
    "prefix_hits": "of these, the ones that did not have to be read again",
    "prefilled_tokens": "prompt tokens read",
    "captured_tokens": "tokens whose activations were captured",
    "out_of_memory": "times that the device had no memory for a step",
}


class EngineMetrics:
    """Counters `lda_<total>` of one engine; `update` adds what has come since the last time."""

    def __init__(self, engine: Engine, noise_floor: dict[float, float]) -> None:
        self._engine = engine
        self._seen = dict.fromkeys(_TOTALS, 0)
        self._counters = {
            name: metrics.Counter(f"lda_{name}", description=text) for name, text in _TOTALS.items()
        }
        floor = metrics.Gauge(
            "lda_noise_floor",
            description="largest change of a mixed logit in another batch",
            tag_keys=("alpha",),
        )
        for alpha, change in noise_floor.items():
            floor.set(change, tags={"alpha": f"{alpha:g}"})

    def update(self) -> None:
        now = asdict(self._engine.stats)
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
