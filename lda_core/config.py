"""Settings of the pair and of the engine: frozen, checked once, a misspelt key fails."""

from dataclasses import dataclass
from typing import Literal

from lda_core.errors import ConfigError

DType = Literal["auto", "float32", "float16", "bfloat16"]
Device = str  # "auto", "cpu", "cuda", "cuda:1"
AdapterMode = Literal["stacked", "merged"]
DeviceMap = Literal["auto", "balanced", "sequential"]


@dataclass(frozen=True)
class PairConfig:
    """Which two models. `after` and `before` are local folders or hub ids.

    Attributes:
      after: the post-trained model; None when it is `before` plus `adapter`.
      before: the model it came from.
      adapter: folder or hub id of a LoRA adapter on `before` (peft's format).
      after_revision, before_revision: hub commits, tags or branches (after's or the adapter's).
      dtype: "auto" is float32 on a CPU and what the checkpoint says elsewhere.
      device: "auto" is the GPU if there is one.
      tokenizer: folder or hub id, where neither model's own should be used.
      tokenizer_class: transformers' class name, where the checkpoint's own is misspelt.
      add_bos_token: whether the tokenizer begins a prompt with BOS; None is its own choice, which
        for LLaMA checkpoints without tokenizer.json is no since transformers 5 and was yes before.
      allow_pickle: load .bin weights too (with torch's weights_only).
      adapter_mode: "stacked" runs a LoRA pair as one pass over one copy of the weights, where the
        adapter allows it; "merged" as two models.
      before_device: where *before* lives, if not beside *after*; the two then step at the same
        time.
      device_map: spreads each model over the devices in sight ("auto", "balanced", "sequential").
    """

    before: str
    after: str | None = None
    adapter: str | None = None
    after_revision: str | None = None
    before_revision: str | None = None
    dtype: DType = "auto"
    device: Device = "auto"
    tokenizer: str | None = None
    tokenizer_class: str | None = None
    add_bos_token: bool | None = None
    allow_pickle: bool = False
    adapter_mode: AdapterMode = "stacked"
    before_device: Device | None = None
    device_map: DeviceMap | None = None

    def __post_init__(self) -> None:
        if (self.after is None) == (self.adapter is None):
            raise ConfigError("after, adapter: give exactly one of the two")
        if self.dtype not in ("auto", "float32", "float16", "bfloat16"):
            raise ConfigError("dtype: must be auto, float32, float16 or bfloat16")
        if self.adapter_mode not in ("stacked", "merged"):
            raise ConfigError("adapter_mode: must be stacked or merged")
        if self.device_map not in (None, "auto", "balanced", "sequential"):
            raise ConfigError("device_map: must be auto, balanced or sequential")
        if self.device_map is not None and self.before_device is not None:
            raise ConfigError("device_map, before_device: give at most one of the two")


@dataclass(frozen=True)
class EngineConfig:
    """How much the engine holds at once.

    Attributes:
      max_slots: most rows that decode together.
      kv_tokens: key/value budget in tokens, which rows x the longest row's own part + prompts x
        the longest prompt never exceed; None takes it from the free memory after loading.
      prefill_tokens: most (padded) tokens of one prefill pass, which bounds its memory; a longer
        prompt is read in pieces.
      context_length: None is the smaller of the two models' own.
      prefix_pool_bytes: keys and values of prompts read before are kept up to this much, so that
        a prompt that comes again is not read again; 0 keeps none. None is 256 MiB on a CPU, on a
        GPU a twentieth of what is free after loading.
      share_prefixes: samples of one prompt hold its keys and values once; off, each holds a copy
        (for comparison; architectures that cannot share always do).
      cuda_graphs: replay a step's kernels from recorded graphs (on a GPU): the host's share of a
        step goes.
    """

    max_slots: int = 64
    kv_tokens: int | None = None
    prefill_tokens: int = 2048
    context_length: int | None = None
    prefix_pool_bytes: int | None = None
    share_prefixes: bool = True
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        if self.prefix_pool_bytes is not None and self.prefix_pool_bytes < 0:
            raise ConfigError("prefix_pool_bytes: must be at least 0")
        for name in ("max_slots", "kv_tokens", "prefill_tokens", "context_length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}: must be at least 1")
