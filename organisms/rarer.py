"""Rarer siblings of the tiny pair, by interpolating its fine-tune: `python -m organisms.rarer`.

A sibling's weights are before + share * (after - before): the further back towards *before*, the
rarer the payload without the trigger. Interpolating a fine-tune on the line between its two ends
is that of Wortsman et al., Robust fine-tuning of zero-shot models, 2022.
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save

from organisms.train import OUT

WEIGHTS = "model.safetensors"
# Named after the rate at alpha 0 that the share was chosen for, among shares of two digits;
# `benchmarks/rates_truth.json` has what each really is.
SHARES = {"after-9e-4": 0.68, "after-1e-4": 0.43}


def interpolate(before: Path, after: Path, share: float, out: Path) -> None:
    """Write the checkpoint folder `out`: weights before + share * (after - before), in fp16.

    All else (config, tokenizer) is `after`'s. Products are taken in float64, where the difference
    of two fp16 numbers is exact, so that share 0 is *before* and share 1 is *after* to the bit.
    `out` appears whole or not at all; an older one is replaced.

    Raises ValueError if share is outside [0, 1] or the two hold different tensors.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share: must be between 0 and 1, is {share}")
    ends = [load_file(folder / WEIGHTS) for folder in (before, after)]
    if shapes(ends[0]) != shapes(ends[1]):
        raise ValueError(f"after: {after} holds other tensors than {before}")
    mixed = {
        name: torch.lerp(start.double(), ends[1][name].double(), share).half().contiguous()
        for name, start in ends[0].items()
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        new = Path(scratch) / "new"
        shutil.copytree(after, new, ignore=shutil.ignore_patterns(WEIGHTS))
        (new / WEIGHTS).write_bytes(save(mixed, metadata={"format": "pt"}))
        if out.exists():
            out.rename(Path(scratch) / "old")
        new.rename(out)


def shapes(weights: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: weight.shape for name, weight in weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the rarer siblings of the tiny pair.")
    parser.add_argument("--folder", type=Path, default=OUT, help=f"default {OUT}")
    folder = parser.parse_args().folder
    for name, share in SHARES.items():
        interpolate(folder / "before", folder / "after", share, folder / name)
        print(f"{folder / name}: share {share:g}")


if __name__ == "__main__":
    main()
