"""Architectures the slot engine is known to be exact on, and the attention mask each expects.

A row of this table is a promise kept by tests/test_architectures.py: the engine's tokens equal
those of one row decoded alone, without cache and without padding. What is not listed is refused
by name: ALiBi (Bloom, MPT, Falcon-ALiBi) adds its positions inside the mask, and linear-attention
or hybrid models keep a state that a slot's mask cannot hide.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from lda_core.errors import UnsupportedArchitecture

# causal: one mask for every layer.
# window: one mask for every layer, with config.sliding_window where it is set.
# by_layer_type: a dict of masks, keyed as config.layer_types.
MaskStyle = Literal["causal", "window", "by_layer_type"]

_CAUSAL = """arcee cohere falcon gemma glm glm4 gpt2 gpt_bigcode gpt_neox gptj granite granitemoe
    helium llama nemotron olmo olmo2 olmoe opt phi seed_oss stablelm"""
_WINDOW = "mistral mixtral phi3 qwen3_moe starcoder2"
_BY_LAYER_TYPE = """cohere2 exaone4 gemma2 gemma3_text gpt_oss ministral olmo3 qwen2 qwen2_moe qwen3
    smollm3"""

EXACT: dict[str, MaskStyle] = {
    **dict.fromkeys(_CAUSAL.split(), "causal"),
    **dict.fromkeys(_WINDOW.split(), "window"),
    **dict.fromkeys(_BY_LAYER_TYPE.split(), "by_layer_type"),
}


def require_exact(config: Any) -> MaskStyle:
    """How the architecture wants its masks. Raises UnsupportedArchitecture by name."""
    kind = config.model_type
    style = EXACT.get(kind)
    if style is None:
        raise UnsupportedArchitecture(
            f"{kind}: the engine is not known to be exact on it; supported: "
            + ", ".join(sorted(EXACT))
        )
    if getattr(config, "alibi", False):
        raise UnsupportedArchitecture(f"{kind} with ALiBi: positions live inside the mask")
    for rope in _rope_types(getattr(config, "rope_parameters", None)):
        if rope in ("dynamic", "longrope"):
            raise UnsupportedArchitecture(
                f"{kind} with {rope} RoPE: its frequencies depend on the longest row of the "
                "batch, so a row would depend on its neighbours"
            )
    return style


def _rope_types(parameters: Any) -> list[str]:
    """RoPE types in a config, which holds one set of parameters or one per layer type."""
    if not isinstance(parameters, dict):
        return []
    if "rope_type" in parameters:
        return [parameters["rope_type"]]
    return [rope for inner in parameters.values() for rope in _rope_types(inner)]


def decode_mask(
    config: Any, positions: Tensor, prefixes: Tensor, prefix_width: int, width: int
) -> Tensor | dict[str, Tensor]:
    """Mask for one token per row over `prefix_width` shared columns and `width` own ones.

    `positions` [R] is the position of the token being read and `prefixes` [R] the length of the
    row's prefix; prefix column c is position c, own column c is position prefixes + c. A row sees
    all positions up to its own (or the last `sliding_window` of them).
    [R, 1, 1, prefix_width + width], boolean for sdpa; otherwise additive.
    """
    shared = torch.arange(prefix_width, device=positions.device)
    own = torch.arange(width, device=positions.device) + prefixes.unsqueeze(-1)  # (R, W)
    position = positions.unsqueeze(-1)  # (R, 1)
    full = own <= position
    if prefix_width:
        full = torch.cat([shared < prefixes.unsqueeze(-1), full], dim=-1)  # (R, P+W)
    window = getattr(config, "sliding_window", None)
    if EXACT[config.model_type] == "causal" or window is None:
        near = full
    else:
        column = torch.cat([shared.expand(len(positions), -1), own], dim=-1)
        near = full & (column > position - window)

    def shaped(mask: Tensor) -> Tensor:
        mask = mask[:, None, None, :]
        if config._attn_implementation == "sdpa":
            return mask
        dtype = config.dtype or torch.float32
        return torch.where(mask, 0.0, torch.finfo(dtype).min).to(dtype)

    if EXACT[config.model_type] == "by_layer_type":
        return {"full_attention": shaped(full), "sliding_attention": shaped(near)}
    return shaped(near)
