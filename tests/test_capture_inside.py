"""Captures in depth: one layer's attention and MLP, against its own modules."""

from typing import Any

import pytest
import torch
from chaos.oom import shared_trunk, stacked
from models import random_pair
from test_architectures import CHANGES
from test_capture import ROLES, WIRED, close, layers_of, plain, some
from torch import Tensor, nn
from transformers.activations import ACT2FN

from lda_core import CaptureRequest, Engine, EngineConfig, RequestError

EXPERTS = {"gpt_oss", "granitemoe", "mixtral", "olmoe", "qwen2_moe", "qwen3_moe"}
DENSE = [name for name, (kind, _) in WIRED.items() if kind not in EXPERTS]
# Up and down as the layer's own code has them, and whether a gate stands beside.
MLP = {
    **dict.fromkeys(("gpt2", "gpt_bigcode", "starcoder2"), ("mlp.c_fc", "mlp.c_proj", False)),
    **dict.fromkeys(("falcon", "gpt_neox"), ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", False)),
    **dict.fromkeys(("glm", "glm4", "phi3"), ("mlp.gate_up_proj", "mlp.down_proj", True)),
    **dict.fromkeys(("arcee", "nemotron"), ("mlp.up_proj", "mlp.down_proj", False)),
    "gptj": ("mlp.fc_in", "mlp.fc_out", False),
    "phi": ("mlp.fc1", "mlp.fc2", False),
    "opt": ("fc1", "fc2", False),
}
OUT = {"gpt2": "c_proj", "gpt_bigcode": "c_proj", "gptj": "out_proj", "opt": "out_proj"}
DENSE_OUT = {"falcon", "gpt_neox", "phi"}


def attention(layer: Any) -> Any:
    names = ("self_attn", "attn", "attention", "self_attention")
    return next(m for name in names if (m := getattr(layer, name, None)) is not None)


@torch.inference_mode()
def outputs_of(model: Any, module: nn.Module, ids: tuple[int, ...]) -> Tensor:
    """[T, ...] in a plain pass over one text."""
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda m, i, out: seen.append(out.clone()))
    model.base_model(input_ids=torch.tensor([ids]), use_cache=False)
    hook.remove()
    return seen[0].reshape(len(ids), -1)


@torch.inference_mode()
def eager_weights(model: Any, ids: tuple[int, ...], layer: int) -> Tensor:
    config, own = model.config, model.config._attn_implementation
    config._attn_implementation = "eager"
    try:
        said = model.base_model(
            input_ids=torch.tensor([ids]), use_cache=False, output_attentions=True
        )
    finally:
        config._attn_implementation = own
    weights: Tensor = said.attentions[layer][0]
    return weights


