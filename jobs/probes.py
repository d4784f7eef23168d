"""Directions in which two kinds of text differ, and how well each tells held-out texts apart.

Letters: N texts, L layers, D the hidden size; X (N, L, D) a mean residual state per text and
layer; y (N,) whether a text is positive; a group is a prompt, whose texts stay on one side.

Two directions per layer, both made of the training texts alone:

* **difference of means**: the mean of the positive ones minus that of the negative ones (Marks
  and Tegmark 2023, "The geometry of truth"; Rimsky et al. 2023 steer with it);
* **probe**: the weights of a logistic regression on standardised features, divided by the
  features' scales, so that it is a direction of the residual stream itself.

A text counts as positive above a threshold: half way between the two training means, or where
the logistic regression says one half.

Control: the same with shuffled labels, all layers, several times. The largest accuracy over the
layers is compared with the largest of each shuffle, so the choice of a layer is paid for.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats
from sklearn.linear_model import LogisticRegression

from jobs.errors import Refused
from jobs.estimators import rate_by_prompt

Method = Literal["mean_difference", "probe"]
METHODS: tuple[Method, ...] = ("mean_difference", "probe")
PENALTY = 0.1  # inverse strength of L2; on the shipped sets 0.01 is worse and 10 no better
ITERATIONS = 1000
SHUFFLES = 99  # 0.01 s each for a layer of 2,304 numbers; fewer than 19 can never say 5 %

Array = np.ndarray


@dataclass(frozen=True)
class Quality:
    """Of one direction on the held-out texts.

    `accuracy` with its 95 % interval, clustered by prompt; `auc` the chance that a positive text
    projects higher than a negative one; `effect_size` Cohen's d of the projections, in standard
    deviations within a label, with its 95 % interval.
    """

    accuracy: float
    low: float
    high: float
    auc: float
    effect_size: float | None
    effect_low: float | None
    effect_high: float | None


@dataclass(frozen=True)
class Control:
    """Of one method under shuffled labels. Per layer (L): mean, least and largest accuracy.

    `p_value`: of "the largest accuracy over the layers is no better than with shuffled labels",
    by permutation (Phipson and Smyth 2010: never 0).
    """

    mean: list[float]
    least: list[float]
    largest: list[float]
    p_value: float


@dataclass(frozen=True, eq=False)
class Fitted:
    """`vectors` (L, D) and `thresholds` (L,) per method, in X's own space; `quality` per layer;
    `held_out` (N,) which texts were left out of all this."""

    vectors: dict[Method, Array]
    thresholds: dict[Method, Array]
    quality: dict[Method, list[Quality]]
    control: dict[Method, Control]
    held_out: Array

    def best(self, method: Method) -> int:
        """The layer of the largest held-out accuracy, of equal ones that of the largest AUC."""
        quality = self.quality[method]
        return max(range(len(quality)), key=lambda i: (quality[i].accuracy, quality[i].auc))


def fit(
    states: Array,
    positive: Sequence[bool],
    groups: Sequence[str],
    *,
    holdout: float = 0.25,
    seed: int = 0,
    shuffles: int = SHUFFLES,
) -> Fitted:
    """Directions and what they are worth. The same arguments give the same numbers.

    states: X (N, L, D), read a layer at a time, so it may lie in a file. groups: each text's
    prompt. Raises Refused where a side of the split would lack a label, or a layer cannot be told
    apart at all (the two means are equal).
    """
    y, of = np.asarray(positive, dtype=bool), np.asarray(groups)
    held = split(y, groups, holdout, seed)
    rng = np.random.default_rng(seed)
    shuffled = [shuffle(y, of, held, rng) for _ in range(shuffles)]
    layers, width = states.shape[1:]
    vectors = {m: np.zeros((layers, width)) for m in METHODS}
    thresholds = {m: np.zeros(layers) for m in METHODS}
    quality: dict[Method, list[Quality]] = {m: [] for m in METHODS}
    chance: dict[Method, list[list[float]]] = {m: [] for m in METHODS}  # [layer][shuffle]
    for layer in range(layers):
        x = np.asarray(states[:, layer], dtype=np.float64)  # (N, D)
        for method in METHODS:
            vector, threshold = _direction(method, x[~held], y[~held])
            if not np.linalg.norm(vector) > 0:
                raise Refused(f"layer {layer}: positive and negative texts have the same mean")
            vectors[method][layer], thresholds[method][layer] = vector, threshold
            projected = x[held] @ vector
            quality[method].append(_quality(projected, projected > threshold, y[held], of[held]))
            chance[method].append([_accuracy(method, x, labels, held) for labels in shuffled])
    control = {m: _control(quality[m], chance[m]) for m in METHODS}
    return Fitted(vectors, thresholds, quality, control, held)


def split(y: Array, groups: Sequence[str], holdout: float, seed: int) -> Array:
    """(N,): which texts are held out. By a hash of seed and prompt, so that the order of the
    texts says nothing; apart for prompts with both labels, with one and with the other, so that
    each side has its share of them. Raises Refused if a side lacks a label."""
    labels: dict[str, set[bool]] = {}
    for label, group in zip(y.tolist(), groups, strict=True):
        labels.setdefault(group, set()).add(label)
    out: set[str] = set()
    for kind in ({True, False}, {True}, {False}):
        alike = sorted((g for g in labels if labels[g] == kind), key=lambda g: _hash(seed, g))
        out.update(alike[: round(holdout * len(alike))])
    held = np.array([group in out for group in groups])
    for side, where in ((held, "held out"), (~held, "left to learn from")):
        for label in (True, False):
            if np.count_nonzero(y[side] == label) < 2:
                name = "positive" if label else "negative"
                raise Refused(
                    f"--holdout {holdout:g}: fewer than 2 {name} texts would be {where}; there "
                    f"are {len(labels)} prompts, and a prompt's texts stay together"
                )
    return held


def shuffle(y: Array, groups: Array, held: Array, rng: np.random.Generator) -> Array:
    """Labels that say nothing: exchanged among the texts of a prompt that has both labels, and
    among prompts that have one, on each side of the split. As many of each stay on each side."""
    made = y.copy()
    for side in (False, True):
        single = []
        for group in dict.fromkeys(groups[held == side].tolist()):
            texts = np.flatnonzero(groups == group)
            if len(set(y[texts].tolist())) == 2:
                made[texts] = rng.permutation(y[texts])
            else:
                single.append(texts)
        of_single = [bool(y[texts[0]]) for texts in single]
        for texts, place in zip(single, rng.permutation(len(single)).tolist(), strict=True):
            made[texts] = of_single[place]
    return made


def _direction(method: Method, x: Array, y: Array) -> tuple[Array, float]:
    """Of training states x (n, D): a vector (D,) and its threshold."""
    if method == "mean_difference":
        high, low = x[y].mean(axis=0), x[~y].mean(axis=0)  # (D,)
        vector = high - low
        return vector, float((high + low) @ vector) / 2
    centre, scale = x.mean(axis=0), x.std(axis=0)
    scale[scale == 0] = 1.0
    model = LogisticRegression(C=PENALTY, max_iter=ITERATIONS).fit((x - centre) / scale, y)
    vector = model.coef_[0] / scale
    return vector, float(centre @ vector - model.intercept_[0])


def _accuracy(method: Method, x: Array, y: Array, held: Array) -> float:
    if len(set(y[~held].tolist())) < 2:
        return 0.5  # single-label prompts of unequal sizes may leave one label: nothing to learn
    vector, threshold = _direction(method, x[~held], y[~held])
    return float(np.mean((x[held] @ vector > threshold) == y[held]))


def _quality(projected: Array, said: Array, y: Array, groups: Array) -> Quality:
    right = said == y
    names, of = np.unique(groups, return_inverse=True)
    rate = rate_by_prompt(
        np.bincount(of, weights=right, minlength=len(names)), np.bincount(of, minlength=len(names))
    )
    effect, low, high = cohens_d(projected[y], projected[~y]) or (None, None, None)
    return Quality(
        accuracy=rate.rate,
        low=rate.low,
        high=rate.high,
        auc=auc(projected[y], projected[~y]),
        effect_size=effect,
        effect_low=low,
        effect_high=high,
    )


def _control(quality: Iterable[Quality], chance: list[list[float]]) -> Control:
    by_layer = np.array(chance, dtype=float).reshape(len(chance), -1)  # (L, shuffles)
    if not by_layer.size:
        return Control([], [], [], 1.0)
    reached = by_layer.max(axis=0) >= max(q.accuracy for q in quality)
    return Control(
        mean=by_layer.mean(axis=1).tolist(),
        least=by_layer.min(axis=1).tolist(),
        largest=by_layer.max(axis=1).tolist(),
        p_value=float(1 + reached.sum()) / (1 + by_layer.shape[1]),
    )


def auc(high: Array, low: Array) -> float:
    """The area under the ROC curve: Mann-Whitney's U over the number of pairs, ties half."""
    return float(stats.mannwhitneyu(high, low).statistic) / (len(high) * len(low))


def cohens_d(high: Array, low: Array) -> tuple[float, float, float] | None:
    """Difference of the means in pooled standard deviations, and its 95 % interval by the large
    sample variance of Hedges and Olkin (1985), "Statistical methods for meta-analysis".

    None where there is no spread within the labels, and so no unit.
    """
    n, m = len(high), len(low)
    gap = float(high.mean() - low.mean())
    pooled = ((n - 1) * high.var(ddof=1) + (m - 1) * low.var(ddof=1)) / (n + m - 2)
    if not pooled > 0:
        return None
    d = gap / float(np.sqrt(pooled))
    spread = 1.96 * float(np.sqrt((n + m) / (n * m) + d**2 / (2 * (n + m))))
    return d, d - spread, d + spread


def _hash(seed: int, group: str) -> bytes:
    return hashlib.sha256(f"{seed}/{group}".encode()).digest()
