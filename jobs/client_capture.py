"""Captured activations as a client has them: arrays, however they travelled."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deployments.schemas import Captured


@dataclass(frozen=True, eq=False)
class Activations:
    """One text of T tokens, prompt and completion; row `prompt_tokens + k` is completion token k.

    By model ("after", "before"), over L layers and three points (the layer's input, after
    attention, its output): `norms` (T, L, 3) and along K `traits` `scores` (T, L, 3, K), float32.
    `tensors` has what `raw`, `mean` and `layer` ask for, by their names in `Captured`, as torch
    tensors; over HTTP these are refused.
    """

    prompt_tokens: int
    token_ids: list[int]
    tokens: list[str]
    traits: list[str]
    norms: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    tensors: dict[str, Any] = field(default_factory=dict)


def from_lists(answer: dict[str, Any]) -> Activations:
    """Of JSON."""
    arrays = {
        kind: {role: np.asarray(values, np.float32) for role, values in answer[kind].items()}
        for kind in ("norms", "scores")
    }
    return Activations(**{**answer, **arrays})


def from_tensors(captured: Captured) -> Activations:
    from safetensors.torch import load  # bfloat16, which numpy has not

    tensors: dict[str, Any] = load(captured.tensors)
    arrays: dict[str, dict[str, np.ndarray]] = {"norms": {}, "scores": {}}
    for name in list(tensors):
        role, _, kind = name.partition(".")
        if kind in arrays:
            arrays[kind][role] = tensors.pop(name).numpy()
    return Activations(
        captured.prompt_tokens,
        captured.token_ids,
        captured.tokens,
        captured.traits,
        **arrays,
        tensors=tensors,
    )
