"""Every estimator against exact enumeration, on a toy that can be written down."""

import numpy as np
import pytest
from toy import Toy

from jobs.estimators import rate_by_prompt
from jobs.weight_columns import Collector, Columns
from jobs.weighted import estimate

GRID = (0.0, 0.5, 1.0, 2.0, -1.0)
SCORERS = {"ab": True, "ends": False}
NAMES = ("ab", "ends", "activated")


def collect(rows, temperature=1.0):
    collector = Collector(SCORERS, temperature)
    for row in rows:
        collector.add(row)
    return collector


def every_answer(toy, alphas):
    """Columns with each answer once for each of `alphas` (which may repeat), and how likely that
    row is to be drawn: sums over rows are then expectations."""
    pairs = [(answer, alpha) for alpha in alphas for answer in toy.answers()]
    collector = collect((toy.row(x, alpha, GRID) for x, alpha in pairs), toy.temperature)
    chances = [np.exp(toy.log_probability(x, alpha, drawn=True)) for x, alpha in pairs]
    return collector, np.array(chances) / len(alphas)


def expected(columns: Columns, chances: np.ndarray, alpha: float) -> float:
    with np.errstate(invalid="ignore"):  # answers that no alpha can draw weigh 0 / 0
        weights = columns.weights(alpha)
    counts = (chances > 0) & columns.hits
    return float(chances[counts] @ weights[counts])


TOYS = {
    "plain": Toy(seed=1),
    "cool": Toy(seed=2, temperature=0.7),
    "gate": Toy(seed=3, amplify_first=2),
    "mask and gate": Toy(seed=4, amplify_first=3, plausible=0.2),
}


def test_the_toy_is_a_distribution():
    for toy in (*TOYS.values(), Toy(top_p=0.8)):
        assert len(list(toy.answers())) == 341
        for drawn in (False, True):
            total = sum(np.exp(toy.log_probability(x, 1.0, drawn)) for x in toy.answers())
            assert total == pytest.approx(1)


@pytest.mark.parametrize("alphas", [(0.0,), (0.0, 1.0), (0.0, 0.0, 1.0, 2.0)])
@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_weighted_rate_is_unbiased_at_every_alpha(toy, alphas):
    collector, chances = every_answer(toy, alphas)
    for scorer in NAMES:
        columns = collector.columns(scorer)
        assert expected(columns, chances, 0.0) == pytest.approx(toy.rate(scorer), rel=1e-9)
        if not toy.plausible:  # what a mask forbids at alpha 1 is seen at alpha 0, or not at all
            for alpha in (0.5, 1.0, 2.0):
                truth = toy.rate(scorer, alpha)
                assert expected(columns, chances, alpha) == pytest.approx(truth, rel=1e-9)


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_the_mean_weight_is_one(toy):
    collector, chances = every_answer(toy, (0.0, 1.0, 2.0))
    for scorer in NAMES:
        weights = collector.columns(scorer).weights(0.0)
        assert float(chances @ weights) == pytest.approx(1, rel=1e-9)


def test_amplified_rows_alone_are_unbiased_too_where_nothing_is_forbidden():
    toy = TOYS["gate"]
    collector, chances = every_answer(toy, (1.0, 2.0))
    assert expected(collector.columns("ab"), chances, 0.0) == pytest.approx(toy.rate("ab"))


@pytest.mark.parametrize("toy", [Toy(seed=1, top_p=0.8), Toy(seed=1, plausible=0.3)])
def test_what_cannot_be_drawn_makes_a_lower_bound(toy):
    collector, chances = every_answer(toy, (0.0, 1.0) if toy.top_p < 1 else (1.0, 2.0))
    for scorer in NAMES:
        found = expected(collector.columns(scorer), chances, 0.0)
        assert 0 < found < 0.95 * toy.rate(scorer)


def test_a_match_stops_the_weights_without_a_bias_and_with_less_noise():
    toy = TOYS["plain"]
    collector, chances = every_answer(toy, (1.0,))
    whole = Collector({"ab": False, "ends": False}, 1.0)
    for answer in toy.answers():
        whole.add(toy.row(answer, 1.0, GRID))
    spreads = []
    for columns in (collector.columns("ab"), whole.columns("ab")):
        parts = columns.weights(0.0) * columns.hits
        assert float(chances @ parts) == pytest.approx(toy.rate("ab"))
        spreads.append(float(chances @ parts**2))
    assert spreads[0] < 0.95 * spreads[1]


@pytest.mark.parametrize("toy", TOYS.values(), ids=TOYS)
def test_drawn_rows_give_the_truth(toy):
    """What a run would store, 1,500 rows: count, weighted, and each alpha alone."""
    rng = np.random.default_rng(5)
    alphas = [alpha for alpha in (0.0, 1.0, 1.0) for _ in range(500)]
    rows = [toy.row(toy.draw(a, rng), a, GRID, i % 500) for i, a in enumerate(alphas)]
    truncation = "plausible 0.2" if toy.plausible else ""
    for scorer in NAMES:
        truth, columns = toy.rate(scorer), collect(rows, toy.temperature).columns(scorer)
        found = estimate(columns, truncation=truncation)
        assert found.low < truth < found.high
        assert found.mean_weight == pytest.approx(1, abs=4 * found.mean_weight_error)
        plain = columns.alphas == 0
        count = rate_by_prompt(columns.hits[plain], np.ones(plain.sum()))
        assert count.low < truth < count.high
        assert [x.alpha for x in found.alones] == [0, 1]
        if not toy.plausible:
            assert all(x.low < truth < x.high for x in found.alones)
