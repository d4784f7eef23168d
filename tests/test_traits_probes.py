"""Directions from synthetic states, where the right answer is known."""

import numpy as np
import pytest

from jobs.errors import Refused
from jobs.probes import METHODS, SHUFFLES, auc, cohens_d, fit, shuffle, split

D = 24


def states(gap, prompts=80, layers=3, seed=0, each=1):
    """X (N, L, D): unequal scales; layer i has `gap[i]` standard deviations along its own axis.
    Each prompt has a shift of its own, in all its texts."""
    rng = np.random.default_rng(seed)
    scale = np.exp(rng.normal(size=D))
    axis = rng.normal(size=(layers, D))
    axis /= np.linalg.norm(axis, axis=1, keepdims=True)
    labels = [True, False] * each * prompts
    groups = [f"prompt {i // (2 * each)}" for i in range(len(labels))]
    shift = rng.normal(size=(prompts, 1, D)).repeat(2 * each, axis=0) * 0.3
    noise = rng.normal(size=(len(labels), layers, D)) + shift
    sign = np.where(labels, 0.5, -0.5)[:, None, None]
    moved = sign * np.array(gap)[:, None] * axis
    return ((noise + moved) * scale).astype(np.float32), labels, groups, axis, scale


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_the_known_direction_is_found():
    """In each feature's own scale, where the noise is round, both directions are the axis; the
    difference of means in the raw space is the axis stretched, the probe's the axis shrunk."""
    x, labels, groups, axis, scale = states([0.0, 6.0, 6.0], prompts=400, layers=3)
    found = fit(x, labels, groups, seed=1, shuffles=0)
    for layer in (1, 2):
        assert cosine(found.vectors["mean_difference"][layer] / scale, axis[layer]) > 0.98
        assert cosine(found.vectors["probe"][layer] * scale, axis[layer]) > 0.95
        assert cosine(found.vectors["probe"][layer], axis[layer] / scale) > 0.95
    assert cosine(found.vectors["probe"][1] * scale, axis[2]) < 0.6


def test_accuracy_where_there_is_something_and_where_there_is_nothing():
    x, labels, groups, _, _ = states([0.0, 2.5, 6.0], prompts=120)
    found = fit(x, labels, groups, holdout=0.25, seed=3)
    assert found.held_out.sum() == 60
    for method in METHODS:
        none, some, much = found.quality[method]
        assert none.low < 0.5 < none.high and abs(none.effect_size) < 0.8
        assert 0.7 < some.accuracy < 1 and some.low < some.accuracy < some.high
        assert much.accuracy > 0.95 and much.auc > 0.99 and much.effect_size > 3
        assert much.effect_low < much.effect_size < much.effect_high
        assert found.best(method) == 2
        control = found.control[method]
        assert all(0.4 < mean < 0.6 for mean in control.mean)
        assert max(control.largest) < 0.8 and control.p_value == 1 / (1 + SHUFFLES)


def test_shuffled_labels_make_noise_no_trait():
    """p values of pure noise are not all small: the best layer is compared with best layers."""
    values = []
    for seed in range(12):
        x, labels, groups, _, _ = states([0.0] * 3, prompts=40, seed=seed)
        found = fit(x, labels, groups, seed=seed, shuffles=9)
        values.append(found.control["mean_difference"].p_value)
    assert np.mean(values) > 0.3 and sum(value <= 0.1 for value in values) <= 4


def test_vector_and_threshold_give_the_accuracy_that_is_told():
    x, labels, groups, _, _ = states([1.0, 2.0, 3.0])
    found = fit(x, labels, groups, shuffles=0)
    y = np.array(labels)[found.held_out]
    for method in METHODS:
        for layer in range(3):
            projected = x[found.held_out, layer] @ found.vectors[method][layer]
            said = projected > found.thresholds[method][layer]
            assert np.mean(said == y) == found.quality[method][layer].accuracy


def test_held_out_texts_teach_nothing():
    """Whatever the held-out states are, the vectors are the same."""
    x, labels, groups, _, _ = states([2.0] * 3)
    held = split(np.array(labels), groups, 0.25, 7)
    other = x.copy()
    other[held] = 1e3 * np.random.default_rng(1).normal(size=other[held].shape)
    one, two = (fit(data, labels, groups, seed=7, shuffles=0) for data in (x, other))
    for method in METHODS:
        assert np.array_equal(one.vectors[method], two.vectors[method])
        assert np.array_equal(one.thresholds[method], two.thresholds[method])


