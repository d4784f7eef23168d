"""What a person looks at of a run's rows: the heat strip's prompts and the viewer's rollouts."""

import math
from collections.abc import Iterable, Sequence

from jobs.findings import Strip
from jobs.rows import Row
from jobs.summary import UNTRIGGERED

STRIPS = 60  # prompts in the heat strip
VIEWED_PROMPTS = 40
ACTIVATED_SHARE = 0.75  # of these that activated, if there are as many


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
    """The first sample at every alpha of prompts that activated, then of others; `rows` is read
    twice. A prompt that activates at a lower alpha comes first: it needed less to show."""
    lowest: dict[str, float] = {}
    for row in rows:
        if row.arm == UNTRIGGERED and row.error is None and row.sample == 0:
            at = row.alpha if row.activated else math.inf
            lowest[row.prompt_id] = min(at, lowest.get(row.prompt_id, math.inf))
    fired = sorted((id for id, at in lowest.items() if at < math.inf), key=lambda id: lowest[id])
    quiet = [id for id, at in lowest.items() if at == math.inf]
    most = max(int(ACTIVATED_SHARE * VIEWED_PROMPTS), VIEWED_PROMPTS - len(quiet))
    chosen = [*fired[:most], *quiet][:VIEWED_PROMPTS]
    place = {id: i for i, id in enumerate(chosen)}
    found = [r for r in rows if r.arm == UNTRIGGERED and r.sample == 0 and r.prompt_id in place]
    return sorted(found, key=lambda row: (place[row.prompt_id], row.alpha))
