"""Names under which the models are asked for: `lda`, `lda:alpha=2`, `before`, `after`.

A pair with a name of its own is asked for as `NAME`, `NAME:alpha=2`, `NAME:before`, `NAME:after`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from deployments.schemas import InvalidRequest

DEFAULT = "lda"
_ALPHA = "alpha="
_FIXED = {"after": 0.0, "before": -1.0}
ALONE = frozenset(_FIXED)  # names without a pair in front
_DEFAULT_ALPHA = 1.0


def replica_deployment(pair: str | None) -> str:
    """What Serve calls the replicas of a pair: None, the only one of an application."""
    return "LDAReplica" if pair is None else f"LDAReplica-{pair}"


class Named(NamedTuple):
    pair: str
    alpha: float


def names(pairs: Sequence[str] = (DEFAULT,)) -> list[str]:
    """What `GET /v1/models` lists; `:alpha=A` can be put behind each pair's own name."""
    found = []
    for pair in pairs:
        found += [pair] + [name if pair == DEFAULT else f"{pair}:{name}" for name in _FIXED]
    return found


def resolve(model: str, alpha: float | None, pairs: Sequence[str] = (DEFAULT,)) -> Named:
    """The pair and the alpha of a request.

    Raises InvalidRequest: there is no such name (code "model_not_found", answered with 404), name
    and field say different alphas, or what the name says is no number.
    """
    pair, colon, rest = model.partition(":")
    if not colon and model in _FIXED and DEFAULT in pairs:
        pair, rest = DEFAULT, model
    if pair not in pairs or (colon and not rest):
        raise _unknown(pairs)
    said: float | None = None
    if rest.startswith(_ALPHA):
        said = _number(rest.removeprefix(_ALPHA))
    elif rest:
        said = _FIXED.get(rest)
        if said is None:
            raise _unknown(pairs)
    if said is not None and alpha is not None and said != alpha:
        raise InvalidRequest("alpha", f"contradicts the model's name, which says {said:g}")
    for value in (said, alpha):
        if value is not None:
            return Named(pair, value)
    return Named(pair, _DEFAULT_ALPHA)


def _number(text: str) -> float:
    try:
        value = float(text) if text.isascii() and "_" not in text else math.nan
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidRequest("model", "the alpha in its name must be a finite number")
    return value


def _unknown(pairs: Sequence[str]) -> InvalidRequest:
    known = ", ".join(names(pairs))
    message = f"there is none of that name; there are {known}, and {pairs[0]}:alpha=NUMBER"
    return InvalidRequest("model", message, "model_not_found")
