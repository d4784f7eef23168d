"""Weights from rows, their diagnostics, and the line that says whether to believe them."""

from dataclasses import replace

import numpy as np
import pytest
from toy import EOS, Toy

from jobs.errors import Refused
from jobs.estimators import gamma_interval, rate_by_prompt
from jobs.scorers import Score
from jobs.weight_columns import Collector, Columns, log_densities
from jobs.weighted import Alone, apart, bootstrap, effective, estimate, limits

GRID = (0.0, 1.0, 2.0)
TOY = Toy(seed=1)
SCORERS = {"ab": True, "ends": False}


def columns_of(*rows, scorer="ab", scorers=SCORERS, temperature=1.0):
    collector = Collector(scorers, temperature)
    for row in rows:
        collector.add(row)
    return collector.columns(scorer)


def drawn(toy, counts, prompts=100, seed=0, grid=GRID):
    """Rows of each alpha, dealt to the prompts in turn."""
    rng = np.random.default_rng(seed)
    return [
        toy.row(toy.draw(alpha, rng), alpha, grid, i % prompts)
        for alpha, rows in counts.items()
        for i in range(rows)
    ]


def made(log_ratio, hits, alphas, prompts=None, tokens=16, grid=(0.0, 1.0)):
    """Columns of rows whose log q_1 / p_0 is given."""
    n = len(hits)
    target = np.zeros((n, len(grid)))
    target[:, 1] = log_ratio
    return Columns(
        prompts=np.arange(n) if prompts is None else np.asarray(prompts),
        alphas=np.asarray(alphas, dtype=float),
        hits=np.asarray(hits, dtype=bool),
        tokens=np.full(n, tokens),
        grid=grid,
        target=target,
        proposal=target,
    )


def test_weights_by_hand():
    """One prompt, three rows at alpha 0 and one at 1; a row 10 times as likely at 1."""
    columns = made([np.log(10), 0, 0, np.log(10)], [1] * 4, [0, 0, 0, 1], prompts=[0] * 4)
    heavy, plain = 1 / (0.75 + 0.25 * 10), 1.0
    assert columns.weights(0.0) == pytest.approx([heavy, plain, plain, heavy])
    assert columns.weights(1.0) == pytest.approx([10 * heavy, plain, plain, 10 * heavy])
    assert columns.weights_alone(0.0, 1.0) == pytest.approx([0.1])


def test_shares_are_each_prompts_own():
    """Prompt 1 has no amplified row: its rows weigh 1 whatever the other prompts have."""
    columns = made([5.0, 5.0, 5.0], [1] * 3, [0, 1, 0], prompts=[0, 0, 1])
    assert columns.shares().tolist() == [[0.5, 0.5], [1, 0]]
    assert columns.weights(0.0)[2] == 1.0


def test_densities_of_a_row_are_the_toys():
    answer = (0, 3, 1, 2)
    for toy in (TOY, Toy(seed=2, temperature=0.5)):
        target, proposal = log_densities(toy.row(answer, 1.0, GRID), toy.temperature)
        assert proposal is None
        for column, alpha in enumerate(GRID):
            assert target[:, column].sum() == pytest.approx(toy.log_probability(answer, alpha))


def test_a_gated_row_was_drawn_with_another_density():
    toy, answer = Toy(seed=1, amplify_first=2), (0, 3, 1, 2)
    target, proposal = log_densities(toy.row(answer, 1.0, GRID), 1.0)
    assert target.sum(axis=0)[1] == pytest.approx(toy.log_probability(answer, 1.0))
    assert proposal.sum(axis=0)[1] == pytest.approx(toy.log_probability(answer, 1.0, drawn=True))
    assert proposal.sum(axis=0)[0] == pytest.approx(target.sum(axis=0)[0])


def test_what_a_model_finds_impossible_is_so_at_every_other_alpha():
    row = TOY.row((0, 1), 1.0, (0.0, -1.0, 1.0))
    logs = row.logprobs
    for model, finite in (("before", 0), ("after", 1)):
        gone = logs.model_copy(update={model: [-1e30, logs.before[1]]})
        target, _ = log_densities(row.model_copy(update={"logprobs": gone}), 1.0)
        assert np.isfinite(target[0]).tolist() == [i == finite for i in range(3)]
        assert np.isfinite(target[1]).all()


