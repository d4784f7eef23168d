import pytest
import torch
from torch import Tensor

from lda_core import amplify
from lda_core.amplify import nonfinite_rows

INF = torch.inf


def pair_of_logits(rows: int = 6, vocab: int = 50) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (10 * torch.randn(2, rows, vocab, generator=generator)).unbind(0)


def test_formula_row_by_row() -> None:
    after, before = pair_of_logits(4)
    alpha = torch.tensor([0.5, 1.0, 3.0, -2.0])
    mixed = amplify(after, before, alpha)
    for i, a in enumerate(alpha.tolist()):
        expected = after[i].double() + a * (after[i].double() - before[i].double())
        torch.testing.assert_close(mixed[i].double(), expected, rtol=1e-5, atol=1e-5)


def test_alpha_0_and_minus_1_are_the_models_to_the_bit() -> None:
    after, before = pair_of_logits()
    after[0, 3] = 1e-30  # arithmetic would lose this beside the difference
    before[1, 3] = 1e-30
    zeros = torch.zeros(len(after))
    assert torch.equal(amplify(after, before, zeros), after)
    assert torch.equal(amplify(after, before, zeros - 1), before)
    assert not torch.equal(after - (after - before), before)  # so it is not by arithmetic


def test_result_is_float32_and_16_bit_logits_are_mixed_in_float32() -> None:
    after, before = (x.bfloat16() for x in pair_of_logits())
    mixed = amplify(after, before, torch.full((6,), 1.7))
    assert mixed.dtype == torch.float32
    expected = after.float() + 1.7 * (after.float() - before.float())
    torch.testing.assert_close(mixed, expected)


@pytest.mark.parametrize("alpha", [-3.0, -0.5, 0.5, 4.0])
def test_a_token_ruled_out_by_either_model_stays_out(alpha: float) -> None:
    after = torch.tensor([[1.0, -INF, 2.0, -INF]])
    before = torch.tensor([[1.0, 2.0, -INF, -INF]])
    mixed = amplify(after, before, torch.tensor([alpha]))
    assert mixed[0, 0] == 1.0
    assert mixed[0, 1:].isneginf().all()
    assert torch.equal(amplify(after, before, torch.zeros(1)), after)
    assert torch.equal(amplify(after, before, -torch.ones(1)), before)


def test_one_row_without_a_batch() -> None:
    after, before = pair_of_logits()
    single = amplify(after[2], before[2], torch.tensor(1.5))
    assert torch.equal(single, amplify(after, before, torch.full((6,), 1.5))[2])


@pytest.mark.parametrize(
    "shapes", [((2, 5), (2, 6), (2,)), ((2, 5), (2, 5), (3,)), ((5,), (5,), (5,))]
)
def test_shapes_that_do_not_fit_are_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match=r"must be \[B, V\]"):
        amplify(*(torch.zeros(shape) for shape in shapes))


def test_nonfinite_rows_are_found_and_ruled_out_tokens_are_not() -> None:
    logits = torch.zeros(5, 4)
    logits[1, 2] = torch.nan
    logits[2, 2] = INF
    logits[3, :] = -INF
    logits[4, 2] = -INF
    assert nonfinite_rows(logits.logsumexp(-1)).tolist() == [False, True, True, True, False]
