"""One LoRA pair loaded and decoded in this process alone; prints its peak memory as JSON.

python -m benchmarks.lora_memory --mode stacked --folder FOLDER   (from `lora.save`)
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks import lora, machine, workloads
from lda_core import Engine, EngineConfig

_ROWS, _COLUMNS = 4, 160


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", choices=lora.MODES, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)  # each thread would have an arena of its own
    cpu = torch.device("cpu")
    machine.reset_peak(cpu)
    imports = machine.peak_bytes(cpu)
    pair = lora.load(args.folder, args.mode)
    engine = Engine(
        pair,
        EngineConfig(max_slots=_ROWS, kv_tokens=_ROWS * _COLUMNS, prefix_pool_bytes=0),
    )
    prompt = min(128, pair.context_length // 2)
    engine.generate(workloads.decode_only(pair.vocab_size, _ROWS, prompt, 16))
    print(json.dumps({"mode": args.mode, "peak_bytes": machine.peak_bytes(cpu) - imports}))


if __name__ == "__main__":
    main()
