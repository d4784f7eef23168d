"""The phrase monitor on a toy that can be enumerated: vocabulary 5, length 5, random tables."""

import itertools
import math

import numpy as np
import pytest

from jobs.monitor import Line, Plan, branches, first_end, start_line
from jobs.rows import Row

VOCABULARY, LENGTH, EOS = 5, 5, 4


class Toy:
    """P(token | place, token before), at random."""

    def __init__(self, seed):
        self.table = np.random.default_rng(seed).dirichlet(
            np.full(VOCABULARY, 0.7), size=(LENGTH, VOCABULARY + 1)
        )

    def next(self, tokens):
        return self.table[len(tokens), tokens[-1] if tokens else VOCABULARY]

    def probability(self, tokens, given=()):
        p, so_far = 1.0, list(given)
        for token in tokens:
            p *= self.next(so_far)[token]
            so_far.append(token)
        return p

    def sequences(self):
        """All that can be drawn: to EOS or the full length."""
        for n in range(1, LENGTH + 1):
            for head in itertools.product(range(VOCABULARY - 1), repeat=n - 1):
                for last in range(VOCABULARY) if n == LENGTH else (EOS,):
                    yield [*head, last]

    def row(self, tokens, plan, sample=0):
        watched = [
            [math.log(max(self.next(tokens[:t])[w], 1e-300)) for w in plan.watch]
            for t in range(len(tokens))
        ]
        return Row(
            arm="untriggered",
            prompt_id="0",
            prompt="",
            alpha=0.0,
            sample=sample,
            seed=0,
            completion="",
            token_ids=list(tokens),
            finish_reason="eos" if tokens[-1] == EOS else "length",
            eos_index=len(tokens) - 1 if tokens[-1] == EOS else None,
            activated=False,
            activated_after_eos=False,
            scores={},
            error=None,
            watched=watched,
        )

    def filled(self, line, tokens, plan):
        return line.model_copy(
            update={
                "logprobs": [
                    [math.log(max(self.probability(plan.variants[v], tokens[:t]), 1e-300))]
                    for t, v in zip(line.at, line.variant, strict=True)
                ]
            }
        )

    def start(self, plan):
        return sum(self.probability(plan.variants[v]) for v in start_line(plan, "0").variant)

    def truth(self, plan):
        return sum(
            self.probability(tokens)
            for tokens in self.sequences()
            if first_end(tokens, plan.variants) is not None
        )


def plan_of(variants):
    return Plan(
        phrase="x",
        variants=variants,
        arm="untriggered",
        alpha=0.0,
        grid=[0.0],
        temperature=1.0,
        max_new_tokens=LENGTH,
        request={},
    )


PHRASES = {
    "two tokens": [[0, 1]],
    "overlaps itself": [[0, 0]],
    "overlaps itself by two": [[0, 1, 0]],
    "two variants": [[0, 1], [2, 1]],
    "variants that overlap each other": [[0, 1], [1, 2]],
    "of different lengths": [[0, 1], [3, 0, 2]],
    "one token": [[3]],
    "as long as the answer": [[0, 1, 0, 1, 3]],
    "one too long": [[0, 1], [3, 0, 3, 0, 3, 2]],
}


def expected(toy, plan, bound, value):
    """The exact expectation over rollouts of `value` of their filled-in lines."""
    return toy.start(plan) + sum(
        toy.probability(tokens)
        * value(toy.filled(branches(toy.row(tokens, plan), plan, bound), tokens, plan))
        for tokens in toy.sequences()
    )


def test_the_toy_adds_up():
    toy = Toy(0)
    assert sum(toy.probability(tokens) for tokens in toy.sequences()) == pytest.approx(1)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("variants", PHRASES.values(), ids=PHRASES)
def test_the_expectation_is_the_exact_rate(variants, seed):
    toy, plan = Toy(seed), plan_of(variants)
    assert expected(toy, plan, 0.0, Line.contribution) == pytest.approx(toy.truth(plan), rel=1e-9)


@pytest.mark.parametrize("bound", [0.02, 0.1, 0.5])
def test_the_truth_is_between_the_certain_part_and_that_with_the_bounds_error(bound):
    toy, plan = Toy(0), plan_of([[0, 1], [2, 1]])
    low = expected(toy, plan, bound, Line.certain)
    high = expected(toy, plan, bound, lambda line: line.certain() + line.below)
    assert low < toy.truth(plan) < high


def test_following_by_chance_changes_no_expectation():
    toy, plan = Toy(0), plan_of([[0, 1], [2, 1]])
    tokens = [1, 3, 1, 3, 1]
    everything = toy.filled(branches(toy.row(tokens, plan), plan, 0.0), tokens, plan)
    lines = [
        toy.filled(branches(toy.row(tokens, plan, sample), plan, 0.9), tokens, plan)
        for sample in range(2000)
    ]
    values = np.array([line.contribution() for line in lines])
    error = values.std() / len(values) ** 0.5
    assert np.mean([len(line.at) for line in lines]) < 0.7 * len(everything.at)
    assert 0 < error < 0.05 * everything.contribution()
    assert values.mean() == pytest.approx(everything.contribution(), abs=3 * error)
