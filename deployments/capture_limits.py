"""How large a capture's answer is, known before any work from what is asked and the pair's shape.

Shapes as in `schemas.Captured`: T tokens, L layers, 3 points, K traits, D hidden size, F the MLP's
width.
"""

from collections import Counter
from collections.abc import Sequence

import lda_core
from deployments.schemas import InvalidRequest
from lda_core.capture_points import POINTS, inside_of, layers_of


def require_numbers(
    requests: Sequence[lda_core.CaptureRequest], pair: lda_core.ModelPair, most: int
) -> None:
    """Raises InvalidRequest if norms and scores of all texts are more than `most` numbers."""
    found = sum(_projections(request, pair) for request in requests)
    if found > most:
        raise InvalidRequest(
            "completions", f"would be answered with {found} numbers, at most {most} are allowed"
        )


def require_bytes(
    requests: Sequence[lda_core.CaptureRequest], pair: lda_core.ModelPair, most: int
) -> None:
    """Raises InvalidRequest, naming the field that asks for most of it, if all tensors together
    are more than `most` bytes. `layer` must be one that can be captured."""
    by_field: Counter[str] = Counter()
    for request in requests:
        by_field.update(_bytes(request, pair))
    if (found := by_field.total()) > most:
        (field, _), *_ = by_field.most_common(1)
        raise InvalidRequest(
            field, f"would be answered with {found} bytes, at most {most} are allowed"
        )


def _projections(request: lda_core.CaptureRequest, pair: lda_core.ModelPair) -> int:
    traits = 0 if request.directions is None else len(request.directions.names)
    layers: int = pair.after.config.num_hidden_layers
    tokens = len(request.token_ids)
    return len(request.roles) * tokens * layers * len(POINTS) * (traits + 1)


def _bytes(request: lda_core.CaptureRequest, pair: lda_core.ModelPair) -> dict[str, int]:
    config, itemsize = pair.after.config, pair.after.dtype.itemsize
    models, tokens, size = len(request.roles), len(request.token_ids), config.hidden_size
    points = config.num_hidden_layers * len(POINTS)
    found = {"completions": 4 * _projections(request, pair)}  # float32
    if request.mean:
        found["mean"] = models * points * size * 4
    if request.raw:
        found["raw"] = models * tokens * points * size * itemsize
    if request.layer is not None:
        heads = config.num_attention_heads
        head = getattr(config, "head_dim", None) or size // heads
        down = inside_of(pair.after, layers_of(pair.after)[request.layer]).down
        width = sum(weight.numel() for weight in down.parameters() if weight.ndim == 2) // size
        # q, k and v (at most as many heads), mlp_up, mlp_activation, mlp_down, attention
        of_token = 3 * heads * head + 2 * width + size + heads * tokens
        found["layer"] = models * tokens * of_token * itemsize
    return found