@pytest.mark.parametrize("name", DENSE)
def test_one_layer_in_depth_is_what_its_modules_give(name: str) -> None:
    kind, changes = WIRED[name]
    pair = random_pair(kind, **{**CHANGES.get(kind, {}), **changes})
    requests = some(None, 3, layer=1)
    engine = Engine(pair, EngineConfig(prefill_tokens=48))
    up, down, gated = MLP.get(kind, ("mlp.up_proj", "mlp.down_proj", True))
    for request, captured in zip(requests, engine.capture(requests), strict=True):
        ids = request.token_ids
        for role in ROLES:
            model = getattr(pair, role)
            layer: Any = layers_of(model)[1]
            found = {
                key.partition(".")[2]: x
                for key, x in captured.tensors.items()
                if key.startswith(role)
            }
            q, k, v, weights = (found[key] for key in ("q", "k", "v", "attention"))
            heads = model.config.num_attention_heads
            assert q.shape[:2] == (len(ids), heads) and weights.shape == (heads, len(ids), len(ids))
            # The weights are eager attention's, causal, and of each token 1.
            close(weights, eager_weights(model, ids, 1))
            assert not weights.triu(1).any()
            close(weights.sum(-1), torch.ones(heads, len(ids)))
            # With the values they make what attention gives.
            out = "dense" if kind in DENSE_OUT else OUT.get(kind, "o_proj")
            many = v.repeat_interleave(heads // v.shape[1], dim=1)  # (T, heads, d)
            mixed = torch.einsum("hts,shd->thd", weights, many).flatten(1)
            with torch.inference_mode():
                given = getattr(attention(layer), out)(mixed)
            close(given, plain(model, ids)[2][:, 1])
            # The MLP.
            activation = found["mlp_activation"]
            raised = outputs_of(model, layer.get_submodule(up), ids)
            if up.endswith("gate_up_proj"):
                raised = raised.chunk(2, dim=-1)[1]
            close(found["mlp_up"], raised)
            if not gated:
                config = model.config
                act = getattr(config, "hidden_act", None) or getattr(
                    config, "activation_function", None
                )
                close(activation, ACT2FN[act or config.activation](raised))
            with torch.inference_mode():
                close(found["mlp_down"], layer.get_submodule(down)(activation))
            close(found["mlp_down"], outputs_of(model, layer.get_submodule(down), ids))


@pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", "gpt_bigcode", "gpt_bigcode with heads of their own", "gpt_neox", "phi3"]
    + ["falcon", "falcon new", "falcon one after the other", "starcoder2"],
)
def test_queries_and_keys_make_the_weights(name: str) -> None:
    """Where nothing is rotated: softmax(q k / sqrt d)."""
    kind, changes = WIRED[name]
    pair = random_pair(kind, **{**CHANGES.get(kind, {}), **changes, "sliding_window": None})
    for role in ROLES:
        rotary: Any = getattr(getattr(pair, role).base_model, "rotary_emb", None)
        if rotary is not None:
            own = rotary.forward

            def still(*args: Any, own: Any = own, **options: Any) -> tuple[Tensor, Tensor]:
                cos, sin = own(*args, **options)
                return torch.ones_like(cos), torch.zeros_like(sin)

            rotary.forward = still
    ids = tuple(range(5, 25))
    (captured,) = Engine(pair).capture([CaptureRequest(ids, (), layer=1)])
    for role in ROLES:
        q, k, weights = (captured.tensors[f"{role}.{key}"] for key in ("q", "k", "attention"))
        k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        products = torch.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5
        products += torch.full_like(products[0], -torch.inf).triu(1)
        close(weights, products.softmax(-1))


@pytest.mark.parametrize("name", ["two", "trunk", "lora", "windows"])
@pytest.mark.parametrize("layer", [0, 1])
def test_pieces_change_nothing_in_depth(name: str, layer: int) -> None:
    pair = {
        "two": random_pair,
        "trunk": shared_trunk,
        "lora": stacked,
        "windows": lambda: random_pair("gemma2", sliding_window=8),
    }[name]()
    requests = some(None, 6, layer=layer)
    own = pair.after.config._attn_implementation
    whole = Engine(pair).capture(requests)
    pieces = Engine(pair, EngineConfig(prefill_tokens=7)).capture(requests)
    assert pair.after.config._attn_implementation == own
    for request, one, other in zip(requests, whole, pieces, strict=True):
        assert one.tensors.keys() == other.tensors.keys() and len(one.tensors) == 16
        for key, x in one.tensors.items():
            torch.testing.assert_close(other.tensors[key], x, rtol=1e-5, atol=1e-5)
        for role in ROLES:
            wanted = eager_weights(getattr(pair, role), request.token_ids, layer)
            close(one.tensors[f"{role}.attention"], wanted)


@pytest.mark.parametrize("kind", sorted(EXPERTS))
def test_experts_are_refused_by_name(kind: str) -> None:
    engine = Engine(random_pair(kind, **CHANGES.get(kind, {})))
    with pytest.raises(RequestError, match=f"layer: must be absent for {kind}: .*experts"):
        engine.capture([CaptureRequest((5,), (), layer=0)])
    assert engine.capture([CaptureRequest((5,), (6,))])[0].tensors["after.norms"].shape == (2, 2, 3)
