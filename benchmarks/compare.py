"""The engine beside its baselines: the same requests, in turn, medians, the same tokens.

Every function returns flat names to numbers for the JSON line, and prints a table for people.
Imports neither ray nor anything above lda_core: a GPU machine may have no more.
"""

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import baselines, machine, workloads
from benchmarks.baselines import Rows, useful
from lda_core import Engine, EngineConfig, ModelPair, Request
from lda_core.bandwidth import synchronize
from lda_core.stages import StageClock

Numbers = dict[str, float]
STAGES = ("after", "before", "mix_and_sample", "bookkeeping")
# Rows that may differ from the engine's because two tokens were equally likely to rounding.
_DIFFERING = 0.1


class Run(NamedTuple):
    """One timed run: the useful tokens of every row, and how long it took."""

    rows: Rows
    seconds: float

    @property
    def rate(self) -> float:
        """Useful tokens per second."""
        return sum(map(len, self.rows)) / self.seconds


Way = Callable[[], Run]
# Ours may run in several settings, each under a name that begins with "ours".
Configs = Mapping[str, EngineConfig]
OURS: Configs = {"ours": EngineConfig(max_slots=64)}


def engine_way(pair: ModelPair, requests: Sequence[Request], config: EngineConfig) -> Way:
    """A new engine each time, so that no prompt is left from the run before; made untimed."""

    def run() -> Run:
        engine = Engine(pair, config)
        start = time.perf_counter()
        completions = engine.generate(requests)
        return Run([c.token_ids for c in completions], time.perf_counter() - start)

    return run


def baseline_way(pair: ModelPair, requests: Sequence[Request], decode: Callable[[], Rows]) -> Way:
    def run() -> Run:
        synchronize(pair.device)
        start = time.perf_counter()
        rows = decode()
        seconds = time.perf_counter() - start
        pairs = zip(requests, rows, strict=True)
        return Run([useful(pair, request, tokens) for request, tokens in pairs], seconds)

    return run


def interleaved(ways: Mapping[str, Way], repeats: int) -> dict[str, list[Run]]:
    """A B C A B C ...: what the machine does meanwhile hits all of them alike."""
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, way in ways.items():
            gc.collect()  # nobody pays for another's garbage, or goes short of its memory
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            runs[name].append(way())
    return runs


def median_rate(runs: Sequence[Run]) -> float:
    return statistics.median(run.rate for run in runs)


def sweep(
    console: Console,
    name: str,
    pair: ModelPair,
    requests: Sequence[Request],
    *,
    repeats: int,
    configs: Configs = OURS,
    exact: bool = True,
) -> Numbers:
    """Useful tokens per second of ours over each baseline's, as `<name>_over_<baseline>`.

    The loop over prompts gets four rows. `exact`: float32, so the tokens must be the same.
    """
    alone = [round(i * (len(requests) - 1) / 3) for i in range(4)]
    some = [requests[i] for i in alone]
    ways = {
        **{ours: engine_way(pair, requests, config) for ours, config in configs.items()},
        "batched8": baseline_way(pair, requests, lambda: baselines.batched(pair, requests)),
        "hf32": baseline_way(pair, requests, lambda: baselines.mixed_generate(pair, requests)),
        "one_by_one": baseline_way(pair, some, lambda: baselines.one_by_one(pair, some)),
    }
    interleaved({way: ways[way] for way in configs}, 1)  # the warm-up
    baselines.mixed_generate(pair, requests[:2])
    baselines.batched(pair, requests[:2])
    baselines.one_by_one(pair, requests[:1])
    runs = interleaved(ways, repeats)
    expected = runs["ours"][0].rows
    same = {way: same_rows(runs[way][-1].rows, expected) for way in (*configs, "batched8")}
    same["one_by_one"] = same_rows(runs["one_by_one"][0].rows, [expected[i] for i in alone])
    if exact:
        assert same["batched8"] >= 1 - _DIFFERING, f"{name}: other tokens in batches: {same}"
        assert all(same[way] == 1 for way in (*configs, "one_by_one")), f"{name}: {same}"
    rates = {way: median_rate(done) for way, done in runs.items()}
    title = f"{name}: {len(requests)} rows, {sum(map(len, expected))} useful tokens"
    table = new_table(title, "way", "tokens/s", "all runs", "ours is", "rows as ours")
    for way, done in runs.items():
        table.add_row(
            way,
            f"{rates[way]:.1f}",
            " ".join(f"{run.rate:.0f}" for run in done),
            f"x {rates['ours'] / rates[way]:.2f}",
            f"{same[way]:.0%}" if way in same else "other noise",
        )
    console.print(table)
    return {
        **{f"{name}_over_{way}": rates["ours"] / rates[way] for way in ("batched8", "hf32")},
        **{f"{name}_{way}_tokens_per_s": rate for way, rate in rates.items()},
    }


