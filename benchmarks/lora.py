"""A LoRA pair both ways: one stacked pass over one copy of the weights, or two merged models."""

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console

from benchmarks import workloads
from benchmarks.compare import Numbers, new_table
from benchmarks.random_pair import Size, byte_tokenizer, end_answers, random_model
from lda_core import Engine, EngineConfig, ModelPair, PairConfig

Mode = Literal["stacked", "merged"]
MODES: tuple[Mode, ...] = ("stacked", "merged")
ROOT = Path(__file__).resolve().parent.parent
RANK = 8
_PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def save(size: Size, folder: Path) -> None:
    """`folder`/before, a checkpoint with tokenizer, and `folder`/adapter on every projection."""
    model = random_model(size)
    end_answers(model)
    model.save_pretrained(folder / "before")
    byte_tokenizer().save_pretrained(folder / "before")
    torch.manual_seed(1)
    # Random A and B; lora_alpha 1 makes their product 3 % of the weights' spread.
    config = LoraConfig(r=RANK, lora_alpha=1, target_modules=_PROJECTIONS, init_lora_weights=False)
    get_peft_model(model, config).save_pretrained(folder / "adapter")


def load(folder: Path, mode: Mode) -> ModelPair:
    return ModelPair.load(
        PairConfig(
            before=str(folder / "before"),
            adapter=str(folder / "adapter"),
            adapter_mode=mode,
            device="cpu",
        )
    )


def decode_seconds(pair: ModelPair, rows: int, steps: int) -> float:
    """Seconds per decode step of so many rows, prefill and first step left out."""
    requests = workloads.decode_only(pair.vocab_size, rows, 32, steps + 2)
    columns = requests[0].columns
    engine = Engine(pair, EngineConfig(max_slots=rows, kv_tokens=rows * columns))
    for request in requests:
        engine.enqueue(engine.accept(request))
    engine.step()
    start = time.perf_counter()
    for _ in range(steps):
        engine.step()
    return (time.perf_counter() - start) / steps


def peak_bytes(folder: Path, mode: Mode) -> int:
    """Peak resident memory of loading and decoding in a process of its own, its imports less."""
    command = [sys.executable, "-m", "benchmarks.lora_memory", "--mode", mode, "--folder"]
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore::FutureWarning"}
    done = subprocess.run(
        [*command, str(folder)],
        cwd=ROOT,
        env={**os.environ, **quiet, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        check=True,
    )
    return int(json.loads(done.stdout)["peak_bytes"])


def compare(
    console: Console, size: Size, folder: Path, *, repeats: int, steps: int, memory: bool = True
) -> Numbers:
    save(size, folder)
    pairs = {mode: load(folder, mode) for mode in MODES}
    numbers: Numbers = {}
    table = new_table(f"LoRA pair, rank {RANK}, ms per step", "rows", *MODES, "merged / stacked")
    for rows in (2, 4):
        seconds: dict[Mode, list[float]] = {mode: [] for mode in MODES}
        for mode in MODES:
            decode_seconds(pairs[mode], rows, 1)  # warm-up
        for _ in range(repeats):
            for mode in MODES:
                seconds[mode].append(decode_seconds(pairs[mode], rows, steps))
        ms = {mode: 1e3 * statistics.median(seconds[mode]) for mode in MODES}
        numbers[f"lora_rows{rows}"] = ms["merged"] / ms["stacked"]
        cells = [f"{ms[mode]:.1f}" for mode in MODES]
        table.add_row(str(rows), *cells, f"x {numbers[f'lora_rows{rows}']:.2f}")
    if memory:
        peaks = {
            mode: statistics.median(peak_bytes(folder, mode) for _ in range(repeats))
            for mode in MODES
        }
        numbers["lora_memory_share"] = peaks["stacked"] / peaks["merged"]
        cells = [f"{peaks[mode] / 2**20:.0f} MiB" for mode in MODES]
        table.add_row("peak", *cells, f"stacked is {numbers['lora_memory_share']:.2f} of it")
    console.print(table)
    return numbers
