"""Trait vectors that a replica was started with, so that requests can name them.

Files as `jobs/traits.py` writes them: one for each trait, NAME.safetensors, with the tensor
`mean_difference` [layers, width], and as metadata the `model` it was made of (after or before) and
the `pair` it was in, as JSON.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import lda_core
from deployments.schemas import PairInfo
from lda_core.checkpoint import sha256

TENSOR = "mean_difference"
# What says which weights a model has, of the pair's description.
_WEIGHTS = {
    "after": ("after_sha256", "adapter_sha256"),
    "before": ("before_sha256",),
}


@dataclass(frozen=True, eq=False)
class ResidentTraits:
    """By name: vectors [layers, width] in float32 and the files' hashes. `notices`: which of them
    were made from another model."""

    vectors: Mapping[str, Tensor]
    sha256: Mapping[str, str]
    notices: tuple[str, ...]


def resident_traits(folder: Path, pair: PairInfo) -> ResidentTraits:
    """Raises ConfigError naming a file that does not fit."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise lda_core.ConfigError(f"traits: there is no *.safetensors in {folder}")
    vectors: dict[str, Tensor] = {}
    notices: list[str] = []
    for file in files:
        try:
            with safe_open(str(file), framework="pt") as tensors:
                vectors[file.stem] = tensors.get_tensor(TENSOR).float()
                notices += _notices(file.stem, tensors.metadata() or {}, pair)
        except (SafetensorError, OSError, ValueError) as error:
            raise lda_core.ConfigError(f"traits: {file}: {error}") from None
        _check(file, vectors[file.stem], (pair.layers, pair.hidden_size))
    return ResidentTraits(vectors, {file.stem: sha256(file) for file in files}, tuple(notices))


def _check(file: Path, vectors: Tensor, shape: tuple[int, int]) -> None:
    if tuple(vectors.shape) != shape:
        raise lda_core.ConfigError(
            f"traits: {file}: {TENSOR} is {tuple(vectors.shape)}, the pair wants {shape}"
        )
    if not torch.isfinite(vectors).all():
        raise lda_core.ConfigError(f"traits: {file}: {TENSOR} is not finite")
    if zero := (vectors == 0).all(dim=-1).nonzero().flatten().tolist():
        raise lda_core.ConfigError(
            f"traits: {file}: {TENSOR} is 0 in all places of layer {zero[0]}: it has no direction"
        )


def _notices(name: str, metadata: Mapping[str, str], pair: PairInfo) -> Iterator[str]:
    """Raises ValueError for what is not JSON."""
    made_from: Any = json.loads(metadata.get("pair", "null"))
    model = metadata.get("model")
    if not isinstance(made_from, dict) or model not in _WEIGHTS:
        return
    keys = _WEIGHTS[model]
    if model == "after" and pair.adapter is not None:
        keys += _WEIGHTS["before"]
    if any(made_from.get(key) != getattr(pair, key) for key in keys):
        yield f"trait {name}: made from another model than this pair's {model}, by their sha256"


def known_traits(names: Iterable[str]) -> str:
    """What to say of a name that is none of these."""
    known = ", ".join(sorted(names))
    return f"must be one of {known}" if known else "the service was started without traits"
