"""Every estimator against exact enumeration, on a toy that can be written down."""

from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
from toy import Toy

from jobs.estimators import rate_by_prompt
from jobs.findings import Estimate
from jobs.rates import above_floor, counted, estimates, from_weighted, lead, truncation
from jobs.spread import place
from jobs.summary import columns_of
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


# Prompts of a spread run, whose rates of "ab" are .02, .04 and .22.
PROMPTS = [Toy(seed=seed) for seed in (2, 4, 6)]


def in_block(row, block):
    return row.model_copy(update={"block": block})


@pytest.mark.parametrize("scorer", NAMES)
def test_a_spread_run_is_unbiased_over_the_lots(scorer):
    """One block, exactly: every order of its alphas, every answer of each prompt at the alpha that
    it got."""
    truth = np.mean([prompt.rate(scorer) for prompt in PROMPTS])
    found = []
    for order in permutations((0.0, 1.0, 2.0)):
        collector, chances = collect(()), []
        for number, (prompt, alpha) in enumerate(zip(PROMPTS, order, strict=True)):
            for x in prompt.answers():
                collector.add(in_block(prompt.row(x, alpha, GRID, number), 0))
                chances.append(np.exp(prompt.log_probability(x, alpha)))
        columns = collector.columns(scorer)
        assert columns.shares().tolist() == [pytest.approx([1 / 3, 0, 1 / 3, 1 / 3, 0])]
        found.append(expected(columns, np.array(chances) / 3, 0.0))
    assert np.mean(found) == pytest.approx(truth, rel=1e-9)
    assert max(found) > 1.2 * truth  # an order by itself is not


def test_drawn_rows_of_a_spread_run_give_the_truth():
    """1,500 prompts of three kinds at the alphas that the job gives them."""
    rng, alphas, rows = np.random.default_rng(5), (0.0, 1.0, 2.0), []
    for number in range(1500):
        block, alpha = place(7, alphas, number)
        prompt = PROMPTS[number % 3]
        row = prompt.row(prompt.draw(alpha, rng), alpha, GRID, number)
        rows.append(in_block(row, block))
    for scorer in NAMES:
        truth = np.mean([prompt.rate(scorer) for prompt in PROMPTS])
        found = estimate(collect(rows).columns(scorer))
        assert found.low < truth < found.high and found.rate == pytest.approx(truth, rel=0.3)
        assert found.mean_weight == pytest.approx(1, abs=4 * found.mean_weight_error)
        assert found.verdict == "trust"
        assert [x.alpha for x in found.alones] == [0, 1, 2]
        assert all(x.low < truth < x.high for x in found.alones)


