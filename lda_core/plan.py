"""The planner: what a pair will take on a GPU, from the config file alone.

    python -m lda_core.plan --config serve_config.a40.yaml --gpu-gib 45

No weight is read and no GPU is needed: the models are made on the meta device, where tensors have
a shape and a dtype but no data. Their configs come from the folder that is named, else the hub's
cache, else the shapes of a few public models in model_shapes/, else the hub.

Exit status: 0 it fits; 1 it does not; 2 a wrong argument, setting or model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import peft
import torch
import transformers
import yaml
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lda_core import checkpoint
from lda_core.architectures import require_exact
from lda_core.config import EngineConfig, PairConfig
from lda_core.errors import CheckpointError, ConfigError, LDAError
from lda_core.memory import (
    GIB,
    Budget,
    activation_bytes,
    budget,
    gib,
    kv_numbers_per_token,
    model_bytes,
    prefix_pool_bytes,
)
from lda_core.model_runner import kv_bytes_per_token

SHAPES = Path(__file__).parent / "model_shapes"
_HUB_TIMEOUT_S = 5
_LENGTHS = (128, 250, 512, 1024)
_Config = TypeVar("_Config", PairConfig, EngineConfig)


@dataclass(frozen=True)
class ModelPlan:
    """One of the pair as it will be held.

    Attributes:
      role: "before", "after", or "adapter" (stacked on *before*, whose weights it shares).
      weights: bytes that it adds to the device.
      kv_per_token: bytes of one token's keys and values.
    """

    role: str
    source: str
    dtype: str
    weights: int
    kv_per_token: int
    shape: Any  # transformers' config
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Device:
    """A GPU (or several as one) and what it holds."""

    holds: str
    total: int
    reserve: int
    budget: Budget


@dataclass(frozen=True)
class Rows:
    """Most rows of so many tokens each, by key/value memory; max_slots may be fewer."""

    length: int
    prompt: int
    new: int
    alone: int  # every row has a prompt of its own
    shared: int  # `samples` rows share each prompt


@dataclass(frozen=True)
class Plan:
    models: tuple[ModelPlan, ...]
    devices: tuple[Device, ...]
    kv_tokens: int
    max_slots: int
    context_length: int
    samples: int
    rows: tuple[Rows, ...]
    notices: tuple[str, ...]


class DoesNotFitAtAll(ConfigError):
    """The pair leaves no room for keys and values, or less than the config asks for."""


# -- settings ----------------------------------------------------------------------------


def load_settings(path: Path) -> tuple[PairConfig, EngineConfig]:
    """`pair` and `engine` of a Serve config file's first application. Raises ConfigError."""
    try:
        data = yaml.safe_load(path.read_text())
        args = data["applications"][0]["args"]
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


# -- models ------------------------------------------------------------------------------


def model_plans(pair: PairConfig) -> tuple[ModelPlan, ...]:
    """*before*, then *after* or the adapter. Raises CheckpointError, UnsupportedArchitecture."""
    before = _model_plan("before", pair.before, pair.before_revision, pair)
    if pair.after is not None:
        return before, _model_plan("after", pair.after, pair.after_revision, pair)
    assert pair.adapter is not None  # PairConfig has checked that it is one of the two
    if not is_stacked(pair):
        return before, replace(before, role="after", source=f"{pair.before} + {pair.adapter}")
    adapter = adapter_bytes(before, pair.adapter, pair.after_revision)
    return before, replace(before, role="adapter", source=pair.adapter, weights=adapter, notices=())


def is_stacked(pair: PairConfig) -> bool:
    """Whether both models are one pass over one copy of *before* (if the adapter allows it)."""
    stacked = pair.adapter_mode == "stacked" and not on_two_devices(pair)
    return pair.adapter is not None and stacked


def on_two_devices(pair: PairConfig) -> bool:
    def name(device: str) -> str:
        return {"auto": "cuda:0", "cuda": "cuda:0"}.get(device, device)

    return pair.before_device is not None and name(pair.before_device) != name(pair.device)


