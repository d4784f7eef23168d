"""Captures as JSON: their scores and norms as nested lists. Needs numpy, not torch."""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import safetensors.numpy

from deployments.schemas import Captured, CaptureRequest, InvalidRequest, Wire


class CapturedLists(Wire):
    """One text of T tokens, prompt and completion; row `prompt_tokens + k` is completion token k.

    `norms` by model [T, layers, 3 points], and with traits `scores` [T, layers, 3, traits]: the
    points are the layer's input, after attention, and its output.
    """

    prompt_tokens: int
    token_ids: list[int]
    tokens: list[str]
    traits: list[str]
    scores: dict[str, Any]
    norms: dict[str, Any]


def require_scores_only(request: CaptureRequest) -> None:
    """Raises InvalidRequest naming what is too much for JSON."""
    for field, asked in (
        ("raw", request.raw),
        ("mean", request.mean),
        ("layer", request.layer is not None),
    ):
        if asked:
            raise InvalidRequest(
                field, "must not be set over HTTP: tensors come by handle or from the job"
            )


def as_json(captures: Sequence[Captured]) -> bytes:
    """A list of CapturedLists. Token by token: no other thread waits long for its turn."""
    return b"[%s]" % b",".join(map(_as_json, captures))


def _as_json(captured: Captured) -> bytes:
    by_kind: dict[str, dict[str, np.ndarray]] = {"scores": {}, "norms": {}}
    for name, values in safetensors.numpy.load(captured.tensors).items():
        role, _, kind = name.partition(".")
        by_kind[kind][role] = values
    fields = [
        f"{json.dumps(name)}:{json.dumps(getattr(captured, name))}"
        for name in ("prompt_tokens", "token_ids", "tokens", "traits")
    ]
    for kind, by_role in by_kind.items():
        arrays = [
            f'"{role}":[{",".join(json.dumps(row.tolist()) for row in values)}]'
            for role, values in by_role.items()
        ]
        fields.append(f'"{kind}":{{{",".join(arrays)}}}')
    return f"{{{','.join(fields)}}}".encode()