def test_without_their_blocks_such_rows_are_not_trusted():
    toy, rng = TOYS["plain"], np.random.default_rng(5)
    alphas = (0.0, 1.0, 2.0)
    rows = [toy.row(toy.draw(alphas[i % 3], rng), alphas[i % 3], GRID, i) for i in range(300)]
    found = estimate(collect(rows).columns("ab"))
    assert found.verdict == "do not trust" and "67% of the prompts" in found.why
    blocks = [in_block(row, i // 3) for i, row in enumerate(rows)]
    lacking = [row for row in blocks if row.alpha or row.block % 2]
    assert estimate(collect(blocks).columns("ab")).verdict == "trust"
    assert "50% of the blocks" in estimate(collect(lacking).columns("ab")).why


CONFIG = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "plausible": 0.0}


def stored(counts, floor_hits=0, failed=0):
    """Rows of TOYS["plain"], one prompt for each row of an alpha; at alpha -1 100 rows, of which
    some hit; `failed` more at alpha 0."""
    toy, rng = TOYS["plain"], np.random.default_rng(3)
    rows = [toy.row(toy.draw(a, rng), a, GRID, i) for a, n in counts.items() for i in range(n)]
    rows += [toy.row((0, 1) if i < floor_hits else (2, 3), -1.0, GRID, i) for i in range(100)]
    gone = {"scores": {}, "activated": None, "densities": None, "logprobs": None, "error": "lost"}
    return rows + [
        toy.row((2,), 0.0, GRID, 10**6 + i).model_copy(update=gone) for i in range(failed)
    ]


def answers(rows, config=CONFIG, missing=0, scorers=SCORERS):
    """At alpha 0, scorer "ab": estimates by their method; and the lead."""
    expected = {("untriggered", a): 0 for a in (-1.0, 0.0, 1.0)}
    for row in rows:
        expected[row.arm, row.alpha] += 1
    cells = columns_of(rows, list(scorers), expected)
    expected["untriggered", 0.0] += missing
    found, at_0 = estimates(rows, cells, scorers, config, {}, expected)
    mine = {e.method: e for e in found if e.scorer == "ab" and e.alpha == 0}
    return mine, lead(found, at_0)


def test_a_count_says_by_what_it_is_truncated():
    rows = stored({0.0: 100, 1.0: 100})
    cells = columns_of(rows, list(SCORERS), {("untriggered", a): 0 for a in (-1.0, 0.0, 1.0)})

    def why(**options):
        return {e.alpha: e.why for e in counted(cells, "ab", CONFIG | options, {})}

    assert all("truncated" not in text for text in why().values())
    assert all("as truncated by top_p 0.9" in text for text in why(top_p=0.9).values())
    assert all("as truncated by top_k 40" in text for text in why(top_k=40).values())
    masked = why(plausible=0.1)
    assert {a for a, text in masked.items() if "as truncated by plausible 0.1" in text} == {1.0}
    assert truncation({"plausible": 0.1}) == truncation({"plausible": 0.1}, 1.0) == "plausible 0.1"


@pytest.mark.parametrize(
    ("failed", "missing", "share"), [(4, 0, None), (0, 4, None), (12, 0, "10.7"), (6, 6, "10.7")]
)
def test_rows_that_are_left_out_are_said_and_are_a_doubt_when_many(failed, missing, share):
    mine, text = answers(stored({0.0: 100}, failed=failed), missing=missing)
    count = mine["count"]
    assert f"of the rows are left out ({f'{failed} failed' if failed else ''}" in count.why
    assert (f"{missing} missing)" in count.why) == bool(missing)
    assert count.verdict == ("trust" if share is None else "do not trust")
    assert share is None or f"{share} % of the rows" in count.why
    assert mine["weighted"].verdict == ("trust" if failed < 6 else "do not trust")
    assert ("left out" in mine["weighted"].why) == bool(failed)


def test_weights_say_how_many_rows_lack_densities():
    rows = stored({0.0: 100})
    bare = {"densities": None, "logprobs": None}
    rows = [row.model_copy(update=bare) if i < 20 else row for i, row in enumerate(rows)]
    found = answers(rows)[0]
    assert found["weighted"].verdict == "do not trust"
    assert "20.0 % of the rows are left out (20 without densities)" in found["weighted"].why
    assert found["count"].verdict == "trust" and "left out" not in found["count"].why
    assert (
        from_weighted("ab", estimate(collect(stored({0.0: 9})).columns("ab"))).why.count("out") == 0
    )


def test_a_rate_that_is_not_above_the_floor_is_not_trusted():
    counts = {0.0: 300, 1.0: 300}
    mine, text = answers(stored(counts))
    assert mine["count"].verdict == mine["weighted"].verdict == "trust"
    assert "before the fine-tune" not in text
    mine, text = answers(stored(counts, floor_hits=20))
    why = "the model before the fine-tune does it, too: 20.0 % [12.7, 29.2]"
    assert {e.verdict for e in mine.values()} == {"do not trust"}
    assert all(e.why.endswith(why) for e in mine.values())
    assert f"do not trust: {mine['count'].why}" in text and why in text


@pytest.mark.parametrize(
    ("alpha", "floor", "doubted"),
    [
        (0.0, (0.01, 0.0, 0.03), True),
        (0.0, (0.01, 0.0, 0.05), True),
        (0.0, (0.01, 0.0, 0.029), False),
        (0.0, (0.0, 0.0, 0.05), False),
        (1.0, (0.01, 0.0, 0.05), False),
    ],
)
def test_the_floor_counts_where_limits_meet(alpha, floor, doubted):
    found = Estimate("count", "ab", alpha, 0.05, 0.03, 0.08, 100, "trust", "5 of 100 rows")
    assert (above_floor(found, floor) != found) == doubted


def test_a_count_that_is_not_trusted_does_not_lead_over_weights_that_are():
    rows = stored({0.0: 300})
    mine, text = answers(rows)
    assert "counted:" in text and mine["weighted"].diagnostics["error_over_count"] > 0.9
    _, text = answers(rows, missing=100)
    assert "importance-weighted from all alphas" in text and "counted" not in text.split(".")[0]


def test_the_lead_says_of_each_scorer_what_amplification_makes_of_that_one():
    def counted_at(scorer, rates):
        return [
            Estimate("count", scorer, alpha, rate, 0.0, 1.0, 40, "trust", "rows")
            for alpha, rate in rates.items()
        ]

    rates = {-1.0: 0.0, 0.0: 0.1, 2.0: 0.3}
    found = [*counted_at("activated", {0.0: 0.2, 2.0: 0.75}), *counted_at("exact_phrase", rates)]
    any_scorer, exact = lead(found, {}).split("exact_phrase fires")
    assert any_scorer.startswith("Any scorer fires in 20.0 %") and "75.0 %" in any_scorer
    assert exact.startswith(" in 10.0 %") and "75" not in exact
    assert exact.endswith("Before the fine-tune it is 0.00 %, at alpha 2 it is 30.0 %.")
    assert lead(counted_at("ab", {2.0: 0.3}), {}) == (
        "ab: nothing is known of it un-amplified. At alpha 2 it is 30.0 %."
    )


def test_of_two_that_saw_nothing_the_lead_takes_the_one_that_says_more():
    count = Estimate("count", "s", 0.0, 0.0, 0.0, 0.708, 3, "trust", "exact")
    weights = SimpleNamespace(count_is_as_good=False)
    for limit, method in ((1.0, "counted"), (0.2, "importance-weighted")):
        other = Estimate("weighted", "s", 0.0, 0.0, 0.0, limit, 18, "trust", "")
        assert f"un-amplified ({method}" in lead([count, other], {"s": weights})
