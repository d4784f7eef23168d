"""The planner: what a pair will take on a GPU, from the config file alone.

    python -m lda_core.plan --config serve_config.a40.yaml --gpu-gib 45

No weight is read and no GPU is needed.

Exit status: 0 it fits; 1 it does not; 2 a wrong argument, setting or model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import transformers
import yaml
from rich.console import Console

from lda_core.config import EngineConfig, PairConfig
from lda_core.device_plan import DoesNotFitAtAll, Plan, plan
from lda_core.errors import ConfigError, LDAError
from lda_core.memory import GIB
from lda_core.plan_tables import show

_Config = TypeVar("_Config", PairConfig, EngineConfig)


# -- settings ----------------------------------------------------------------------------


def load_settings(path: Path, name: str | None = None) -> tuple[PairConfig, EngineConfig]:
    """`pair` and `engine` of a Serve config file's first application; where it has several, those
    of the pair of that name. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text())
        args = data["applications"][0]["args"]
        if "pairs" in args or name is not None:
            named = args.get("pairs") or {}
            if name not in named:
                known = ", ".join(named) or "none with a name"
                raise ConfigError(f"--pair: must name one of the pairs; there are {known}")
            args = named[name]
        pair, engine = args["pair"], args.get("engine") or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except (KeyError, IndexError, TypeError, AttributeError):
        raise ConfigError(f"{path}: has no applications[0].args.pair") from None
    return _settings(PairConfig, "pair", pair), _settings(EngineConfig, "engine", engine)


def _settings(cls: type[_Config], name: str, given: Any) -> _Config:
    if not isinstance(given, dict):
        raise ConfigError(f"{name}: must be a mapping")
    known = [field.name for field in fields(cls)]
    for key in given:
        if key not in known:
            raise ConfigError(f"{name}.{key}: no such setting; there are {', '.join(known)}")
    try:
        return cls(**given)
    except TypeError as error:  # a value of a wrong type, or one that is missing
        raise ConfigError(f"{name}: {error}") from None


# -- the command -------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m lda_core.plan",
        description="What the pair of a config file takes on a GPU, without loading any weights.",
        epilog="exit status: 0 it fits; 1 it does not; 2 a wrong argument, setting or model",
        allow_abbrev=False,
    )
    whole = _at_least(int, 1)
    add = made.add_argument
    add("--config", type=Path, required=True, metavar="FILE", help="as for serve run")
    add("--pair", metavar="NAME", help="of a file with several pairs")
    add(
        "--gpu-gib",
        type=_at_least(float, 0.1),
        nargs="+",
        required=True,
        metavar="GIB",
        help="memory of the GPU; two for a pair on two (after's first)",
    )
    add(
        "--reserve-gib",
        type=_at_least(float, 0),
        default=1.7,
        metavar="GIB",
        help="of each, what CUDA keeps (default: 1.7, an A40)",
    )
    add("--lengths", type=_at_least(int, 2), nargs="+", metavar="N", help="prompt + new tokens")
    add("--new-tokens", type=whole, default=64, metavar="N", help="new ones of these (default: 64)")
    add("--samples", type=whole, default=64, metavar="N", help="of one prompt (default: 64)")
    add("--json", action="store_true", help="for programs, sizes in bytes")
    return made


def _at_least(kind: Any, least: float) -> Any:
    def number(text: str) -> Any:
        value = kind(text)
        if not least <= value < 1e9:
            raise argparse.ArgumentTypeError(f"must be at least {least}")
        return value

    number.__name__ = kind.__name__  # for "invalid int value"
    return number


def as_json(made: Plan) -> dict[str, Any]:
    """The plan for programs; sizes in bytes."""
    models = [
        {k: v for k, v in vars(m).items() if k not in ("shape", "notices")} for m in made.models
    ]
    devices = [{**vars(d), "budget": d.budget._asdict()} for d in made.devices]
    return {
        "fits": True,
        **{k: v for k, v in vars(made).items() if k not in ("models", "devices", "rows")},
        "models": models,
        "devices": devices,
        "rows": [vars(at) for at in made.rows],
    }


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    try:
        pair, engine = load_settings(args.config, args.pair)
        made = plan(
            pair,
            engine,
            [int(size * GIB) for size in args.gpu_gib],
            reserve=int(args.reserve_gib * GIB),
            lengths=args.lengths,
            new=args.new_tokens,
            samples=args.samples,
        )
    except DoesNotFitAtAll as error:
        if args.json:
            print(json.dumps({"fits": False, "error": str(error)}))
        print(f"does not fit: {error}", file=sys.stderr)
        return 1
    except LDAError as error:
        print(f"plan: {error}", file=sys.stderr)
        return 2
    if args.json:
        print(json.dumps(as_json(made), indent=2))
    else:
        show(made, Console())
    return 0


if __name__ == "__main__":
    sys.exit(main())