def uniform(
    console: Console,
    pair: ModelPair,
    rows: int,
    *,
    repeats: int,
    max_new_tokens: int = 24,
    configs: Configs = OURS,
) -> Numbers:
    """Time over that of `generate` on both models alone, by setting of ours.

    At 1 mixing and drawing cost nothing.
    """
    requests = workloads.uniform(pair.vocab_size, rows, max_new_tokens)

    def alone(model: torch.nn.Module) -> Way:
        return baseline_way(pair, requests, lambda: baselines.generate(model, requests))

    ways = {
        **{ours: engine_way(pair, requests, config) for ours, config in configs.items()},
        "generate after": alone(pair.after),
        "generate before": alone(pair.before),
    }
    interleaved(ways, 1)  # the warm-up
    runs = interleaved(ways, repeats)
    # Each repeat's own ratio, because what slows the machine for a while slows them all.
    both = zip(runs["generate after"], runs["generate before"], strict=True)
    bounds = [after.seconds + before.seconds for after, before in both]
    ratios: Numbers = {
        ours: statistics.median(
            run.seconds / bound for run, bound in zip(runs[ours], bounds, strict=True)
        )
        for ours in configs
    }
    table = new_table(
        f"uniform: {rows} rows, {max_new_tokens} tokens each", "way", "s", "over both generates"
    )
    for way, done in runs.items():
        over = f"{ratios[way]:.3f}" if way in ratios else ""
        table.add_row(way, f"{statistics.median(run.seconds for run in done):.2f}", over)
    console.print(table)
    return ratios


class Steps(NamedTuple):
    """Decoding without joins and leaves, per step."""

    stage_ms: dict[str, float]
    step_ms: float
    clocked_ms: float  # with the clock running, which on a GPU costs time
    floor_bytes: int
    peak_bytes: int

    @property
    def bookkeeping_share(self) -> float:
        ours = self.stage_ms["mix_and_sample"] + self.stage_ms["bookkeeping"]
        return ours / self.clocked_ms


def decode_steps(pair: ModelPair, *, rows: int, steps: int, cuda_graphs: bool = False) -> Steps:
    """`steps` steps of `rows` rows with prompts of 32 tokens; then as many with the clock."""
    warm_up = 3
    requests = workloads.decode_only(pair.vocab_size, rows, 32, warm_up + 2 * steps + 1)
    columns = requests[0].columns
    machine.reset_peak(pair.device)
    engine = Engine(
        pair,
        EngineConfig(max_slots=rows, kv_tokens=rows * columns, cuda_graphs=cuda_graphs),
    )
    for request in requests:
        engine.enqueue(engine.accept(request))
    for _ in range(warm_up):
        engine.step()
    step_ms = _step_ms(engine, steps)
    floor_bytes = engine.floor_bytes()
    engine.clock = clock = StageClock(pair.device)
    clocked_ms = _step_ms(engine, steps)
    return Steps(
        stage_ms={stage: 1e3 * clock.seconds.get(stage, 0.0) / steps for stage in STAGES},
        step_ms=step_ms,
        clocked_ms=clocked_ms,
        floor_bytes=floor_bytes,
        peak_bytes=machine.peak_bytes(pair.device),
    )


def _step_ms(engine: Engine, steps: int) -> float:
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return 1e3 * (time.perf_counter() - start) / steps


def steps_table(console: Console, title: str, measured: Mapping[str, Steps]) -> None:
    table = new_table(
        title, "pair", *(stage.replace("_", " ") for stage in STAGES), "whole step", "peak MiB"
    )
    for name, steps in measured.items():
        stages = [f"{steps.stage_ms[stage]:.2f}" for stage in STAGES]
        table.add_row(name, *stages, f"{steps.step_ms:.2f}", f"{steps.peak_bytes / 2**20:.0f}")
    console.print(table)


def floor_fraction(steps: Steps, bandwidth: float) -> float:
    """Share of the step that reading its bytes once would take at the machine's copy speed."""
    return steps.floor_bytes / bandwidth / (steps.step_ms / 1e3)


def same_rows(rows: Rows, expected: Rows) -> float:
    """Share of rows with the same tokens."""
    pairs = list(zip(rows, expected, strict=True))
    return sum(ours == theirs for ours, theirs in pairs) / len(pairs)


def new_table(title: str, first: str, *columns: str) -> Table:
    """Words on the left, numbers on the right."""
    table = Table(title=title, title_justify="left", min_width=72)
    table.add_column(first)
    for column in columns:
        table.add_column(column, justify="right")
    return table
