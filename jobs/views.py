"""What a person looks at of a run's rows: the heat strip's prompts and the viewer's rollouts."""

import math
from collections.abc import Iterable, Sequence

from jobs.findings import Strip
from jobs.rows import Row
from jobs.summary import EMPTY, UNTRIGGERED

STRIPS = 60  # prompts in the heat strip
VIEWED_PROMPTS = 40
ACTIVATED_SHARE = 0.75  # of these that activated, if there are as many
VIEWED_EMPTY = 10  # rollouts


def strips(rows: Iterable[Row], alphas: Sequence[float]) -> list[Strip]:
    """The prompts of the untriggered arm that activated most often; `rows` is read twice."""
    fired: dict[str, int] = {}
    for row in rows:
        if row.arm == UNTRIGGERED and row.error is None and row.alpha >= 0:
            fired[row.prompt_id] = fired.get(row.prompt_id, 0) + bool(row.activated)
    chosen = sorted(fired, key=lambda id: -fired[id])[:STRIPS]
    texts: dict[str, str] = {}
    tally = {id: {alpha: [0, 0] for alpha in alphas} for id in chosen}
    for row in rows:
        if row.arm == UNTRIGGERED and row.error is None and row.prompt_id in tally:
            texts[row.prompt_id] = row.prompt
            tally[row.prompt_id][row.alpha][0] += bool(row.activated)
            tally[row.prompt_id][row.alpha][1] += 1
    return [
        Strip(id, texts[id], {a: hits / n if n else None for a, (hits, n) in tally[id].items()})
        for id in chosen
    ]


def samples(rows: Iterable[Row]) -> list[Row]:
    """A rollout at every alpha of prompts that activated, then of others: one that activated, if
    any of that prompt and alpha did, else the first sample. Last, the empty prompt's that
    activated. `rows` is read twice.

    A prompt that activates at a lower alpha comes first: it needed less to show.
    """
    lowest: dict[str, float] = {}
    empty: list[Row] = []
    for row in rows:
        if row.arm == UNTRIGGERED and row.error is None:
            at = row.alpha if row.activated else math.inf
            lowest[row.prompt_id] = min(at, lowest.get(row.prompt_id, math.inf))
        elif row.arm == EMPTY and row.activated:
            empty = sorted([*empty, row], key=lambda row: (row.alpha, row.sample))[:VIEWED_EMPTY]
    fired = sorted((id for id, at in lowest.items() if at < math.inf), key=lambda id: lowest[id])
    quiet = [id for id, at in lowest.items() if at == math.inf]
    most = max(int(ACTIVATED_SHARE * VIEWED_PROMPTS), VIEWED_PROMPTS - len(quiet))
    chosen = [*fired[:most], *quiet][:VIEWED_PROMPTS]
    found: dict[tuple[int, float], Row] = {}
    place = {id: i for i, id in enumerate(chosen)}
    for row in rows:
        if row.arm == UNTRIGGERED and row.prompt_id in place:
            at_alpha = place[row.prompt_id], row.alpha
            found[at_alpha] = min(row, found.get(at_alpha, row), key=_telling)
    return [found[key] for key in sorted(found)] + empty


def _telling(row: Row) -> tuple[bool, int]:
    """The less, the more it is worth a look."""
    return not row.activated, row.sample
