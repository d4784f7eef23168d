"""Which alphas `--alphas auto` chooses: on made-up pilots, and on the tiny pair's own rollouts."""

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from deployments.schemas import Densities
from jobs.choose_alpha import PILOT_ALPHAS, PILOT_PROMPTS, choice_table, choose
from jobs.coherence import Drift, drifts
from jobs.errors import Refused
from jobs.rows import Row, RowLogprobs
from lda_core import Engine, Request, encode
from organisms.trigger import has_payload_piece

HELDOUT = Path(__file__).parents[1] / "prompts" / "tiny_heldout.txt"


def drift(alpha, kl, loss=0.0):
    return Drift(
        alpha=alpha,
        kl=kl,
        logprob_after=-0.5,
        logprob_before=-9.0,
        rate=0.1,
        rows=100,
        prompts=100,
        tokens=1000,
        quiet_before=-0.5 - loss,
        kl_se=0.0,
        logprob_after_se=0.0,
        logprob_before_se=0.0,
        quiet_before_se=0.0,
    )


def parabola(scale, loss=0.0):
    return [drift(a, scale * a**2, loss * a) for a in PILOT_ALPHAS]


@pytest.mark.parametrize("scale", [0.03, 0.1, 0.5])
def test_targets_are_hit_whatever_the_pair(scale):
    """A quadratic drift is what the interpolation is made for: exact, but for the rounding."""
    choice = choose(parabola(scale), targets=(0.01, 0.06, 0.4))
    assert choice.alphas[0] == 0 and len(choice.alphas) == len(choice.reasons) == 4
    for alpha, target in zip(choice.alphas[1:], (0.01, 0.06, 0.4), strict=True):
        exact = (target / scale) ** 0.5
        assert exact * 0.89 < alpha <= exact + 0.002  # rounded down to 2 digits
        assert float(f"{alpha:.2g}") == alpha


def test_the_budget_limits_alphas():
    choice = choose(parabola(0.1, loss=1.0), targets=(0.01, 0.06, 0.4), budget=1.25)
    assert choice.limit == pytest.approx(1.25, abs=0.002)
    assert choice.alphas == (0.0, 0.31, 0.77, 1.2)
    assert choice.reasons[-1].startswith("the largest within the budget, which drifts 0.16 of 0.4")
    tight = choose(parabola(0.1, loss=1.0), targets=(0.01, 0.06, 0.4), budget=0.1)
    assert tight.alphas == (0.0, 0.1)  # three targets, one alpha


def test_targets_that_mean_the_same_alpha_give_one():
    near = choose(parabola(0.1), targets=(0.01, 0.0125, 0.06))  # alphas 0.31 and 0.35
    assert near.alphas == choose(parabola(0.1), targets=(0.01, 0.06)).alphas


def test_without_quiet_rows_the_budget_looks_at_all():
    loud = [replace(d, quiet_before=float("nan"), logprob_before=-d.alpha) for d in parabola(0.1)]
    assert choose(loud, budget=1.5).limit == pytest.approx(1.5, abs=0.002)


def test_no_alpha_is_chosen_beyond_the_pilot():
    choice = choose(parabola(0.002))
    assert choice.alphas[-1] == choice.limit == 4
    assert choice.reasons[-1] == "the pilot's largest, which drifts 0.032 of 0.06 nats a token"


def test_a_pair_that_does_not_differ_has_nothing_to_amplify():
    assert choose(parabola(0.0)).alphas == (0.0, 4.0)


def test_noise_makes_no_hole():
    """A drift that falls, or is below 0, is noise: it cannot fall."""
    kls = [0.0, -0.01, 0.02, 0.015, 0.1, 0.09, 0.5, 1.0]
    noisy = [drift(a, kl) for a, kl in zip(PILOT_ALPHAS, kls, strict=True)]
    choice = choose(noisy, targets=(0.01, 0.05, 0.4))
    assert list(choice.alphas) == sorted(choice.alphas)
    assert 0.25 < choice.alphas[1] < 0.5 < 1 < choice.alphas[2] < 1.5 and 2 < choice.alphas[3] < 3


def test_alphas_below_0_are_not_looked_at():
    pilot = [drift(-1.0, float("inf"), 5.0), *parabola(0.1)]
    assert choose(pilot) == choose(parabola(0.1))


@pytest.mark.parametrize("alphas", [(0.0, 1.0), (0.5, 1.0, 2.0), ()])
def test_a_pilot_that_says_too_little_is_refused(alphas):
    with pytest.raises(Refused, match="--alphas auto: the pilot needs good rows at alpha 0"):
        choose([drift(a, a) for a in alphas])


def pilot_rows(pair, prompts):
    """As the job would make them, but for the service."""
    asked = [(i, prompt, alpha) for i, prompt in enumerate(prompts) for alpha in PILOT_ALPHAS]
    requests = [
        Request(
            encode(pair.tokenizer, prompt, "alpaca").ids,
            alpha=alpha,
            max_new_tokens=48,
            seed=number,
            grid=PILOT_ALPHAS,
        )
        for number, (_, prompt, alpha) in enumerate(asked)
    ]
    for (i, prompt, alpha), made in zip(asked, Engine(pair).generate(requests), strict=True):
        yield Row(
            arm="untriggered",
            prompt_id=str(i),
            prompt=prompt,
            alpha=alpha,
            sample=0,
            seed=made.seed,
            completion=made.text,
            token_ids=list(made.token_ids),
            finish_reason=made.finish_reason,
            eos_index=made.eos_index,
            activated=has_payload_piece(made.text),
            activated_after_eos=False,
            scores={},
            error=None,
            logprobs=RowLogprobs(after=made.logprobs.after, before=made.logprobs.before),
            densities=Densities(
                alphas=made.densities.alphas, normalisers=made.densities.normalisers, drawn=None
            ),
        )


def test_the_tiny_pair_gets_its_useful_range(tiny_pair):
    """0.5 to 2, by its measured table; at 3 the text is visibly damaged. 10 pilots of this size
    chose 0.44-0.65, 0.81-1.1 and 1.7-2 (1,000 prompts: 0.52, 0.97, 1.9)."""
    prompts = HELDOUT.read_text().splitlines()[:PILOT_PROMPTS]
    pilot = drifts(pilot_rows(tiny_pair, prompts), 1.0)
    choice = choose(pilot)
    assert len(choice.alphas) == 4
    for alpha, (low, high) in zip(
        choice.alphas[1:], [(0.35, 0.8), (0.7, 1.3), (1.5, 2.3)], strict=True
    ):
        assert low < alpha < high
    assert choice.limit < 3
    shown = Console(width=120, record=True)
    shown.print(choice_table(pilot, choice))
    text = shown.export_text()
    assert "rate against coherence" in text and "beyond" in text and "within" in text