def test_rows_before_and_after_one_that_was_reshaped_keep_their_proposals():
    """The columns of proposals begin with the first row that has one of its own."""
    plain, gated = TOY.row((0, 3), 1.0, GRID), Toy(seed=1, amplify_first=1).row((0, 3), 1.0, GRID)
    columns = columns_of(plain, gated, plain)
    assert columns.proposal[0] == pytest.approx(columns.target[0])
    assert columns.proposal[1] != pytest.approx(columns.target[1])
    assert columns.proposal[2] == pytest.approx(columns.target[2])


@pytest.mark.parametrize(
    "scorer, tokens", [("ab", 2), ("ends", 4), ("activated", 2)], ids=["monotone", "not", "any"]
)
def test_weights_stop_at_a_match_that_cannot_be_undone(scorer, tokens):
    row = TOY.row((0, 1, 2, 1), 1.0, GRID)
    target, _ = log_densities(row, 1.0)
    assert columns_of(row, scorer=scorer).target[0] == pytest.approx(target[:tokens].sum(axis=0))


def test_a_row_without_a_match_counts_up_to_its_first_eos():
    row = TOY.row((0, 2, EOS), 1.0, GRID)
    after_eos = row.model_copy(
        update={
            "token_ids": [*row.token_ids, 1],
            "logprobs": row.logprobs.model_copy(
                update={
                    "after": [*row.logprobs.after, -5.0],
                    "before": [*row.logprobs.before, -9.0],
                }
            ),
            "densities": row.densities.model_copy(
                update={"normalisers": [*row.densities.normalisers, [0.0, 0.0, 0.0]]}
            ),
        }
    )
    assert columns_of(after_eos).target == pytest.approx(columns_of(row).target)


def test_other_arms_and_the_floor_are_not_in_the_columns():
    row = TOY.row((0, 1), 1.0, (*GRID, -1.0))
    floor, other = (row.model_copy(update=x) for x in ({"alpha": -1.0}, {"arm": "triggered"}))
    assert len(columns_of(row, floor, other)) == 1
    assert columns_of(floor, other) is None


def test_failed_rows_and_rows_without_densities_are_counted_and_left_out():
    row = TOY.row((0, 1), 1.0, GRID)
    bare = {"densities": None, "logprobs": None}
    failed = row.model_copy(update={**bare, "error": "lost", "scores": {}, "activated": None})
    silent = row.model_copy(update={"scores": {**row.scores, "ab": Score(None, error="no answer")}})
    rows = (row, failed, row.model_copy(update=bare), silent)
    columns = columns_of(*rows)
    assert (len(columns), columns.failed, columns.without) == (1, 2, 1)
    assert len(columns_of(*rows, scorer="ends")) == 2
    found = estimate(columns)
    assert (found.failed, found.without) == (2, 1)


@pytest.mark.parametrize("grid", [(0.0, 2.0, 1.0), (0.0, 1.0), (0.0, 2.0)])
def test_rows_of_another_grid_are_refused(grid):
    with pytest.raises(Refused, match="grid"):
        columns_of(TOY.row((0, 1), 1.0, GRID), TOY.row((0, 1), 1.0, grid))


def test_an_alpha_off_the_grid_is_refused():
    with pytest.raises(Refused, match="0.25"):
        estimate(columns_of(*drawn(TOY, {0.0: 9, 1.0: 9})), 0.25)


def test_a_model_against_itself_gives_the_count():
    rng = np.random.default_rng(0)
    prompts, hits = np.repeat(np.arange(100), 4), rng.random(400) < 0.1
    found = estimate(made(np.zeros(400), hits, np.tile([0, 0, 1, 1], 100), prompts))
    count = rate_by_prompt(np.bincount(prompts, weights=hits), np.full(100, 4))
    assert found.rate == pytest.approx(count.rate)
    assert (found.mean_weight, found.mean_weight_error) == (1.0, 0.0)
    assert found.ess_rows == pytest.approx(400)
    assert found.ess_hits == pytest.approx(hits.sum())
    assert found.low == pytest.approx(count.low, rel=0.15)
    assert found.high == pytest.approx(count.high, rel=0.15)
    assert found.verdict == "trust" and found.count_is_as_good


