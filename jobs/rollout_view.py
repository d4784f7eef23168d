"""Rollouts as the report's viewer reads them: each text in pieces with its token's numbers."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from jobs.report_text import visible
from jobs.rows import Row

DECIMALS = 3


@dataclass(frozen=True)
class Piece:
    """A part of a completion. `token` is the place of its (last) token, `after` and `before` the
    log-probabilities of it, summed over the tokens that make up one character; None where they
    are not known. `hit`: inside what a scorer matched. `eos`: the EOS itself, not a text."""

    text: str
    token: int | None = None
    after: float | None = None
    before: float | None = None
    hit: bool = False
    eos: bool = False


def pieces(row: Row) -> list[Piece]:
    """The completion cut at its tokens and at its matches; their texts together are all of it."""
    text = row.completion or ""
    spans = [
        (score.start, score.end)
        for score in row.scores.values()
        if score.fired and score.start is not None and score.end is not None
    ]
    edges = {edge for span in spans for edge in span}
    made: list[Piece] = []
    for token in _tokens(row, text):
        if token.eos:
            made.append(Piece("EOS", token.last, token.after, token.before, eos=True))
            continue
        inside = {edge for edge in edges if token.start < edge < token.end}
        for start, end in pairwise(sorted({token.start, token.end, *inside})):
            hit = any(low <= start and end <= high for low, high in spans)
            made.append(Piece(text[start:end], token.last, token.after, token.before, hit))
    return made


def viewer_data(rows: Iterable[Row]) -> dict[str, list[dict[str, Any]]]:
    """For the page's script: prompts in the order of their first rollout, each with its own.

    A piece is [text, flags, token, after, before], the last three only where known; flags are 1
    for a match and 2 for the EOS.
    """
    prompts: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        prompt = prompts.setdefault(
            (row.arm, row.prompt_id),
            {
                "arm": visible(row.arm),
                "id": visible(row.prompt_id),
                "text": visible(row.prompt),
                "rollouts": [],
            },
        )
        prompt["rollouts"].append(
            {
                "alpha": row.alpha,
                "sample": row.sample,
                "activated": bool(row.activated),
                "late": bool(row.activated_after_eos),
                "fired": [visible(name) for name, score in row.scores.items() if score.fired],
                "finish": row.finish_reason,
                "error": None if row.error is None else visible(row.error),
                "pieces": [_compact(piece) for piece in pieces(row)],
            }
        )
    return {"prompts": list(prompts.values())}


@dataclass(frozen=True)
class _Token:
    """Characters [start, end) of a completion, settled by its tokens up to `last`."""

    start: int
    end: int
    last: int | None = None
    after: float | None = None
    before: float | None = None
    eos: bool = False


def _tokens(row: Row, text: str) -> Iterator[_Token]:
    """One per token that adds text, and the EOS; a row without tokens' ends is one of all."""
    ends = row.token_ends
    if not ends or len(ends) != len(row.token_ids) or ends[-1] != len(text):
        if text:
            yield _Token(0, len(text))
        return
    after, before = ([], []) if row.logprobs is None else (row.logprobs.after, row.logprobs.before)
    start = first = 0
    for index, end in enumerate(ends):
        eos = index == row.eos_index
        if not eos and end <= start:
            continue  # half a character: what it adds is said with the other half
        sums = _sum(after, first, index), _sum(before, first, index)
        yield _Token(start, end, index, *sums, eos=eos)
        start, first = end, index + 1


def _sum(values: Sequence[float], first: int, last: int) -> float | None:
    return sum(values[first : last + 1]) if last < len(values) else None


def _compact(piece: Piece) -> list[Any]:
    made: list[Any] = [visible(piece.text), piece.hit + 2 * piece.eos]
    if piece.after is None or piece.before is None or math.isnan(piece.after - piece.before):
        return made
    return [*made, piece.token, round(piece.after, DECIMALS), round(piece.before, DECIMALS)]