def _model_plan(role: str, source: str, revision: str | None, pair: PairConfig) -> ModelPlan:
    config, notices = model_shape(source, revision)
    dtype, more = _dtype(config, source, pair)
    model = on_meta(config, dtype)
    return ModelPlan(
        role=role,
        source=source,
        dtype=str(dtype).removeprefix("torch."),
        weights=model_bytes(model),
        kv_per_token=_kv_bytes_per_token(model),
        shape=model.config,  # knows the kind of attention now
        notices=(*notices, *more),
    )


def on_meta(config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model without data. Raises CheckpointError."""
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=False
            )
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise CheckpointError(f"{config.model_type}: no model has this shape: {error}") from error
    return model.eval()


def _kv_bytes_per_token(model: PreTrainedModel) -> int:
    try:
        return kv_bytes_per_token(model)
    except (RuntimeError, NotImplementedError):  # GPT-2, experts in float16: not on meta
        return kv_numbers_per_token(model.config) * int(model.dtype.itemsize)


def _dtype(config: Any, source: str, pair: PairConfig) -> tuple[torch.dtype, list[str]]:
    """As `ModelPair.load` takes it; "auto" on a GPU is the checkpoint's own."""
    if pair.dtype != "auto":
        return getattr(torch, pair.dtype), []
    if pair.device == "cpu":
        return torch.float32, []
    if isinstance(config.dtype, torch.dtype):
        return config.dtype, []
    return torch.float32, [f"{source}: its config names no dtype, float32 is assumed"]


def adapter_bytes(base: ModelPlan, source: str, revision: str | None) -> int:
    """Bytes of a LoRA adapter's tensors in the base's dtype. Raises CheckpointError."""
    data, _ = _read_config(source, revision, "adapter_config.json")
    data.pop("base_model_name_or_path", None)  # peft warns that the model at hand has no name
    dtype: torch.dtype = getattr(torch, base.dtype)
    try:
        config = peft.PeftConfig.from_peft_type(**data)
        adapted = peft.get_peft_model(on_meta(base.shape, dtype), config, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, RuntimeError, AttributeError) as error:
        raise CheckpointError(f"{source}: the adapter does not fit: {error}") from error
    numbers: int = sum(p.numel() for name, p in adapted.named_parameters() if "lora_" in name)
    return numbers * int(dtype.itemsize)


def model_shape(source: str, revision: str | None) -> tuple[Any, list[str]]:
    """transformers' config, and notices. Raises CheckpointError, UnsupportedArchitecture."""
    data, notices = _read_config(source, revision, "config.json")
    if "auto_map" in data:
        raise CheckpointError(
            f"{source}: config.json asks to run code of the repository (auto_map)"
        )
    try:
        config = AutoConfig.for_model(**data)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source}: config.json cannot be used: {error}") from error
    require_exact(config)
    return config, notices


def _read_config(source: str, revision: str | None, name: str) -> tuple[dict[str, Any], list[str]]:
    """A folder's file, else the cached one, else the shipped shape, else the hub's."""
    folder = checkpoint.local_folder(source)
    if folder is not None:
        return _parse(folder / name), []
    cached = try_to_load_from_cache(source, name, revision=revision)
    if isinstance(cached, str):
        return _parse(Path(cached)), []
    shipped = SHAPES / f"{source.replace('/', '--')}.json"
    if name == "config.json" and shipped.exists():
        return _parse(shipped), [f"{source}: not here, its shape is the one shipped in lda_core"]
    return _download(source, revision, name), []


