"""What the numbers were measured on: its name, its memory's speed, and the peak that was used."""

import os
import platform
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
