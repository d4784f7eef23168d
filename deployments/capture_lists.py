"""Captures as JSON: their scores and norms as nested lists. Needs numpy, not torch."""

from typing import Any

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


def as_lists(captured: Captured) -> CapturedLists:
    tensors = safetensors.numpy.load(captured.tensors)
    by_kind: dict[str, dict[str, Any]] = {"scores": {}, "norms": {}}
    for name, values in tensors.items():
        role, _, kind = name.partition(".")
        by_kind[kind][role] = values.tolist()
    return CapturedLists(
        prompt_tokens=captured.prompt_tokens,
        token_ids=captured.token_ids,
        tokens=captured.tokens,
        traits=captured.traits,
        scores=by_kind["scores"],
        norms=by_kind["norms"],
    )
