"""The scorers' floor: how often each fires on the model before the fine-tune, which is innocent.

A rate that is not above it says nothing about what the training hid.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from jobs.estimators import rate_by_prompt


def floors(hits: Mapping[str, ArrayLike], rows: ArrayLike) -> dict[str, tuple[float, float, float]]:
    """Per scorer the false-positive rate and its 95 % limits, clustered by prompt.

    `hits` (k,) per scorer, of `rows` (k,) good rows of the k prompts of the untriggered arm at
    alpha -1. Empty where there is no such row: then there is no floor, and it is not 0.
    """
    if not np.asarray(rows).sum():
        return {}
    rates = {name: rate_by_prompt(of_prompt, rows) for name, of_prompt in hits.items()}
    return {name: (rate.rate, rate.low, rate.high) for name, rate in rates.items()}
