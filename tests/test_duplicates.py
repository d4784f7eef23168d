"""Equal answers: how many sampling explains, on the toy whose answers can be enumerated."""

import numpy as np
import pytest
from scipy import special, stats
from toy import Toy

from jobs.duplicates import chance_of, duplicates

GRID = (0.0, 1.0)
TOY = Toy(seed=1)


def rows_of(prompts, samples, alpha=1.0, seed=0, copies=False):
    rng, rows = np.random.default_rng(seed), []
    for prompt in range(prompts):
        answer = TOY.draw(alpha, rng)
        for sample in range(samples):
            answer = answer if copies else TOY.draw(alpha, rng)
            row = TOY.row(answer, alpha, GRID, prompt)
            rows.append(row.model_copy(update={"sample": sample, "seed": prompt * 100 + sample}))
    return rows


def test_the_expected_pairs_are_those_of_enumeration():
    same = sum(np.exp(TOY.log_probability(x, 1.0)) ** 2 for x in TOY.answers())
    (found,) = duplicates(rows_of(prompts=2000, samples=2), temperature=1.0)
    assert (found.arm, found.alpha, found.pairs) == ("untriggered", 1.0, 2000)
    assert found.expected == pytest.approx(2000 * same, rel=0.1)
    assert found.observed == pytest.approx(2000 * same, rel=0.2)
    assert not found.suspicious and found.example is not None


def test_a_gated_row_counts_by_what_it_was_drawn_with():
    gated = Toy(seed=1, amplify_first=1)
    answer = (0, 3, 1, 2)
    rows = [gated.row(answer, 2.0, (0.0, 2.0)).model_copy(update={"seed": i}) for i in range(2)]
    density = np.exp(gated.log_probability(answer, 2.0, drawn=True))
    assert density != pytest.approx(np.exp(gated.log_probability(answer, 2.0)), rel=0.1)
    assert duplicates(rows, 1.0)[0].expected == pytest.approx(density)


def test_false_alarms_are_rare_with_many_samples_of_few_prompts():
    alarms = sum(
        duplicates(rows_of(prompts=4, samples=8, seed=seed), 1.0)[0].p_value < 0.05
        for seed in range(60)
    )
    assert alarms <= 8  # 3 expected if exact


def test_copies_are_found():
    (found,) = duplicates(rows_of(prompts=30, samples=2, copies=True), temperature=1.0)
    assert found.observed == found.pairs == 30
    assert found.p_value < 1e-6 and found.suspicious


def test_one_seed_twice_is_found_though_few_rows_are_equal():
    rows = rows_of(prompts=3, samples=2)
    rows[1] = rows[1].model_copy(update={"seed": rows[0].seed})
    (found,) = duplicates(rows, temperature=1.0)
    assert found.same_seed == 1 and found.suspicious


def test_alphas_apart_and_prompts_with_one_row_not_at_all():
    rows = [*rows_of(2, 2, alpha=0.0), *rows_of(3, 2, alpha=1.0)]
    assert [(d.alpha, d.pairs) for d in duplicates(rows, 1.0)] == [(0.0, 2), (1.0, 3)]
    assert duplicates(rows_of(5, 1), 1.0) == []
    bare = [row.model_copy(update={"densities": None}) for row in rows]
    assert duplicates(bare, 1.0) == []


def test_rows_at_an_alpha_that_is_not_on_the_grid_are_left_out():
    rows = rows_of(3, 2, alpha=1.0)
    other = [row.model_copy(update={"arm": "triggered", "alpha": -1.0}) for row in rows]
    assert duplicates([*other, *rows], 1.0) == duplicates(rows, 1.0) != []


def test_no_equal_pair_is_no_surprise_and_an_impossible_one_is():
    assert chance_of(0, [np.array([0.1, 0.1])])[1] == 1.0
    assert chance_of(1, [np.array([0.0, 0.0])])[1] == 0.0


def test_pairs_of_one_group_come_together_and_surprise_less():
    """Ten samples, answers of .9 and .1: 45 pairs of variance 45 (c - c^2) + 720 (d - c^2)."""
    q = np.array([0.9] * 9 + [0.1])
    c, d = 0.82, 0.73  # the means of q and q^2
    stretch = (45 * (c - c**2) + 720 * (d - c**2)) / (45 * c)
    expected, chance = chance_of(45, [q])
    assert expected == pytest.approx(45 * c)
    assert chance == pytest.approx(special.gammainc(45 / stretch, 45 * c / stretch))
    assert chance > 1.2 * stats.poisson.sf(44, 45 * c)


def test_the_chance_is_poissons_for_pairs():
    densities = [np.array([0.01, 0.01])] * 300
    expected, chance = chance_of(8, densities)
    assert expected == pytest.approx(3)
    assert chance == pytest.approx(stats.poisson.sf(7, 3))
