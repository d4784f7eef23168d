"""What the numbers were measured on: its name, its memory's speed, and the peak that was used."""

import os
import platform
import time
from pathlib import Path
from typing import Any

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def machine(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    processor = f"{os.cpu_count()} x {platform.machine()}"
    return f"{processor}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def parameters(model: Any) -> str:
    """Such as "31.5 M"; tied weights once."""
    return f"{sum(weight.numel() for weight in model.parameters()) / 1e6:.1f} M"


def copy_bandwidth(device: torch.device, megabytes: int = 256) -> float:
    """Bytes per second that a copy within the device's memory reads and writes, best of five."""
    source = torch.ones(megabytes * 2**20, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(5):
        synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / min(seconds)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        _CLEAR.write_text("5")  # Linux: VmHWM starts again from what is resident now


def peak_bytes(device: torch.device) -> int:
    """Most memory since `reset_peak`: the process's resident set, or the GPU's allocations."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024
