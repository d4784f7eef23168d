"""What only a GPU can show: parity, flips of 16-bit tokens, the noise floor, and the table.

    bash benchmarks/gpu.sh                                         (random Llamas of 7B, 16 bit)
    python -m benchmarks.gpu --device cpu --hidden 64 --layers 2   (the same program, for a try)

Needs torch, transformers, peft, rich and this folder: no download, no ray. A 7B pair takes 27 GB
for weights and 15 GB for keys and values. Ends in one JSON line; the status is 1 if parity fails.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console

import lda_core
from benchmarks import baselines, compare, machine, workloads
from benchmarks.baselines import Rows
from benchmarks.compare import Configs, Numbers
from benchmarks.random_pair import Size, random_pair
from lda_core import Engine, EngineConfig, ModelPair, Request
from lda_core.bandwidth import copy_bandwidth

SMALL = Size(vocab=2048, hidden=256, layers=4, heads=4, intermediate=512)
SLOTS = 64


def mixed_requests(vocab: int) -> list[Request]:
    """Every kind of row: alphas, greedy, warm, top-p, top-k, long and short."""
    kinds = list(itertools.product((-1.0, 0.0, 1.0, 3.0), (0.0, 0.7, 1.0), (0.8, 1.0), (0, 20)))
    prompts = workloads.random_prompts(len(kinds), (1, 48), vocab)
    return [
        Request(prompt, alpha, temperature, top_p, top_k, max_new_tokens=8 + seed, seed=seed)
        for seed, (prompt, (alpha, temperature, top_p, top_k)) in enumerate(
            zip(prompts, kinds, strict=True)
        )
    ]


def parity(device: str, graphs: Sequence[bool]) -> Numbers:
    """Share of rows with the tokens of a plain loop over prompts, a small pair in float32."""
    pair = random_pair(SMALL, device=device)
    requests = mixed_requests(pair.vocab_size)
    rows = baselines.one_by_one(pair, requests)
    shares = {}
    for on in graphs:
        engine = Engine(pair, EngineConfig(max_slots=16, kv_tokens=16 * 128, cuda_graphs=on))
        drawn = [c.token_ids for c in engine.generate(requests)]
        shares["parity_graphs" if on else "parity"] = compare.same_rows(drawn, rows)
    return shares


class Flips(NamedTuple):
    """How rows differ from the same rows alone, all shares."""

    rows: float  # that differ anywhere
    tokens: float  # that differ from the one at the same place
    per_token: float  # first differences per token drawn until then
    first: float | None  # median place of the first difference, in tokens


def flips(rows: Rows, alone: Rows) -> Flips:
    pairs = [list(zip(a, b, strict=True)) for a, b in zip(rows, alone, strict=True)]
    firsts = [next((i for i, (a, b) in enumerate(p) if a != b), None) for p in pairs]
    found = [i for i in firsts if i is not None]
    tokens = sum(map(len, pairs))
    at_risk = sum(len(p) if i is None else i + 1 for p, i in zip(pairs, firsts, strict=True))
    return Flips(
        rows=len(found) / len(pairs),
        tokens=sum(a != b for p in pairs for a, b in p) / tokens,
        per_token=len(found) / at_risk,
        first=statistics.median(found) if found else None,
    )


def flip_rates(console: Console, pair: ModelPair, rows: int, tokens: int) -> dict[str, Any]:
    """The same seeded requests alone, 8 and 32 at a time."""
    requests = [
        replace(request, alpha=alpha)
        for request, alpha in zip(
            workloads.uniform(pair.vocab_size, rows, tokens), itertools.cycle((0.0, 1.0, 2.0))
        )
    ]
    columns = max(r.columns for r in requests)
    drawn: dict[int, Rows] = {}
    for slots in (1, 8, 32):
        engine = Engine(pair, EngineConfig(max_slots=slots, kv_tokens=slots * columns))
        drawn[slots] = [c.token_ids for c in engine.generate(requests)]
    table = compare.new_table(
        f"seeded tokens of {rows} rows x {tokens}, against the same alone",
        *("batch", "rows that differ", "tokens that differ", "flips a token", "first at"),
    )
    numbers: dict[str, Any] = {}
    for slots in (8, 32):
        seen = flips(drawn[slots], drawn[1])
        first = "none" if seen.first is None else f"{seen.first:.0f}"
        shares = f"{seen.rows:.1%}", f"{seen.tokens:.1%}", f"{seen.per_token:.3%}"
        table.add_row(str(slots), *shares, first)
        numbers |= {f"flips{slots}_{name}": value for name, value in seen._asdict().items()}
    console.print(table)
    return numbers


def speed(
    console: Console, pair: ModelPair, graphs: Sequence[bool], repeats: int, small: bool
) -> Numbers:
    """W1, W2 and uniform work beside the baselines, and a step's stages."""
    w1 = workloads.w1(pair.vocab_size, 2 if small else 8)
    w2 = workloads.w2(pair.vocab_size, 2 if small else 8)
    # As much as W2 can need: what is free by default would leave nothing to the baselines.
    kv_tokens = SLOTS * max(r.columns for r in w2)
    configs: Configs = {
        "ours_graphs" if on else "ours": EngineConfig(SLOTS, kv_tokens=kv_tokens, cuda_graphs=on)
        for on in graphs
    }
    numbers: Numbers = {}
    exact = pair.after.dtype == torch.float32
    for name, requests in (("w1", w1), ("w2", w2)):
        numbers |= compare.sweep(
            console, name, pair, requests, repeats=repeats, configs=configs, exact=exact
        )
    for rows in (8, 32):
        ratios = compare.uniform(console, pair, rows, repeats=repeats, configs=configs)
        numbers |= {f"uniform{rows}_{ours}_over_generate": ratio for ours, ratio in ratios.items()}
    measured = {
        f"rows{rows}{'_graphs' if on else ''}": compare.decode_steps(
            pair, rows=rows, steps=16, cuda_graphs=on
        )
        for rows in (1, 8, 32)
        for on in graphs
    }
    compare.steps_table(console, "a step, ms, top_p 0.9", measured)
    bandwidth = copy_bandwidth(pair.device)
    for name, steps in measured.items():
        fraction = compare.floor_fraction(steps, bandwidth)
        numbers[f"floor_fraction_{name}"] = fraction
        console.print(f"{name}: reading its bytes once would take {fraction:.0%} of a step")
    return numbers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", default=None, help="bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--vocab", type=int, default=32_000)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--commit", default=None, help="to be noted beside the numbers")
    args = parser.parse_args()
    start, console = time.perf_counter(), Console()
    cuda = args.device.startswith("cuda")
    dtype = args.dtype or ("bfloat16" if cuda else "float32")
    size = Size(
        vocab=args.vocab,
        hidden=args.hidden,
        layers=args.layers,
        heads=max(2, args.hidden // 128),
        intermediate=args.hidden * 43 // 16,  # 11008 of 4096
        tied=False,
    )
    graphs = (False, True) if cuda else (False,)
    result: dict[str, Any] = {**parity(args.device, graphs)}
    console.print(f"parity, small pair in float32: {result}")
    pair = random_pair(size, device=args.device, dtype=getattr(torch, dtype))
    result |= flip_rates(console, pair, rows=32, tokens=64 if cuda else 8)
    floor = lda_core.noise_floor(pair)
    console.print(f"noise floor, largest change of mixed logits by alpha: {floor}")
    result["noise_floor"] = {f"{alpha:g}": value for alpha, value in floor.items()}
    result |= speed(console, pair, graphs, args.repeats, small=not cuda)
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in result.items()}
    print(
        json.dumps(
            {
                **rounded,
                "pair": f"random Llama, {machine.parameters(pair.before)}, {dtype}",
                "machine": machine.machine(pair.device),
                "commit": args.commit,
                "seconds": round(time.perf_counter() - start),
            }
        )
    )
    sys.exit(any(result[name] < 1 for name in result if name.startswith("parity")))


if __name__ == "__main__":
    main()