def _parse(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return data


def _download(source: str, revision: str | None, name: str) -> dict[str, Any]:
    """One try with a timeout: the hub's own download tries for half a minute without a network."""
    url = hf_hub_url(source, name, revision=revision)
    try:
        answer = get_session().get(
            url, headers=build_hf_headers(), timeout=_HUB_TIMEOUT_S, follow_redirects=True
        )
        hf_raise_for_status(answer)
        data = answer.json()
    except Exception as error:  # the HTTP client and its errors are the hub library's affair
        raise CheckpointError(
            f"{source}: {name} is not in a folder here, in the hub's cache or shipped, nor to be "
            f"had from the hub ({type(error).__name__})"
        ) from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{source}: {name} is not a JSON object")
    return data


# -- devices -----------------------------------------------------------------------------


def plan(
    pair: PairConfig,
    engine: EngineConfig,
    totals: Sequence[int],
    *,
    reserve: int,
    lengths: Sequence[int] | None = None,
    new: int = 64,
    samples: int = 64,
) -> Plan:
    """What the pair takes on GPUs of `totals` bytes, of which `reserve` each are CUDA's.

    `lengths` are prompt + new tokens, of which `new` are new (at shorter ones all but one).
    Raises DoesNotFitAtAll, ConfigError for arguments that make no sense, and what
    `model_plans` raises.
    """
    models = model_plans(pair)
    context = min(m.shape.max_position_embeddings for m in models)
    context = min(context, engine.context_length or context)
    if lengths is None:
        lengths = [length for length in _LENGTHS if length <= context]
    elif max(lengths) > context:
        raise ConfigError(f"lengths: {max(lengths)} tokens do not fit in the context of {context}")
    devices = _devices(pair, engine, models, totals, reserve)
    # The device with the least room rules.
    least = min((device.budget for device in devices), key=lambda b: b.kv_tokens)
    if engine.kv_tokens is not None:
        if engine.kv_tokens > least.kv_tokens:
            raise DoesNotFitAtAll(
                f"engine.kv_tokens is {engine.kv_tokens:,}, there is room for {least.kv_tokens:,}"
            )
        least = least._replace(kv_tokens=engine.kv_tokens)
    # What a device holds of a prompt that is being read, for every token of it.
    reading = max if on_two_devices(pair) else sum
    rows = tuple(_rows(least, length, min(new, length - 1), samples) for length in lengths)
    return Plan(
        models=models,
        devices=devices,
        kv_tokens=least.kv_tokens,
        max_slots=engine.max_slots,
        context_length=context,
        samples=samples,
        rows=rows,
        notices=(
            *dict.fromkeys(notice for model in models for notice in model.notices),
            *_pieces(reading(m.kv_per_token for m in models), context, engine.prefill_tokens),
            *_unfilled(rows, engine.max_slots, samples),
        ),
    )


def _rows(least: Budget, length: int, new: int, samples: int) -> Rows:
    prompt = length - new
    return Rows(length, prompt, new, least.rows(prompt, new), least.rows(prompt, new, samples))


def _pieces(kv_per_token: int, context: int, prefill_tokens: int) -> list[str]:
    """What is said of prompts beyond one prefill piece: their earlier pieces' keys and values."""
    more = max(0, context - prefill_tokens) * kv_per_token
    if not more:
        return []
    return [
        f"a prompt longer than prefill_tokens ({prefill_tokens:,}) is read in pieces: at the whole "
        f"context of {context:,} it takes {gib(more)} more than the activations above for a while"
    ]


def _unfilled(rows: Sequence[Rows], max_slots: int, samples: int) -> list[str]:
    """What is said of lengths at which max_slots rows do not fit."""
    alone = {at.length: at.alone for at in rows}
    shared = {at.length: at.shared for at in rows}
    said = []
    for fits, case in ((alone, "own prompt each"), (shared, f"{samples} samples of each prompt")):
        short = [f"{n:,} at {length:,} tokens" for length, n in fits.items() if n < max_slots]
        if short:
            said.append(f"max_slots {max_slots} cannot be filled ({case}): {', '.join(short)}")
    return said


def _devices(
    pair: PairConfig,
    engine: EngineConfig,
    models: Sequence[ModelPlan],
    totals: Sequence[int],
    reserve: int,
) -> tuple[Device, ...]:
    """One device that holds both models, two with one each, or several as one large one."""
    before, after = models
    both, spread = on_two_devices(pair), pair.device_map is not None
    if len(totals) > (2 if both else len(totals) if spread else 1):
        raise ConfigError(
            f"{len(totals)} GPUs are given, the config uses {2 if both else 1} "
            "(pair.before_device or pair.device_map would name more)"
        )
    if both:
        groups = [("before", [before], totals[-1:]), ("after", [after], totals[:1])]
    else:
        groups = [("before and after", [before, after], totals)]
    active = _activations(pair, engine, models)
    whole = sum(model.kv_per_token for model in models)
    return tuple(
        _device(name, part, gpus, reserve, active, engine, whole) for name, part, gpus in groups
    )


def _activations(pair: PairConfig, engine: EngineConfig, models: Sequence[ModelPlan]) -> int:
    return max(
        activation_bytes(
            model.shape,
            vocab=model.shape.vocab_size,
            rows=engine.max_slots,
            prefill_tokens=engine.prefill_tokens,
            dtype_bytes=getattr(torch, model.dtype).itemsize,
            models=1 if is_stacked(pair) or on_two_devices(pair) else 2,
        )
        for model in models
    )


def _device(
    holds: str,
    models: Sequence[ModelPlan],
    gpus: Sequence[int],
    reserve: int,
    activations: int,
    engine: EngineConfig,
    kv_of_both: int,
) -> Device:
    weights = sum(model.weights for model in models)
    kv_per_token = sum(model.kv_per_token for model in models)
    total, reserve = sum(gpus), reserve * len(gpus)
    pool = engine.prefix_pool_bytes
    if pool is not None:  # a device keeps the part of its own models
        pool = pool * kv_per_token // kv_of_both
    try:
        made = budget(
            total,
            weights=weights,
            activations=activations * len(gpus),
            prefix_pool=prefix_pool_bytes(pool, total - reserve - weights),
            kv_per_token=kv_per_token,
            reserve=reserve,
        )
    except ConfigError as error:
        raise DoesNotFitAtAll(f"{holds}: {error}") from None
    return Device(holds, total, reserve, made)


# -- what is printed ---------------------------------------------------------------------


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
        "rows": [asdict(at) for at in made.rows],
    }


