"""The benchmark compares with the right thing: baselines draw what they should, and count right."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from reference import reference
from rich.console import Console

from benchmarks import baselines, compare, engine, gpu, lora, poisson, workloads
from benchmarks.baselines import useful
from benchmarks.random_pair import Size, random_pair
from lda_core import Engine, EngineConfig, ModelPair, Request

ROOT = Path(__file__).parent.parent
SMALL = Size(vocab=320, hidden=32, layers=2, heads=2, intermediate=48, context=256)


@pytest.fixture(scope="module")
def pair() -> ModelPair:
    return random_pair(SMALL)


@pytest.fixture(scope="module")
def mixed(pair: ModelPair) -> list[Request]:
    return gpu.mixed_requests(pair.vocab_size)[::4]


@pytest.fixture(scope="module")
def drawn(pair: ModelPair, mixed: list[Request]) -> baselines.Rows:
    completions = Engine(pair, EngineConfig(max_slots=4)).generate(mixed)
    return [c.token_ids for c in completions]


def test_rows_of_the_random_pair_stop_raggedly(pair: ModelPair) -> None:
    requests = workloads.w1(pair.vocab_size)
    lengths = [len(c.token_ids) for c in Engine(pair).generate(requests)]
    assert len(set(lengths)) > 10
    assert 48 / 4 < sum(lengths) / len(lengths) < 48 / 2


def test_one_by_one_draws_the_engines_tokens(
    pair: ModelPair, mixed: list[Request], drawn: baselines.Rows
) -> None:
    assert baselines.one_by_one(pair, mixed) == drawn
    assert [reference(pair, request) for request in mixed[:4]] == drawn[:4]


def test_batches_draw_the_engines_tokens_and_then_go_on(
    pair: ModelPair, mixed: list[Request], drawn: baselines.Rows
) -> None:
    assert len({len(r.prompt_ids) for r in mixed}) > 3  # so that something is padded
    rows = baselines.batched(pair, mixed, batch=5)
    assert {len(row) for row in rows[:5]} == {max(r.max_new_tokens for r in mixed[:5])}
    assert [useful(pair, r, row) for r, row in zip(mixed, rows, strict=True)] == drawn


def test_useful_tokens_end_with_the_first_eos(pair: ModelPair) -> None:
    eos, other = min(pair.eos_ids), max(set(range(320)) - pair.eos_ids)
    request = Request((5,), max_new_tokens=4)
    assert useful(pair, request, [other, eos, other, eos]) == [other, eos]
    assert useful(pair, request, [other] * 6) == [other] * 4
    unending = replace(request, ignore_eos=True)
    assert useful(pair, unending, [eos, other, eos, eos, other]) == [eos, other, eos, eos]


def test_generate_runs_to_the_end_in_spite_of_the_models_own_eos(pair: ModelPair) -> None:
    own = pair.after.generation_config
    requests = workloads.uniform(pair.vocab_size, rows=6, max_new_tokens=40)
    rows = baselines.generate(pair.after, requests)
    assert any(token in pair.eos_ids for row in rows for token in row[:20])
    assert all(len(row) == 40 and any(row[-5:]) for row in rows)  # 0 is padding
    assert pair.after.generation_config is own


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_generate_with_a_processor_mixes_as_we_do(pair: ModelPair, alpha: float) -> None:
    requests = [
        replace(r, alpha=alpha, temperature=0.0, ignore_eos=False)
        for r in workloads.uniform(pair.vocab_size, rows=5, max_new_tokens=24)
    ]
    rows = baselines.mixed_generate(pair, requests, batch=3)
    rows = [useful(pair, r, row) for r, row in zip(requests, rows, strict=True)]
    assert rows == [reference(pair, request) for request in requests]
    plain = baselines.generate(pair.after, requests)
    same = rows == [useful(pair, r, row) for r, row in zip(requests, plain, strict=True)]
    assert same == (alpha == 0)


class Ticking:
    """A clock that stands still unless told."""

    time = 0.0

    def now(self) -> float:
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


def test_a_static_server_makes_rows_wait_for_the_batch_before() -> None:
    clock, served = Ticking(), []

    def serve(rows: list[int]) -> None:
        served.append(rows)
        clock.time += 10

    # 0 goes alone; 1, 2 and 3 came meanwhile, but only two fit; 4 finds the server idle.
    latencies = poisson.static_latencies([1, 2, 3, 10, 50], serve, 2, clock)
    assert served == [[0], [1, 2], [3], [4]]
    assert latencies == [10, 21 - 2, 21 - 3, 31 - 10, 10]


def test_the_engine_lets_rows_join_and_leave(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, decoder = Ticking(), Engine(pair, EngineConfig(max_slots=4))
    step = decoder.step

    def one_second() -> object:
        clock.time += 1
        return step()

    monkeypatch.setattr(decoder, "step", one_second)
    requests = [
        Request((5, 6), max_new_tokens=length, ignore_eos=True, seed=length)
        for length in (9, 2, 3, 4)
    ]
    assert poisson.engine_latencies(decoder, requests, [0, 4, 4, 60], clock) == [9, 2, 3, 4]


def test_percentile() -> None:
    values = [float(i) for i in range(1, 21)]
    assert [poisson.percentile(values, p) for p in (0.5, 0.95, 1.0)] == [10, 19, 20]
    assert poisson.percentile([7.0], 0.95) == 7


def test_arrivals_come_at_their_rate() -> None:
    times = workloads.arrivals(2000, rate=4.0)
    assert times == sorted(times) and 450 < times[-1] < 550


def test_a_pool_saves_reading_in_the_pools_workload(pair: ModelPair) -> None:
    read = []
    for pool in (None, 0):
        decoder = Engine(pair, EngineConfig(max_slots=4, prefix_pool_bytes=pool))
        decoder.generate(workloads.returning(pair.vocab_size, prompts=6, samples=3))
        read.append(decoder.stats.prefilled_tokens)
    assert read[0] * 1.5 < read[1]


def test_flips_are_counted_from_the_first_difference() -> None:
    seen = gpu.flips([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 2, 9, 4], [5, 6, 7, 8]])
    assert seen == gpu.Flips(rows=0.5, tokens=1 / 8, per_token=1 / 7, first=2)
    assert gpu.flips([[1]], [[1]]).first is None


def test_bookkeeping_is_a_share_of_the_clocked_step() -> None:
    stages = {"after": 4.0, "before": 4.0, "mix_and_sample": 1.5, "bookkeeping": 0.5}
    steps = compare.Steps(stages, step_ms=8.0, clocked_ms=10.0, floor_bytes=10**7, peak_bytes=0)
    assert steps.bookkeeping_share == 0.2
    assert compare.floor_fraction(steps, bandwidth=10**10) == pytest.approx(1 / 8)


def test_other_tokens_than_the_baselines_fail_the_benchmark(
    pair: ModelPair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "one_by_one", lambda pair, requests: [[3]] * len(requests))
    with pytest.raises(AssertionError, match="w1"):
        compare.sweep(Console(quiet=True), "w1", pair, workloads.w1(320, 2), repeats=1)


def test_the_benchmark_gives_every_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "peak_bytes", lambda folder, mode: 100 + len(mode))
    scale = engine.Scale(
        repeats=1,
        size=SMALL,
        words=400,
        w1_prompts=2,
        w2_samples=1,
        uniform_rows=(2, 3),
        uniform_tokens=4,
        pool_slots=2,
        pool_prompts=3,
        pool_samples=2,
        lora_steps=2,
        arrivals=9,
        steps=2,
        rows=4,
        tiny_prompts=1,
    )
    result = engine.run(scale, Console(quiet=True))
    assert all(isinstance(result[key], float) and result[key] > 0 for key in engine.KEYS)
    assert {"commit", "machine", "pair", "seconds"} <= set(result)
    json.dumps(result)


def test_peak_memory_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    lora.save(SMALL, tmp_path)
    assert 0 < lora.peak_bytes(tmp_path, "merged") < 2**30


def test_the_gpu_program_needs_no_ray() -> None:
    code = "import sys, benchmarks.gpu; print(*{m.split('.')[0] for m in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert not {"ray", "deployments", "jobs"} & set(done.stdout.split())
