"""Peak memory of generation, alone and with captures beside it: for benchmarks/captures.py.

    python -m benchmarks.capture_memory [--captures 200]

One process, one way: the peak of its resident set (VmHWM) since the random pair was in memory.
Prints one JSON line.
"""

import argparse
import json
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future

import torch

from benchmarks.machine import parameters, peak_bytes, reset_peak
from benchmarks.random_pair import Size, random_pair
from lda_core import Captured, CaptureRequest, Directions, Engine, EngineConfig, Request
from lda_core.threaded import EngineThread

SIZE = Size(hidden=288, layers=26, intermediate=864)  # 30 million parameters
TRAITS = 16
ROWS, PROMPT, ANSWER = 32, 64, 64  # rows that decode at once, and tokens of each
IN_FLIGHT = 32  # captures that wait or are read, as many as jobs/capture.py has under way
CPU = torch.device("cpu")


def texts(count: int, tokens: int) -> Iterator[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        yield tuple(torch.randint(1, 256, (tokens,), generator=generator).tolist())


def measure(captures: int) -> dict[str, float]:
    pair = random_pair(SIZE)
    engine = Engine(pair, EngineConfig(max_slots=ROWS))
    vectors = torch.randn(TRAITS, SIZE.layers, SIZE.hidden)
    names = [f"trait {i}" for i in range(TRAITS)]
    traits = Directions.of(names, list(vectors), SIZE.layers, SIZE.hidden)
    thread = EngineThread(engine)
    reset_peak(CPU)
    loaded = peak_bytes(CPU)
    rows = [
        engine.accept(Request(ids, alpha=1.0, seed=i, max_new_tokens=ANSWER, ignore_eos=True))
        for i, ids in enumerate(texts(ROWS, PROMPT))
    ]
    generated = thread.submit(rows)
    under_way: deque[Future[Captured]] = deque()
    beside = 0
    for ids in texts(captures, PROMPT + ANSWER):
        want = CaptureRequest(ids[:PROMPT], ids[PROMPT:], directions=traits)
        under_way += thread.submit_captures([engine.accept_capture(want)])
        if len(under_way) == IN_FLIGHT:
            assert under_way.popleft().result().error is None
            beside += not all(future.done() for future in generated)
    for future in under_way:
        assert future.result().error is None
    for answer in generated:
        assert len(answer.result().token_ids) == ANSWER
    peak = peak_bytes(CPU)
    thread.stop()
    million = parameters(pair.after)
    return {
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "captures_beside_generation": beside,
        "million_parameters": float(million.split()[0]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captures", type=int, default=64)
    torch.set_num_threads(1)
    print(json.dumps(measure(parser.parse_args().captures)))


if __name__ == "__main__":
    main()
