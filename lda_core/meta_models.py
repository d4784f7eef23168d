"""Models without their weights, for the planner: from a config file, on the meta device.

There tensors have a shape and a dtype but no data. The configs come from the folder that is named,
else the hub's cache, else the shapes of a few public models in model_shapes/, else the hub.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import torch
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from huggingface_hub.utils._headers import build_hf_headers
from huggingface_hub.utils._http import get_session, hf_raise_for_status
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lda_core import checkpoint
from lda_core.architectures import require_exact
from lda_core.config import PairConfig
from lda_core.errors import CheckpointError
from lda_core.memory import kv_numbers_per_token, model_bytes
from lda_core.model_runner import kv_bytes_per_token

SHAPES = Path(__file__).parent / "model_shapes"
_HUB_TIMEOUT_S = 5


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
