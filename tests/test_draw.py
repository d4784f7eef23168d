"""The quick draw: the same tokens as `sample` gives, one copy to the host."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lda_core import Request, sample
from lda_core.amplify import amplify
from lda_core.batch import BatchState, Row
from lda_core.draw import _FORGET, Draw, Drawer
from lda_core.sampling import CANDIDATES

VOCAB = 1500
ALPHAS = (-1.0, 0.0, -0.5, 0.5, 1.0, 3.0)
KINDS: dict[str, list[dict[str, Any]]] = {
    "greedy": [{"temperature": 0.0}, {"temperature": 0.0, "top_p": 0.5}],
    "truncated": [
        {"top_p": 0.9},
        {"top_p": 0.3},
        {"top_p": 1e-6},
        {"top_k": 1},
        {"top_k": 40},
        {"top_k": 400, "top_p": 0.95},
    ],
    "full": [{}],
}


@pytest.fixture
def careful(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry, the number of rows, for every draw that was not certain."""
    calls: list[int] = []

    original = Drawer._with_care

    def noted(self: Drawer, after: Any, before: Any, at: BatchState) -> Any:
        calls.append(len(at.tokens))
        return original(self, after, before, at)

    monkeypatch.setattr(Drawer, "_with_care", noted)
    return calls


def state(requests: list[Request], step: int = 0) -> BatchState:
    rows = [Row(request, token_ids=[5] * (step + i % 3)) for i, request in enumerate(requests)]
    return BatchState.of(rows, [], torch.device("cpu"))


def requests(n: int, kinds: str, seed: int, **more: Any) -> list[Request]:
    rng = random.Random(seed)
    found = []
    for _ in range(n):
        how = {"temperature": rng.uniform(0.3, 2.0), **rng.choice(KINDS[rng.choice(kinds.split())])}
        settings = {"alpha": rng.choice(ALPHAS), "seed": rng.randrange(2**60), **how, **more}
        found.append(Request((5,), **settings))
    return found


def logits(n: int, seed: int, spread: float = 3.0) -> tuple[Tensor, Tensor]:
    """Peaked enough for the first candidates."""
    generator = torch.Generator().manual_seed(seed)
    before = spread * torch.randn(n, VOCAB, generator=generator)
    return before + 0.5 * torch.randn(n, VOCAB, generator=generator), before


def expected(after: Tensor, before: Tensor, at: BatchState) -> Tensor:
    return sample(amplify(after, before, at.alpha), at.sampling, at.step)


def agrees(draw: tuple[Tensor, Draw], wanted: Tensor) -> bool:
    tokens, host = draw
    return host.tokens == tokens.tolist() == wanted.tolist() and not any(host.failed)


@pytest.mark.parametrize(
    "kinds", ["greedy truncated full", "greedy", "truncated", "full", "greedy full"]
)
@pytest.mark.parametrize("ties", [False, True])
def test_the_tokens_are_those_of_sample(kinds: str, ties: bool, careful: list[int]) -> None:
    for seed in range(4):
        after, before = logits(100, seed, spread=8.0)
        if ties:  # dozens of tokens are tied, also at the border of a support
            after, before = after.round(), before.round()
        at = state(requests(100, kinds, seed), step=seed)
        assert agrees(Drawer(VOCAB)(after, before, at), expected(after, before, at))
        assert ties or not careful


def test_one_model_alone_and_wider_output_layers(careful: list[int]) -> None:
    after, before = logits(40, 0)
    wide = torch.cat([before, torch.full((40, 7), 99.0)], dim=-1)
    for alpha, given, plain in ((0.0, (after, None), after), (-1.0, (None, wide), before)):
        at = state(requests(40, "greedy full", 3, alpha=alpha))
        wanted = sample(plain, at.sampling, at.step)
        assert agrees(Drawer(VOCAB)(*given, at), wanted)
    assert not careful


def test_alpha_0_and_minus_1_are_the_models_to_the_bit() -> None:
    """Numbers where after - (after - before) rounds to something else."""
    after = torch.tensor([[1e8, 0.0, 0.0], [1e8, 0.0, 0.0]])
    before = torch.tensor([[1.25, 1.0, -1e8], [1.0, 1.25, -1e8]])
    at = state([Request((5,), alpha=-1.0, temperature=0.0)] * 2)
    assert (after + -1 * (after - before))[:, :2].argmax(-1).tolist() != [0, 1]
    assert Drawer(3)(after, before, at)[1].tokens == [0, 1]


def test_candidates_grow_where_the_distribution_is_flat(careful: list[int]) -> None:
    after, before = logits(12, 1, spread=0.01)
    drawer = Drawer(VOCAB)
    at = state([Request((5,), alpha=0.5, top_p=0.9, seed=i) for i in range(12)])
    for _ in range(6):
        assert agrees(drawer(after, before, at), expected(after, before, at))
    # 256, 512 and 1024 candidates did not do, all of them do; each time once for all rows.
    assert careful == [12, 12, 12]
    # Rows that are not flat need fewer again, and get there by and by.
    peaked = logits(12, 1, spread=9.0)
    for _ in range(5 * _FORGET):
        drawer(*peaked, at)
    assert drawer._candidates == CANDIDATES and len(careful) == 3


