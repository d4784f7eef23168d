"""Where in a decoder layer what is captured comes by, for every architecture of the engine.

`mid` is the residual stream after attention: what enters the second norm, and to which the MLP's
contribution is added. A row of these tables is a promise kept by tests/test_capture.py.

Shapes: R rows the model sees, T tokens, D hidden size, F the MLP's width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers import PreTrainedModel

from lda_core.errors import RequestError, UnsupportedArchitecture
from lda_core.sharing import decoder_layers

_POST_ATTENTION_NORM = """arcee gemma glm glm4 granite granitemoe helium llama ministral mistral
    mixtral nemotron olmo olmoe phi3 qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 starcoder2
    gpt_oss falcon gpt_neox stablelm"""

# The module whose input is `mid`: the second norm, or the MLP where the norm comes behind it.
_READS_MID: dict[str, str] = {
    **dict.fromkeys(_POST_ATTENTION_NORM.split(), "post_attention_layernorm"),
    **dict.fromkeys("gemma2 gemma3_text".split(), "pre_feedforward_layernorm"),
    **dict.fromkeys("gpt2 gpt_bigcode".split(), "ln_2"),
    **dict.fromkeys("exaone4 olmo2 olmo3".split(), "mlp"),
    "opt": "final_layer_norm",
}
# Attention and MLP both read the layer's input: `mid` is that input and attention's output. Of
# some only if their config says so.
_ALWAYS: Callable[[Any], bool] = lambda config: True  # noqa: E731
_PARALLEL: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys("cohere cohere2 gptj phi".split(), _ALWAYS),
    **dict.fromkeys("gpt_neox stablelm".split(), lambda config: config.use_parallel_residual),
    "falcon": lambda config: config.new_decoder_architecture or config.parallel_attn,
}
_ATTENTION = {
    **dict.fromkeys("gpt2 gpt_bigcode gptj".split(), "attn"),
    "gpt_neox": "attention",
    "falcon": "self_attention",
}

CAPTURED = frozenset(_READS_MID) | frozenset(_PARALLEL)

# The MLP's up- and down-projection, in the layer.
_GATED = "mlp.up_proj", "mlp.down_proj"
_MLP: dict[str, tuple[str, str]] = {
    **dict.fromkeys("gpt2 gpt_bigcode starcoder2".split(), ("mlp.c_fc", "mlp.c_proj")),
    **dict.fromkeys("falcon gpt_neox".split(), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h")),
    **dict.fromkeys("glm glm4 phi3".split(), ("mlp.gate_up_proj", "mlp.down_proj")),
    "gptj": ("mlp.fc_in", "mlp.fc_out"),
    "phi": ("mlp.fc1", "mlp.fc2"),
    "opt": ("fc1", "fc2"),
}
# Of these no tensor [T, F] is the up-projection of all tokens.
_EXPERTS = frozenset("gpt_oss granitemoe mixtral olmoe qwen2_moe qwen3_moe".split())


class Mid(NamedTuple):
    """`mid` is the input of `module`, or the layer's input plus what `module` gives."""

    module: nn.Module
    how: Literal["input", "added"]


