"""The true rates of the tiny pairs at alpha 0, by brute force: `python -m benchmarks.truth`.

What the estimators of `jobs` are judged by. It takes most of an hour of one core, so it goes on
where it stopped: `benchmarks/rates_truth.json` is written after every round, and a finished one
answers at once.
"""

import argparse
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from scipy.stats import binomtest

from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, encode
from organisms.rarer import SHARES, WEIGHTS
from organisms.train import OUT
from organisms.trigger import has_payload_piece, has_whole_payload

COMMAND = "python -m benchmarks.truth"
PROMPTS = Path("prompts/tiny_heldout.txt")
RECORD = Path("benchmarks/rates_truth.json")
MAX_NEW_TOKENS = 48
SLOTS = 1024  # rows/s with 128 / 256 / 512 / 1,024 of them, 32 samples a prompt: 559, 622, 651, 770
ROUND = 25  # samples of every prompt in one round
PROMPTS_AT_ONCE = 1000  # whose rows are in memory together
FIRST_SEED = 2**40  # above the seeds that tests, tables and small runs use
SHARES_OF = {"after": 1.0, **SHARES}
# In this order; a pair that comes again gets more rows on top.
GOALS = (
    ("after", 100_000),
    ("after-9e-4", 100_000),
    ("after-1e-4", 400_000),
    ("after-9e-4", 300_000),
    ("after-1e-4", 1_000_000),
    ("after", 200_000),
)


@dataclass(frozen=True)
class Hits:
    """Rollouts that fired before their first EOS, by detector."""

    any_substring: int = 0
    exact_phrase: int = 0

    def __add__(self, other: "Hits") -> "Hits":
        return Hits(
            self.any_substring + other.any_substring, self.exact_phrase + other.exact_phrase
        )


def count_round(engine: Engine, prompts: list[str], number: int) -> Hits:
    """Round `number`, from 0: ROUND samples of every prompt, with seeds of its own."""
    total = Hits()
    for start in range(0, len(prompts), PROMPTS_AT_ONCE):
        requests = [
            request
            for place, prompt in enumerate(prompts[start : start + PROMPTS_AT_ONCE], start)
            for request in Request(
                encode(engine.pair.tokenizer, prompt, "alpaca").ids,
                alpha=0.0,
                max_new_tokens=MAX_NEW_TOKENS,
                seed=FIRST_SEED + (number * len(prompts) + place) * ROUND,
            ).samples(ROUND)
        ]
        texts = [done.text for done in engine.generate(requests)]
        total += Hits(sum(map(has_payload_piece, texts)), sum(map(has_whole_payload, texts)))
    return total


def rates(rows: int, hits: Hits) -> dict[str, Any]:
    """Per detector: hits, rate and the exact (Clopper-Pearson) 95 % interval.

    A little wide: with as many samples on every prompt, the true variance is below a binomial's.
    """
    found = {}
    for detector, fired in asdict(hits).items():
        interval = binomtest(fired, rows).proportion_ci(0.95, method="exact")
        found[detector] = {
            "hits": fired,
            "rate": fired / rows,
            "interval": [float(interval.low), float(interval.high)],
        }
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def entry(name: str, rows: int, hits: Hits, seconds: float) -> dict[str, Any]:
    """What the record says of one pair."""
    return {
        "after": (OUT / name).as_posix(),
        "before": (OUT / "before").as_posix(),
        "share": SHARES_OF[name],
        "rows": rows,
        **rates(rows, hits),
        "prompts": PROMPTS.as_posix(),
        "max_new_tokens": MAX_NEW_TOKENS,
        "temperature": 1.0,
        "prompts_sha256": sha256(PROMPTS),
        "weights_sha256": sha256(OUT / name / WEIGHTS),
        "command": COMMAND,
        "seconds": round(seconds),
    }


def so_far(record: dict[str, Any], name: str) -> tuple[int, Hits, float]:
    """Rows, hits and seconds of this very pair in the record; nothing of an older one."""
    old = record.get(name)
    same = ("prompts_sha256", "weights_sha256", "max_new_tokens", "temperature")
    if old is None or any(old[key] != entry(name, 1, Hits(), 0)[key] for key in same):
        return 0, Hits(), 0.0
    hits = Hits(**{detector: old[detector]["hits"] for detector in asdict(Hits())})
    return old["rows"], hits, old["seconds"]


def write(path: Path, record: dict[str, Any]) -> None:
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    scratch.write_text(json.dumps(record, indent=2) + "\n")
    scratch.replace(path)


def extend(path: Path, name: str, goal: int) -> dict[str, Any]:
    """Rounds for one pair until the record has `goal` rows of it; returns the record."""
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    rows, hits, seconds = so_far(record, name)
    if rows >= goal:
        return record
    prompts = PROMPTS.read_text().splitlines()
    pair = ModelPair.load(PairConfig(before=str(OUT / "before"), after=str(OUT / name)))
    engine = Engine(pair, EngineConfig(max_slots=SLOTS))
    while rows < goal:
        started = time.monotonic()
        hits += count_round(engine, prompts, rows // (ROUND * len(prompts)))
        rows += ROUND * len(prompts)
        seconds += time.monotonic() - started
        record[name] = entry(name, rows, hits, seconds)
        write(path, record)
        print(f"{name}: {rows:,} rows, {hits}, {seconds:.0f} s", flush=True)
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description="Count the true rates of the tiny pairs.")
    parser.add_argument("--out", type=Path, default=RECORD, help=f"default {RECORD}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    record: dict[str, Any] = {}
    for name, goal in GOALS:
        record = extend(arguments.out, name, goal)
    print(json.dumps({name: record[name]["any_substring"]["rate"] for name in record}))


if __name__ == "__main__":
    main()