def test_a_large_top_k_needs_no_care(careful: list[int]) -> None:
    after, before = logits(13, 1, spread=0.01)
    at = state([Request((5,), top_k=k, seed=k) for k in range(300, 1600, 100)])
    assert agrees(Drawer(VOCAB)(after, before, at), expected(after, before, at))
    assert not careful


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("ruled_out_by", ["after", "before", "both"])
def test_a_token_that_a_model_rules_out(
    alpha: float, ruled_out_by: str, careful: list[int]
) -> None:
    """It is drawn only where alpha names the other model alone."""
    after, before = logits(60, 5)
    top = torch.arange(60)  # row i's favourite in both
    after[top, top] = before[top, top] = 30.0
    wanted = requests(60, "greedy truncated full", 5, alpha=alpha)
    for name, x in (("after", after), ("before", before)):
        if ruled_out_by in (name, "both"):
            x[top, top] = -torch.inf
    at = state(wanted)
    draw = Drawer(VOCAB)(after, before, at)
    assert agrees(draw, expected(after, before, at))
    free = (alpha, ruled_out_by) in ((0.0, "before"), (-1.0, "after"))
    assert not (free and careful)
    drawn = draw[0] == top
    assert drawn.float().mean() > 0.9 if free else not drawn.any()


def test_a_support_smaller_than_top_k() -> None:
    after, before = logits(60, 6)
    after[:, 10:] = before[:, 10:] = -torch.inf
    at = state(requests(60, "truncated full", 6))
    draw = Drawer(VOCAB)(after, before, at)
    assert agrees(draw, expected(after, before, at))
    assert max(draw[1].tokens) < 10


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_rows_that_are_not_finite_fail_alone(value: float) -> None:
    after, before = logits(40, 7)
    asked = requests(40, "greedy truncated full", 7, alpha=1.0)
    asked[3] = Request((5,), alpha=1.0)
    asked[8] = Request((5,), alpha=-1.0)  # does not need the model that is broken
    asked[9] = Request((5,), alpha=-1.0, logprobs=True)  # does
    asked[20] = Request((5,), alpha=0.0)
    at = state(asked)
    wanted = expected(after, before, at)
    after[[3, 8, 9, 20], 11] = value
    after[30] = -torch.inf  # nothing is left to draw
    tokens, host = Drawer(VOCAB)(after, before, at)
    assert [i for i, failed in enumerate(host.failed) if failed] == [3, 9, 20, 30]
    assert host.tokens == tokens.tolist()
    fine = [i for i in range(40) if not host.failed[i]]
    assert tokens[fine].tolist() == wanted[fine].tolist()
    assert all(0 <= token < VOCAB for token in host.tokens)


def test_log_probabilities_of_a_model_that_is_broken_fail_their_row_alone() -> None:
    after, before = logits(2, 7)
    after[:, 11] = torch.nan
    at = state([Request((5,), alpha=-1.0, logprobs=wanted) for wanted in (True, False)])
    assert Drawer(VOCAB)(after, before, at)[1].failed == [True, False]


@pytest.mark.parametrize("broken", [False, True])
def test_log_probabilities(broken: bool) -> None:
    after, before = logits(50, 8)
    asked = requests(50, "greedy truncated full", 8, logprobs=True)
    at = state(asked)
    if broken:  # another row sends all of them the careful way
        after[7, 3] = torch.nan
    tokens, host = Drawer(VOCAB)(after, before, at)
    assert [i for i, failed in enumerate(host.failed) if failed] == ([7] if broken else [])
    rows = [i for i in range(50) if not host.failed[i]]
    mixed = after.double() + at.alpha.double()[:, None] * (after.double() - before.double())
    for j, x in enumerate((after.double(), before.double(), mixed)):
        wanted = x.log_softmax(-1).gather(-1, tokens[:, None])[rows, 0]
        seen = torch.tensor([host.logprobs[i][j] for i in rows], dtype=torch.float64)
        torch.testing.assert_close(seen, wanted, rtol=1e-4, atol=1e-4)


class Syncs(TorchDispatchMode):
    """Operations whose result the host must wait for, on a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        waits = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
        by_mask = name in ("index", "index_put") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        if name in waits or "unique" in name or by_mask:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("logprobs", [False, True])
def test_one_copy_to_the_host(logprobs: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    after, before = logits(30, 9)
    at = state(requests(30, "greedy truncated full", 9, logprobs=logprobs))
    copies: Counter[str] = Counter()
    # These read a CPU's memory directly and are seen by no dispatch mode.
    for name in ("tolist", "cpu"):
        own = getattr(Tensor, name)

        def counted(self: Tensor, *, name: str = name, own: Any = own) -> Any:
            copies[name] += 1
            return own(self)

        monkeypatch.setattr(Tensor, name, counted)
    with Syncs() as syncs:
        Drawer(VOCAB)(after, before, at)
    assert copies == {"tolist": 1} and not syncs.seen
    with Syncs() as syncs:  # the counter counts
        truncated = after > 0
        assert bool(truncated.any()) and len(after[truncated]) and len(truncated.nonzero())
    assert syncs.seen == {"_local_scalar_dense": 1, "index": 1, "nonzero": 1}
