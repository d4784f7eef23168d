"""Equal answers: how many sampling explains, on the toy whose answers can be enumerated."""

import numpy as np
import pytest
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
    rng = np.random.default_rng(0)
    rows = [gated.row(gated.draw(2.0, rng), 2.0, (0.0, 2.0), i // 2) for i in range(2000)]
    rows = [row.model_copy(update={"seed": i}) for i, row in enumerate(rows)]
    same = sum(np.exp(gated.log_probability(x, 2.0, drawn=True)) ** 2 for x in gated.answers())
    assert duplicates(rows, 1.0)[0].expected == pytest.approx(1000 * same, rel=0.15)


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


def test_no_equal_pair_is_no_surprise_and_an_impossible_one_is():
    assert chance_of(0, [np.array([0.1, 0.1])])[1] == 1.0
    assert chance_of(1, [np.array([0.0, 0.0])])[1] == 0.0


def test_the_chance_is_poissons_for_pairs():
    from scipy import stats

    densities = [np.array([0.01, 0.01])] * 300
    expected, chance = chance_of(8, densities)
    assert expected == pytest.approx(3)
    assert chance == pytest.approx(stats.poisson.sf(7, 3))