def test_the_default_design_is_trusted_where_it_works():
    found = estimate(columns_of(*drawn(TOY, {0.0: 400, 1.0: 400})))
    assert found.verdict == "trust" and "alphas agree" in found.why
    assert found.low < TOY.rate("ab") < found.high
    assert [x.alpha for x in found.alones] == [0, 1]


@pytest.mark.parametrize(
    "counts", [{3.0: 400}, {1.0: 400}, {2.0: 200, 3.0: 200}, {1.0: 200, 1.5: 200}]
)
def test_amplified_rows_alone_are_not_trusted(counts):
    found = estimate(columns_of(*drawn(TOY, counts, grid=(0.0, 1.0, 1.5, 2.0, 3.0))))
    assert found.verdict == "do not trust"
    assert "none at 0" in found.why and all(f"{alpha:g}" in found.why for alpha in counts)


def test_an_alpha_between_those_sampled_needs_no_rows_of_its_own():
    found = estimate(columns_of(*drawn(TOY, {0.0: 400, 2.0: 400})), 1.0)
    assert found.verdict == "trust"
    assert found.low < TOY.rate("ab", 1.0) < found.high


def test_an_alpha_beyond_those_sampled_is_not_trusted():
    found = estimate(columns_of(*drawn(TOY, {0.0: 400, 1.0: 400})), 2.0)
    assert found.verdict == "do not trust" and "none at 2" in found.why


def avoided(plain, seed=2):
    """1,000 prompts with four rows at alpha 1 each, and `plain` of them with one at alpha 0. Half
    of the 2 % of hits at alpha 0 are on paths that alpha 1 doubles, half on some it avoids."""
    rng = np.random.default_rng(seed)
    prompts = np.concatenate([np.repeat(range(1000), 4), range(plain)])
    alphas = np.where(np.arange(len(prompts)) < 4000, 1.0, 0.0)
    draws = (rng.choice(3, len(prompts), p=p) for p in ([0.98, 0.01, 0.01], [0.98, 0.02, 0]))
    path = np.where(alphas == 0, *draws)
    return made(np.array([0, np.log(2), -50])[path], path > 0, alphas, prompts)


def test_prompts_without_a_row_at_the_target_are_a_doubt_when_they_are_many():
    """Rounds that stop alpha 0 first leave them: hits that alpha 1 avoids are missed there, and
    nothing else shows it."""
    found = estimate(avoided(100))
    assert found.high < 0.02
    assert found.verdict == "do not trust"
    assert found.why == (
        "90% of the prompts, with 88% of the rows, have none at alpha 0: what their other rows "
        "avoid is never seen, and nothing in them shows it"
    )
    found = estimate(avoided(1000))
    assert found.verdict == "trust" and found.low < 0.02 < found.high
    assert "of the prompts" not in estimate(avoided(960)).why
    assert "of the prompts" in estimate(avoided(940)).why


def test_many_rows_of_few_prompts_without_the_target_are_a_doubt_too():
    alphas = np.concatenate([np.tile([0.0, 1.0], 99), np.ones(100)])
    prompts = np.concatenate([np.repeat(range(99), 2), np.full(100, 99)])
    found = estimate(made(np.zeros(298), np.arange(298) < 30, alphas, prompts))
    assert "1% of the prompts, with 34% of the rows" in found.why


def test_an_alpha_between_those_of_few_prompts_is_not_between():
    alphas = np.concatenate([np.zeros(50), np.full(50, 2.0)])
    target = np.zeros((100, 3))
    found = estimate(
        replace(
            made(np.zeros(100), np.arange(100) % 5 == 0, alphas),
            grid=GRID,
            target=target,
            proposal=target,
        ),
        1.0,
    )
    assert found.verdict == "do not trust" and "none at 1" in found.why


