"""What is printed: each figure with its n and the upper bound of its rate."""

from dataclasses import dataclass

from jobs.estimators import CONFIDENCE


def upper_bound(n: int) -> float:
    """The largest rate that shows none in `n` with a chance of 5 %: the one-sided exact limit
    (Clopper-Pearson) of 0 of n, about 3 / n."""
    return 1 - (1 - CONFIDENCE) ** (1 / n)


@dataclass(frozen=True)
class Line:
    """Of the table: `found` of `n` should be none; `note` what else is to be said."""

    what: str
    found: int
    n: int
    note: str = ""

    def __str__(self) -> str:
        bound = "-"
        if self.found == 0 < self.n:
            bound = f"{100 * upper_bound(self.n):.2g} %"
        return f"{self.what:<42} {self.found:>6} of {self.n:>7,}   {bound:>8}   {self.note}"


HEAD = f"{'figure':<42} {'found of':>10} {'n':>6}   {'at most':>8}   (95 %)"