def layers_of(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder layers. Raises UnsupportedArchitecture by name."""
    layers = decoder_layers(model)
    kind = _kind(model)
    if layers is None or kind not in CAPTURED:
        raise UnsupportedArchitecture(
            f"{kind}: its residual stream cannot be captured; supported: "
            + ", ".join(sorted(CAPTURED))
        )
    return layers


def mid_of(model: PreTrainedModel, layer: nn.Module) -> Mid:
    kind, config = _kind(model), model.config
    if (parallel := _PARALLEL.get(kind)) is not None and parallel(config):
        return Mid(attention_of(model, layer), "added")
    name = _READS_MID[kind]
    if kind == "opt" and not config.do_layer_norm_before:
        name = "fc1"  # the first norm comes behind attention; the second ends the layer
    return Mid(layer.get_submodule(name), "input")


def attention_of(model: PreTrainedModel, layer: nn.Module) -> nn.Module:
    return layer.get_submodule(_ATTENTION.get(_kind(model), "self_attn"))


Part = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Inside:
    """Of one layer, what a capture in depth reads.

    Attributes:
      attention: gives its weights as the second of its outputs, where they are computed.
      projections: (module, name, how the part of that name is had from its output [R, T, ...]):
        q, k and v [R, T, heads, d], before any norm or rotary embedding, and mlp_up [R, T, F].
      down: the MLP's down-projection; its input is mlp_activation, its output mlp_down.
    """

    attention: nn.Module
    projections: tuple[tuple[nn.Module, str, Part], ...]
    down: nn.Module


def inside_of(model: PreTrainedModel, layer: nn.Module) -> Inside:
    """Raises RequestError naming `layer` where it cannot be given as it is."""
    kind = _kind(model)
    if kind in _EXPERTS:
        raise RequestError(
            "layer",
            f"must be absent for {kind}: its MLP is a mixture of experts, which has no one "
            "up-projection of every token",
        )
    attention: Any = attention_of(model, layer)
    up, down = _MLP.get(kind, _GATED)
    part = _second_half if up.endswith("gate_up_proj") else _whole
    return Inside(
        attention,
        (*_qkv(kind, model.config, attention), (layer.get_submodule(up), "mlp_up", part)),
        layer.get_submodule(down),
    )


def _qkv(kind: str, config: Any, attention: Any) -> tuple[tuple[nn.Module, str, Part], ...]:
    heads = config.num_attention_heads
    d: int
    if kind == "phi3":
        d, kv = attention.head_dim, config.num_key_value_heads
        ends = [0, heads * d, (heads + kv) * d, (heads + 2 * kv) * d]
        return _slices(attention.qkv_proj, ends, d)
    if kind == "gpt2":
        d = attention.head_dim
        return _slices(attention.c_attn, [i * heads * d for i in range(4)], d)
    if kind == "gpt_bigcode" and config.multi_query:
        d = attention.head_dim
        return _slices(attention.c_attn, [0, heads * d, (heads + 1) * d, (heads + 2) * d], d)
    if kind in ("gpt_bigcode", "gpt_neox"):  # head by head: its query, its key, its value
        fused = attention.c_attn if kind == "gpt_bigcode" else attention.query_key_value
        return _groups(fused, heads, 3)
    if kind == "falcon":
        fused = attention.query_key_value
        if config.new_decoder_architecture:
            return _groups(fused, config.num_kv_heads, heads // config.num_kv_heads + 2)
        return _groups(fused, 1, heads + 2) if config.multi_query else _groups(fused, heads, 3)
    d = attention.q_proj.out_features // heads
    split = partial(_heads, d=d)
    return tuple((getattr(attention, f"{name}_proj"), name, split) for name in "qkv")


def _slices(fused: nn.Module, ends: list[int], d: int) -> tuple[tuple[nn.Module, str, Part], ...]:
    """q, k and v side by side."""
    spans = zip("qkv", ends, ends[1:], strict=False)
    return tuple((fused, name, partial(_slice, a=a, b=b, d=d)) for name, a, b in spans)


def _groups(fused: nn.Module, groups: int, each: int) -> tuple[tuple[nn.Module, str, Part], ...]:
    """Groups of heads side by side: the queries of each, then its key, then its value."""
    places = {"q": slice(0, each - 2), "k": slice(each - 2, each - 1), "v": slice(each - 1, each)}
    return tuple(
        (fused, name, partial(_group, groups=groups, each=each, part=part))
        for name, part in places.items()
    )


def _heads(x: Tensor, d: int) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, d)


def _slice(x: Tensor, a: int, b: int, d: int) -> Tensor:
    return _heads(x[..., a:b], d)


def _group(x: Tensor, groups: int, each: int, part: slice) -> Tensor:
    return x.reshape(*x.shape[:-1], groups, each, -1)[..., part, :].flatten(-3, -2)


def _whole(x: Tensor) -> Tensor:
    return x


def _second_half(x: Tensor) -> Tensor:
    """Gate and up-projection side by side."""
    return x[..., x.shape[-1] // 2 :]


def _kind(model: PreTrainedModel) -> str:
    kind: str = model.config.model_type
    return kind
