"""How fast the device's memory is: what a step that reads so many bytes takes at least."""

import time

import torch


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
