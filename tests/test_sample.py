from functools import partial

import pytest
import torch
from reference import keep_top
from scipy.stats import chisquare, kstest
from torch import Tensor

from lda_core import Sampling, sample
from lda_core.sampling import _token_hash, gumbel_noise, truncate


def sampling(
    rows: int, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, seed: int | None = None
) -> Sampling:
    seeds = torch.arange(rows) if seed is None else torch.full((rows,), seed)
    return Sampling(
        torch.full((rows,), temperature),
        torch.full((rows,), top_p),
        torch.full((rows,), top_k),
        seeds,
    )


def draw(logits: Tensor, n: int, **how: float | int) -> Tensor:
    """[V] -> [n] tokens, each with a seed of its own."""
    return sample(logits.expand(n, -1), sampling(n, **how), torch.zeros(n, dtype=torch.long))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_match_softmax(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0, 0.5, -4.0])
    n = 40_000
    counts = draw(logits, n, temperature=temperature).bincount(minlength=6)
    expected = n * (logits.double() / temperature).softmax(-1)
    assert chisquare(counts.numpy(), expected.numpy()).pvalue > 1e-3


def test_frequencies_match_over_the_steps_of_one_seed() -> None:
    logits = torch.tensor([1.0, 0.0, -1.0])
    n = 40_000
    tokens = sample(logits.expand(n, -1), sampling(n, seed=7), torch.arange(n))
    expected = n * logits.double().softmax(-1)
    assert chisquare(tokens.bincount(minlength=3).numpy(), expected.numpy()).pvalue > 1e-3


def test_noise_is_gumbel_and_finite() -> None:
    noise = gumbel_noise(torch.arange(64), torch.zeros(64, dtype=torch.long), 32_000)
    assert noise.isfinite().all()  # 2 M draws: u rounded to 1 would give inf in about one of 16 M
    assert noise.min() > -3.0 and noise.max() < 23.0
    assert kstest(noise[:4].flatten().numpy(), "gumbel_r").pvalue > 1e-3


def test_noise_at_the_extremes_of_its_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = torch.zeros(1, dtype=torch.long)
    # Uncached: what is hashed here must not stay for other tests.
    monkeypatch.setattr("lda_core.sampling._token_hash", _token_hash.__wrapped__)
    for bits in (0, -1):  # of int32: none set, all set
        constant = partial(torch.full_like, fill_value=bits)
        monkeypatch.setattr("lda_core.sampling._mix32", constant)
        assert gumbel_noise(zero, zero, 3).isfinite().all()


def test_noise_depends_on_seed_step_and_token_alone() -> None:
    seeds, steps = torch.tensor([3, 2**40 + 3, 3]), torch.tensor([0, 0, 1])
    together = gumbel_noise(seeds, steps, 100)
    for i in range(3):
        assert torch.equal(together[i], gumbel_noise(seeds[i : i + 1], steps[i : i + 1], 100)[0])
    assert torch.equal(together, gumbel_noise(seeds, steps, 200)[:, :100])
    assert len({tuple(row.tolist()) for row in together}) == 3  # high bits of a seed count too


def test_a_seed_survives_tiny_changes_of_the_logits() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(500, 1000, generator=generator)
    nudged = logits + 1e-3 * torch.randn(logits.shape, generator=generator)
    step = torch.zeros(500, dtype=torch.long)
    same = sample(logits, sampling(500), step) == sample(nudged, sampling(500), step)
    assert same.float().mean() > 0.99


def test_temperature_0_is_greedy_also_beside_warm_rows() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    how = sampling(4)._replace(temperature=torch.tensor([0.0, 1.0, 0.0, 1.0]))
    tokens = sample(logits, how, torch.zeros(4, dtype=torch.long))
    assert torch.equal(tokens[[0, 2]], logits[[0, 2]].argmax(-1))


def test_the_token_that_crosses_top_p_is_kept() -> None:
    logits = torch.tensor([0.6, 0.36, 0.04]).log()
    assert set(draw(logits, 2000, top_p=0.95).tolist()) == {0, 1}
    assert set(draw(logits, 2000, top_p=0.59).tolist()) == {0}
    assert set(draw(logits, 2000, top_p=0.97).tolist()) == {0, 1, 2}


def test_top_p_frequencies_are_the_renormalised_ones() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log()
    n = 20_000
    counts = draw(logits, n, top_p=0.75).bincount(minlength=4)
    assert counts[2:].sum() == 0
    assert chisquare(counts[:2].numpy(), [n * 0.625, n * 0.375]).pvalue > 1e-3


@pytest.mark.parametrize("vocab", [7, 300, 5000])
@pytest.mark.parametrize("top_k", [0, 1, 40, 1000])
@pytest.mark.parametrize("top_p", [1.0, 0.999, 0.9, 0.3, 1e-6])
def test_support_equals_that_of_a_full_sort(vocab: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(vocab)
    # From nearly flat (many candidates needed) to peaked.
    spread = torch.tensor([0.01, 1.0, 4.0]).unsqueeze(-1)
    logits = spread * torch.randn(3, vocab, generator=generator)
    kept = truncate(logits, torch.full((3,), top_p), torch.full((3,), top_k))
    for row, truncated in zip(logits, kept, strict=True):
        expected = keep_top(row, top_p, top_k).isfinite()
        # A full sort sums the mass in another order: at most the crossing token differs.
        assert (truncated.isfinite() != expected).sum() <= (1 if 1e-6 < top_p < 1 else 0)
        assert torch.equal(truncated[truncated.isfinite()], row[truncated.isfinite()])


def test_truncation_of_a_row_does_not_depend_on_its_neighbours() -> None:
    logits = torch.randn(4, 3000, generator=torch.Generator().manual_seed(2))
    logits[1] *= 5
    top_p, top_k = torch.tensor([0.9, 0.9, 1.0, 0.5]), torch.tensor([0, 5, 0, 2000])
    together = truncate(logits, top_p, top_k)
    for i in range(4):
        assert torch.equal(
            together[i], truncate(logits[i : i + 1], top_p[i : i + 1], top_k[i : i + 1])[0]
        )


def test_tied_tokens_are_kept_together() -> None:
    kept = truncate(torch.zeros(1, 6), torch.tensor([1.0]), torch.tensor([2]))
    assert kept.isfinite().all()


def test_one_row_without_a_batch() -> None:
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(3))
    how, step = sampling(3, top_p=0.9), torch.tensor([0, 4, 9])
    tokens = sample(logits, how, step)
    assert tokens.shape == (3,)
    for i in range(3):
        one = sample(logits[i], Sampling(*(value[i] for value in how)), step[i])
        assert one.shape == () and one == tokens[i]
