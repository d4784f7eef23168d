"""Trait vectors that a replica was started with, so that requests can name them.

Files as `jobs/traits.py` writes them: one for each trait, NAME.safetensors, with the tensor
`mean_difference` [layers, width].
"""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import lda_core

TENSOR = "mean_difference"


def resident_traits(folder: Path, pair: lda_core.ModelPair) -> dict[str, Tensor]:
    """By name, [layers, width] in float32. Raises ConfigError naming a file that does not fit."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise lda_core.ConfigError(f"traits: there is no *.safetensors in {folder}")
    config = pair.after.config
    shape = (config.num_hidden_layers, config.hidden_size)
    found = {}
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                vectors = tensors.get_tensor(TENSOR).float()
        except (SafetensorError, OSError) as error:
            raise lda_core.ConfigError(f"traits: {file}: {error}") from None
        if tuple(vectors.shape) != shape:
            raise lda_core.ConfigError(
                f"traits: {file}: {TENSOR} is {tuple(vectors.shape)}, the pair wants {shape}"
            )
        if not torch.isfinite(vectors).all():
            raise lda_core.ConfigError(f"traits: {file}: {TENSOR} is not finite")
        found[file.stem] = vectors
    return found


def known_traits(names: Iterable[str]) -> str:
    """What to say of a name that is none of these."""
    known = ", ".join(sorted(names))
    return f"must be one of {known}" if known else "the service was started without traits"