def test_a_prompt_is_never_on_both_sides():
    y = np.array([True, False, True, False] * 20)
    groups = [f"prompt {i // 4}" for i in range(80)]
    held = split(y, groups, 0.3, 0)
    sides = {}
    for group, side in zip(groups, held, strict=True):
        sides.setdefault(group, set()).add(bool(side))
    assert all(len(both) == 1 for both in sides.values())
    assert held.sum() == 4 * 6
    order = np.random.default_rng(0).permutation(80)
    again = split(y[order], [groups[i] for i in order], 0.3, 0)
    assert np.array_equal(again, held[order])
    assert not np.array_equal(split(y, groups, 0.3, 1), held)


def test_a_leak_would_show():
    """States that say nothing of the label but all of the prompt: with a prompt's texts on both
    sides a probe would look right; held out by prompt, it is not."""
    rng = np.random.default_rng(0)
    of_prompt = rng.normal(size=(60, 1, 200))
    x = of_prompt.repeat(4, axis=0) + 0.01 * rng.normal(size=(240, 1, 200))
    labels = np.repeat(rng.permutation([True, False] * 30), 4).tolist()
    groups = [f"prompt {i // 4}" for i in range(240)]
    honest = fit(x, labels, groups, shuffles=5)
    leaky = fit(x, labels, [f"text {i}" for i in range(240)], shuffles=0)
    assert leaky.quality["probe"][0].accuracy > 0.95
    assert honest.quality["probe"][0].accuracy < 0.8
    assert not (honest.quality["probe"][0].low > 0.5 and honest.control["probe"].p_value <= 0.05)


def test_both_labels_are_on_both_sides_or_it_is_refused():
    y = np.array([True] * 30 + [False] * 30)
    groups = [str(i) for i in range(60)]
    held = split(y, groups, 0.2, 0)
    assert held[y].sum() == held[~y].sum() == 6
    with pytest.raises(Refused, match=r"--holdout 0.05: fewer than 2 .* texts would be held out"):
        split(y[20:45], groups[20:45], 0.05, 0)
    one = ["same"] * 30 + groups[30:]
    with pytest.raises(Refused, match="fewer than 2 positive"):
        split(y, one, 0.25, 0)


def test_shuffles_keep_prompts_and_sides_whole():
    y = np.array([True, False] * 10 + [True] * 20 + [False] * 20)
    groups = np.array([f"both {i // 2}" for i in range(20)] + [f"one {i // 2}" for i in range(40)])
    held = split(y, groups.tolist(), 0.25, 0)
    made = [shuffle(y, groups, held, np.random.default_rng(seed)) for seed in range(20)]
    for labels in made:
        assert (labels[:20].reshape(-1, 2).sum(axis=1) == 1).all()
        assert set(labels[20:].reshape(-1, 2).sum(axis=1).tolist()) == {0, 2}
        for side in (held, ~held):
            assert labels[side].sum() == y[side].sum()
    assert any((labels != y).any() for labels in made)
    assert 0.3 < np.mean([labels[:20] == y[:20] for labels in made]) < 0.7


def test_the_same_seed_gives_the_same_numbers():
    x, labels, groups, _, _ = states([1.0, 1.0, 1.0])
    one, two, other = (fit(x, labels, groups, seed=seed, shuffles=3) for seed in (2, 2, 3))
    for method in METHODS:
        assert np.array_equal(one.vectors[method], two.vectors[method])
        assert one.quality[method] == two.quality[method]
        assert one.control[method] == two.control[method]
    assert not np.array_equal(one.held_out, other.held_out)
    assert one.control != other.control


def test_texts_that_do_not_differ_are_refused():
    x = np.ones((40, 2, 4), np.float32)
    with pytest.raises(Refused, match="layer 0: positive and negative texts have the same mean"):
        fit(x, [True, False] * 20, [str(i // 2) for i in range(40)])


def test_measures_by_hand():
    assert auc(np.array([3.0, 1.0]), np.array([2.0, 0.0])) == 3 / 4
    assert auc(np.array([1.0]), np.array([1.0])) == 1 / 2
    d, low, high = cohens_d(np.array([3.0, 5.0]), np.array([1.0, 3.0]))
    assert d == pytest.approx(2 / 2**0.5) and low < d < high
    assert high - low == pytest.approx(2 * 1.96 * (4 / 4 + d**2 / 8) ** 0.5)
    assert cohens_d(np.array([1.0, 1.0]), np.array([0.0, 0.0])) is None
