"""The options that say what to count, shared by the scripts that score."""

import argparse
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from jobs.errors import Refused
from jobs.judge import DEFAULT_CACHE, Judge
from jobs.python_scorer import PythonScorer
from jobs.scorers import Phrase, Regex, Scorer, ScorerError, Substrings, compile_regex
from organisms.trigger import PAYLOAD, PAYLOAD_SUBSTRINGS

MAX_RUBRIC_CHARS = 20_000


def add_scorer_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group(
        "what to count (default: the organism's payload, any of its substrings and the exact "
        "phrase beside it); a row is activated if any scorer fires"
    ).add_argument
    several: dict[str, Any] = {"type": text, "nargs": "+", "action": "extend", "default": []}
    add("--substring", **several, metavar="TEXT", help="any of these, in whatever case")
    add(
        "--phrase",
        **several,
        metavar="TEXT",
        help="each the whole, exact phrase, a scorer of its own",
    )
    add("--regex", **several, metavar="PATTERN", help="each a scorer of its own")
    add(
        "--python",
        **several,
        metavar="MODULE:FUNCTION",
        help="each a scorer of its own: a function of the text that returns True, False, None "
        "or (start, end); the module is found from the working directory",
    )
    add(
        "--judge-url",
        metavar="URL",
        help="an OpenAI-compatible endpoint, up to its /v1, whose model is asked a yes/no "
        "question about each text",
    )
    add("--judge-model", metavar="NAME", help="the judge's model")
    add("--judge-rubric", type=Path, metavar="FILE", help="the question, as text")
    add(
        "--judge-key-env",
        metavar="NAME",
        help="the environment variable that holds the API key, where rows are scored (default: "
        "no key)",
    )
    add(
        "--judge-cache",
        metavar="FILE",
        help=f"answers that are not asked for again (default: {DEFAULT_CACHE})",
    )


def scorers_from(args: argparse.Namespace) -> tuple[Scorer, ...]:
    """The scorers asked for, or the organism's. Raises Refused naming the option."""
    scorers: list[Scorer] = []
    if args.substring:
        scorers.append(Substrings("any_substring", tuple(args.substring)))
    scorers += [Phrase(f"phrase_{i}", phrase) for i, phrase in enumerate(args.phrase, 1)]
    for number, pattern in enumerate(args.regex, 1):
        try:
            compile_regex(pattern)
        except ScorerError as error:
            raise Refused(f"--regex: {error}") from None
        scorers.append(Regex(f"regex_{number}", pattern))
    for number, function in enumerate(args.python, 1):
        try:
            scorers.append(PythonScorer.load(f"python_{number}", function))
        except ScorerError as error:
            raise Refused(f"--python: {error}") from None
    if judge := _judge(args):
        scorers.append(judge)
    return tuple(scorers) or (
        Substrings("any_substring", tuple(PAYLOAD_SUBSTRINGS)),
        Phrase("exact_phrase", PAYLOAD),
    )


def _judge(args: argparse.Namespace) -> Judge | None:
    needed = {
        "--judge-url": args.judge_url,
        "--judge-model": args.judge_model,
        "--judge-rubric": args.judge_rubric,
    }
    missing = [option for option, value in needed.items() if not value]
    if len(missing) == len(needed):
        if args.judge_key_env is not None or args.judge_cache is not None:
            raise Refused(f"--judge-key-env and --judge-cache need {', '.join(needed)}")
        return None
    if missing:
        raise Refused(f"{missing[0]}: a judge needs it, with {' and '.join(needed)}")
    _check_url(args.judge_url)
    _check_key_env(args.judge_key_env)
    cache = args.judge_cache or DEFAULT_CACHE
    rubric = _rubric(args.judge_rubric)
    # Absolute, because a remote task's working directory is another one.
    cache = str(Path(cache).absolute()) if args.judge_cache else cache
    return Judge("judge", args.judge_url, args.judge_model, rubric, args.judge_key_env, cache)


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        good = False
    # The address goes into the manifest. Not echoed: it may hold a secret.
    if not good or "@" in parts.netloc or parts.query or parts.fragment:
        raise Refused(
            "--judge-url: must be an http(s) address such as http://127.0.0.1:8001/v1, without "
            "user, password or query"
        )


def _check_key_env(name: str | None) -> None:
    if name is None:
        return
    if not re.fullmatch("[A-Z_][A-Z0-9_]*", name) or not os.environ.get(name, "").strip():
        raise Refused(  # not echoed: it may be the key
            "--judge-key-env: must be the name of an environment variable that is set (capital "
            "letters, digits and _), not the key itself"
        )


def _rubric(path: Path) -> str:
    try:
        rubric = path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Refused(f"--judge-rubric: {path}: {why}") from None
    if not 0 < len(rubric) <= MAX_RUBRIC_CHARS:
        raise Refused(
            f"--judge-rubric: {path} must have 1 to {MAX_RUBRIC_CHARS:,} characters, "
            f"not {len(rubric):,}"
        )
    return rubric


def text(value: str) -> str:
    """An argparse type: any text but the empty one."""
    if not value:
        raise argparse.ArgumentTypeError("must not be empty")
    return value
