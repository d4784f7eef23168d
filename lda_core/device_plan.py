"""What a pair takes on its GPUs: the budget of each, and how many rows of a length fit."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lda_core.config import EngineConfig, PairConfig
from lda_core.errors import ConfigError
from lda_core.memory import Budget, activation_bytes, budget, gib, prefix_pool_bytes
from lda_core.meta_models import ModelPlan, is_stacked, model_plans, on_two_devices

_LENGTHS = (128, 250, 512, 1024)


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
    both = on_two_devices(pair)
    most = 2 if both else 1
    if len(totals) > most and pair.device_map is None:
        raise ConfigError(
            f"{len(totals)} GPUs are given, the config uses {most} "
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