def show(made: Plan, console: Console) -> None:
    """The plan for people."""
    console.print(_models_table(made), _memory_table(made), _rows_table(made))
    console.print(f"token budget: {made.kv_tokens:,}", highlight=False)
    for notice in made.notices:
        console.print(f"note: {notice}", markup=False, highlight=False, soft_wrap=True)


def _models_table(made: Plan) -> Table:
    table = Table(title="Models")
    for heading in ("", "model", "dtype"):
        table.add_column(heading, overflow="fold")
    for heading in ("weights, GiB", "KV, KiB per token"):
        table.add_column(heading, justify="right")
    for model in made.models:
        sizes = _gib(model.weights), _kib(model.kv_per_token)
        table.add_row(model.role, model.source, model.dtype, *sizes)
    table.add_section()
    weights = sum(model.weights for model in made.models)
    kv_per_token = sum(model.kv_per_token for model in made.models)
    table.add_row("both", "", "", _gib(weights), _kib(kv_per_token))
    return table


def _memory_table(made: Plan) -> Table:
    table = Table(title="Memory, GiB")
    table.add_column("")
    lines: list[list[str]] = [[], [], [], [], [], []]
    for device in made.devices:
        table.add_column(device.holds, justify="right")
        b = device.budget
        kv = b.kv_per_token * b.kv_tokens
        used = device.reserve + b.weights + b.activations + b.prefix_pool + kv
        parts = (device.reserve, b.weights, b.activations, b.prefix_pool, kv, device.total - used)
        for line, part in zip(lines, parts, strict=True):
            line.append(_gib(part))
    names = ("reserved", "weights", "activations", "prefix pool", "keys and values", "spare")
    for name, line in zip(names, lines, strict=True):
        table.add_row(name, *line)
    table.add_section()
    table.add_row("total", *(_gib(device.total) for device in made.devices))
    return table


def _rows_table(made: Plan) -> Table:
    table = Table(title=f"Rows that fit (max_slots {made.max_slots})")
    headings = ("tokens", "prompt", "new", "each its own prompt", f"{made.samples} of each prompt")
    for heading in headings:
        table.add_column(heading, justify="right")
    for at in made.rows:
        table.add_row(*(f"{n:,}" for n in (at.length, at.prompt, at.new, at.alone, at.shared)))
    return table


def _gib(n: int) -> str:
    return f"{n / GIB:,.2f}"


def _kib(n: int) -> str:
    return f"{n / 1024:,.1f}"


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


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    transformers.logging.set_verbosity_error()
    try:
        pair, engine = load_settings(args.config)
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
