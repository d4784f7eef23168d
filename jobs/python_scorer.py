"""A scorer that is a Python function of the user's, given as MODULE:FUNCTION."""

import hashlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, Self

from jobs.scorers import Score, ScorerError, first_length


class Loaded(NamedTuple):
    function: Callable[[str], Any]
    sha256: str


@dataclass(frozen=True)
class PythonScorer:
    """Fires where the function says so: True or (start, end); False or None where it does not.

    The module is imported once per process, with the working directory first on the path.
    `sha256` is that of its file: another file in another process, or one edited meanwhile, is
    no answer rather than another one (what the module imports in its turn is not covered).
    Monotone only where the function has an attribute `monotone` that is True. Called from
    several threads at a time.
    """

    name: str
    function: str
    sha256: str
    version: str = "python/1"

    @classmethod
    def load(cls, name: str, function: str) -> Self:
        """Raises ScorerError where there is no such function."""
        return cls(name, function, load(function).sha256)

    @property
    def monotone(self) -> bool:
        return getattr(load(self.function).function, "monotone", False) is True

    def __call__(self, text: str) -> Score:
        score = self._call(text)
        if not score.fired or not self.monotone:
            return score
        end = first_length(lambda n: self._call(text[:n]).fired is True, len(text))
        return Score(True, self._call(text[:end]).start, end)

    def _call(self, text: str) -> Score:
        function, sha256 = load(self.function)
        if sha256 != self.sha256:
            raise ScorerError(
                f"scorer {self.name}: {self.function} is another file here, "
                f"sha256 {sha256[:12]} instead of {self.sha256[:12]}"
            )
        try:
            answer = function(text)
        except Exception as error:
            raise ScorerError(f"scorer {self.name}: {type(error).__name__}: {error}") from error
        match answer:
            case bool():
                return Score(answer)
            case None:
                return Score(False)
            case (int(start), int(end)) if 0 <= start <= end <= len(text):
                return Score(True, int(start), int(end))  # a bool is an int, too
        raise ScorerError(
            f"scorer {self.name}: must answer True, False, None or (start, end) within the "
            f"text's {len(text)} characters, not {answer!r:.100}"
        )


@cache
def load(function: str) -> Loaded:
    """Raises ScorerError where it cannot be imported or is no function."""
    module_name, _, name = function.partition(":")
    if not (module_name and name):
        raise ScorerError(f"{function!r} must be MODULE:FUNCTION")
    if (folder := os.getcwd()) not in sys.path:
        sys.path.insert(0, folder)
    try:
        module = import_module(module_name)
        found = getattr(module, name)
        source = Path(str(module.__file__)).read_bytes()
    except (Exception, SystemExit) as error:
        raise ScorerError(f"{function}: {type(error).__name__}: {error}") from error
    if not callable(found):
        raise ScorerError(f"{function} is not a function")
    return Loaded(found, hashlib.sha256(source).hexdigest())
