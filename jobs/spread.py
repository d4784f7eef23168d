"""`--spread`: each prompt at one alpha only, drawn by lot.

Where few prompts carry a rare behaviour, a run finds it by crossing many prompts rather than by
reading each of them at every alpha. Prompts in the order of the file make blocks of as many as
there are alphas, and the prompts of a block get the alphas in a random order. So every alpha has
one prompt in every block, and every prompt any alpha with the same probability.
"""

from collections.abc import Sequence
from random import Random
from typing import NamedTuple

from jobs.call import seed_of


class Place(NamedTuple):
    """A prompt's block, from 0 on, and the alpha that it got there."""

    block: int
    alpha: float


def place(seed: int, alphas: Sequence[float], number: int) -> Place:
    """Of prompt `number`, from 0 on, in a run with this seed."""
    block, within = divmod(number, len(alphas))
    order = Random(seed_of(seed, "spread", block)).sample(alphas, len(alphas))
    return Place(block, order[within])


def whole_blocks(prompts: int, alphas: Sequence[float]) -> int:
    """How many of the prompts are used: not those of a last block that is not whole.

    With them some alphas would have a prompt more than others, and a block without a row at alpha
    0 has no bound on its weights. Left out, they take nothing from the others' being drawn by lot:
    the estimate stays unbiased, for the prompts that are used.
    """
    return prompts - prompts % len(alphas)