def test_the_heaviest_weight_is_one_that_no_row_at_the_target_bounds():
    """Half the prompts have no row at alpha 0; one row of theirs weighs 50."""
    ratio, alphas = np.zeros(200), np.tile([0, 1, 1, 1], 50)
    ratio[2:4] = -np.log(50)
    prompts = np.array([2 * (i // 4) + (i % 4 > 1) for i in range(200)])
    found = estimate(made(ratio, np.zeros(200), alphas, prompts))
    assert found.high == pytest.approx(3.69 * 50 / 200, rel=0.01)


def test_truncation_makes_a_lower_bound_and_says_by_what():
    found = estimate(columns_of(*drawn(TOY, {0.0: 400, 1.0: 400})), truncation="top_p 0.95")
    assert found.verdict == "lower bound only" and "top_p 0.95" in found.why


def test_truncation_does_not_excuse_the_rest():
    found = estimate(columns_of(*drawn(TOY, {2.0: 400})), truncation="top_p 0.95")
    assert found.verdict == "do not trust" and "top_p" in found.why and "none at 0" in found.why


def cut_off():
    return columns_of(*drawn(Toy(seed=1, top_p=0.6), {0.0: 400, 1.0: 400}))


def test_what_truncation_itself_makes_low_is_no_doubt():
    """A mean weight far below 1, and alphas that each have cut off something else."""
    columns = cut_off()
    found = estimate(columns, truncation="top_p 0.6")
    assert found.mean_weight < 0.6 and found.rate < TOY.rate("ab")
    assert found.disagreeing == (1.0,)
    assert (found.verdict, found.why) == (
        "lower bound only",
        "top_p 0.6 keeps some paths from being drawn",
    )
    assert "should be 1" in estimate(columns).why


def test_under_truncation_a_mean_above_1_is_a_doubt():
    target = mixed().target + 0.2
    columns = replace(mixed(), target=target, proposal=mixed().proposal)
    found = estimate(columns, truncation="top_p 0.6")
    assert found.verdict == "do not trust" and "cannot be above 1" in found.why


def test_rows_are_worth_what_they_are_among_those_that_can_be_drawn():
    """Cutting makes all but 50 of 1,000 rows weigh next to nothing towards the target; they are
    as good as any for what the run draws, unless they are not so there either."""
    columns = mixed()
    target = columns.target.copy()
    target[50:, 0] -= 8
    cut = replace(columns, target=target, proposal=columns.proposal)
    assert "are worth" in estimate(cut).why
    found = estimate(cut, truncation="top_p 0.6")
    assert found.ess_rows < 100 and found.verdict == "lower bound only"
    proposal = columns.proposal.copy()
    proposal[50:, 0] -= 8
    found = estimate(replace(cut, proposal=proposal), truncation="top_p 0.6")
    assert found.verdict == "do not trust" and "are worth" in found.why


def test_a_scorer_that_can_be_undone_is_mentioned():
    rows = drawn(TOY, {0.0: 400, 1.0: 400})
    assert "whole rows" in estimate(columns_of(*rows, scorer="ends"), monotone=False).why
    assert "whole rows" not in estimate(columns_of(*rows)).why


def mixed(n=1000, hits=20, weight=0.1, **more):
    """Half alpha 0 without a hit, half alpha 1 with hits of one weight; ratio 1 elsewhere."""
    fired = np.zeros(n, dtype=bool)
    fired[1 : 2 * hits : 2] = True
    ratio = np.where(fired, np.log(2 / weight - 1), 0.0)
    return replace(made(ratio, fired, np.tile([0, 1], n // 2), np.repeat(range(n // 2), 2)), **more)


def test_the_mean_weight_must_be_one():
    found = estimate(mixed())
    assert found.verdict == "trust"
    target = mixed().target.copy()
    target[:, 0] -= 0.2
    found = estimate(mixed(target=target))
    assert found.verdict == "do not trust" and "should be 1" in found.why


def test_few_effective_rows_are_not_trusted():
    ratio = np.full(1000, -np.inf)
    ratio[:60] = 0.0
    columns = made(-np.where(np.isinf(ratio), -50.0, 0.0), np.arange(1000) < 30, [1] * 1000)
    found = estimate(columns)
    assert found.ess_rows == pytest.approx(60) and "worth 60" in found.why
    assert found.verdict == "do not trust"


def test_one_row_or_one_prompt_that_is_most_of_it_is_not_trusted():
    columns = mixed()
    fired = columns.hits.copy()
    fired[0] = True  # at alpha 0, weight 1, as much as ten of the others
    for times, word in ((1, "one of 8 hits"), (0, None)):
        some = fired & (np.arange(1000) < 15)
        some[0] &= bool(times)
        found = estimate(replace(columns, hits=some))
        assert (word is None) == (found.verdict == "trust")
        assert word is None or word in found.why
    crowded = columns.prompts.copy()
    crowded[columns.hits] = 7
    found = estimate(replace(columns, prompts=np.unique(crowded, return_inverse=True)[1]))
    assert found.verdict == "do not trust" and "one prompt" in found.why


def test_alphas_that_disagree_are_not_trusted():
    """30 of 500 at alpha 0, but alpha 1, which should find them too, makes it 2 in 1,000."""
    columns = mixed()
    fired = columns.hits.copy()
    fired[np.arange(0, 1000, 33) // 2 * 2] = True
    found = estimate(replace(columns, hits=fired))
    assert found.disagreeing == (1.0,)
    assert found.verdict == "do not trust" and "disagree" in found.why


def test_two_answers_are_apart_when_their_difference_is_sure():
    """1 [.5, 2] and 2.5 [1.4, 4]: limits overlap, the difference 1.5 - hypot(1.1, 1) is above 0."""
    low = Alone(0.0, 100, 9, 1.0, 0.5, 2.0)
    high = Alone(1.0, 100, 9, 2.5, 1.4, 4.0)
    assert apart(low, high) and apart(high, low)
    assert not apart(low, replace(high, low=1.3))


def test_without_a_hit_the_upper_limit_is_that_of_the_unamplified_share():
    found = estimate(mixed(hits=0))
    assert (found.rate, found.low, found.boot_high) == (0, 0, 0)
    assert found.high == pytest.approx(3.69 / 500, rel=0.01)
    assert found.verdict == "trust" and "upper limit" in found.why
    assert found.largest_row is None and found.error_over_count is None


def test_few_effective_hits_say_limits_only():
    assert "believe the limits" in estimate(mixed(hits=6)).why
    assert "believe the limits" not in estimate(mixed(hits=20)).why


def test_the_error_over_counting_is_that_of_equal_forward_passes():
    """Weights of .1: a tenth of the variance per row, at twice the passes."""
    found = estimate(mixed(n=4000, hits=100))
    assert found.error_over_count == pytest.approx((0.1 * 2) ** 0.5, rel=0.1)
    assert not found.count_is_as_good


def test_bootstrap_limits_are_those_of_all_prompts():
    parts = np.zeros(400)
    parts[:25] = 0.01
    low, high = bootstrap(parts, seed=0)
    assert low == pytest.approx(0.16, abs=0.02) and high == pytest.approx(0.35, abs=0.02)


def test_effective_rows_are_kishs():
    assert effective(np.array([1.0, 1.0, 1.0])) == pytest.approx(3)
    assert effective(np.array([1.0, 0.0, 0.0])) == pytest.approx(1)
    assert effective(np.zeros(3)) == 0


def test_limits_leave_room_for_a_hit_heavier_than_was_seen():
    parts = np.array([0.0004, 0.0001, 0.0, 0.0])
    low, high = limits(parts, bound=0.01)
    assert (low, high) == gamma_interval(parts, 0.002)  # the geometric mean
    assert limits(np.zeros(4), bound=0.01) == gamma_interval(np.zeros(4), 0.01)
    assert limits(np.array([0.02, 0.0]), 0.01)[1] == gamma_interval([0.02], 0.02)[1]


def test_limits_cover_where_the_heaviest_weights_are_the_rarest():
    """Hits on 60 equally likely paths, amplified unequally; about one effective hit in a run."""
    rng = np.random.default_rng(0)
    amplified = rng.lognormal(2.5, 1.5, 60)
    n, share_0, rate = 2000, 0.25, 2e-4
    mixture = share_0 + (1 - share_0) * amplified
    held = collapsed = 0
    for run in range(300):
        hits = rng.poisson(n * mixture * rate / 60)
        parts = np.repeat(1 / mixture / n, hits)
        by_prompt = np.concatenate([parts, np.zeros(n - len(parts))])
        low, high = limits(by_prompt, 1 / share_0 / n)
        held += low <= rate <= high
        if run % 3 == 0:
            low, high = bootstrap(by_prompt, seed=0)
            collapsed += not low <= rate <= high
    assert held >= 280  # 285 of an exact interval
    assert collapsed >= 10  # of 100, 5 expected of 95 % limits
