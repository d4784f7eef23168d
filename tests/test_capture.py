"""Captures: against plain forward passes of transformers, for every architecture."""

import random
from typing import Any

import pytest
import torch
from chaos.oom import PAIRS, shared_trunk, stacked
from models import byte_tokenizer, random_pair
from test_architectures import CHANGES
from torch import Tensor

from lda_core import (
    Captured,
    CaptureRequest,
    Directions,
    Engine,
    EngineConfig,
    ModelPair,
    Request,
    ScoreRequest,
)
from lda_core.architectures import EXACT
from lda_core.capture_points import CAPTURED, layers_of

ROLES = ("after", "before")
# The other ways in which a config may wire a layer.
WIRED: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt_neox one after the other": ("gpt_neox", {"use_parallel_residual": False}),
    "stablelm parallel": ("stablelm", {"use_parallel_residual": True}),
    "falcon one after the other": ("falcon", {"parallel_attn": False, "multi_query": False}),
    "falcon new": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "opt with norms behind": ("opt", {"do_layer_norm_before": False}),
    "gpt_bigcode with heads of their own": ("gpt_bigcode", {"multi_query": False}),
    **{kind: (kind, {}) for kind in EXACT},
}


def pair_of(name: str) -> ModelPair:
    kind, changes = WIRED[name]
    return random_pair(kind, **{**CHANGES.get(kind, {}), **changes})


def traits(pair: ModelPair, k: int = 3) -> Directions:
    layers, size = len(layers_of(pair.after)), pair.after.config.hidden_size
    generator = torch.Generator().manual_seed(7)
    tensors = [torch.randn(layers, size, generator=generator) * 3 for _ in range(k - 1)]
    tensors.append(torch.randn(size, generator=generator))
    return Directions.of([f"trait {i}" for i in range(k)], tensors, layers, size)


def some(directions: Directions | None, n: int = 5, seed: int = 0, **wants: Any) -> Any:
    rng = random.Random(seed)

    def tokens(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 320) for _ in range(rng.randrange(least, most + 1)))

    return [
        CaptureRequest(tokens(1, 20), tokens(0, 9), directions=directions, **wants)
        for _ in range(n)
    ]


@torch.inference_mode()
def plain(model: Any, ids: tuple[int, ...]) -> tuple[Tensor, ...]:
    """[T, L, D] layer inputs and outputs, by transformers, and what attention gives."""
    last: list[Tensor] = []
    attended: list[Tensor] = []
    layers = layers_of(model)
    hooks = [
        layers[-1].register_forward_hook(
            lambda m, i, out: last.append(out[0] if isinstance(out, tuple) else out)
        )
    ]
    for layer in layers:
        module = next(
            m
            for name in ("self_attn", "attn", "attention", "self_attention")
            if (m := getattr(layer, name, None)) is not None
        )
        hooks.append(module.register_forward_hook(lambda m, i, out: attended.append(out[0])))
    said = model.base_model(
        input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True
    )
    for hook in hooks:
        hook.remove()
    states = [*said.hidden_states[: len(layers)], last[0]]
    return tuple(torch.cat(x).transpose(0, 1) for x in (states[:-1], states[1:], attended))


def close(found: Tensor, wanted: Tensor) -> None:
    """To 1e-5 of the largest: the sums that are rounded are of that size."""
    scale = max(1.0, float(wanted[wanted.isfinite()].abs().max()))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * scale)


def check(pair: ModelPair, request: CaptureRequest, captured: Captured) -> None:
    """Scores and norms of layer inputs and outputs, in float32 from the hidden states on."""
    assert captured.error is None and request.directions is not None
    vectors = request.directions.vectors.transpose(0, 1)  # (L, K, D)
    for role in request.roles:
        inputs, outputs, _ = plain(getattr(pair, role), request.token_ids)
        for point, states in ((0, inputs), (2, outputs)):
            scores = torch.einsum("tld,lkd->tlk", states, vectors)
            close(captured.tensors[f"{role}.scores"][:, :, point], scores)
            close(captured.tensors[f"{role}.norms"][:, :, point], states.norm(dim=-1))


@pytest.fixture(autouse=True)
def whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes are split by tokens alone, not by how busy this machine is: splits round otherwise."""
    monkeypatch.setattr("lda_core.pieces.PIECE_S", 1e9)


def test_the_tables_are_of_all_architectures() -> None:
    assert CAPTURED == EXACT.keys()


@pytest.mark.parametrize("name", WIRED)
def test_layers_equal_hidden_states_of_transformers(name: str) -> None:
    pair = pair_of(name)
    requests = some(traits(pair))
    engine = Engine(pair, EngineConfig(prefill_tokens=48))
    for request, captured in zip(requests, engine.capture(requests), strict=True):
        check(pair, request, captured)
    assert engine.idle
    assert engine.stats.captured_tokens == sum(len(r.token_ids) for r in requests)


@torch.inference_mode()
def by_the_mlp(name: str, layer: Any, x: Tensor, mid: Tensor) -> Tensor:
    """The layer's output out of its input and `mid`, by its own modules."""
    kind, changes = WIRED[name]
    if "norms behind" in name:
        return layer.final_layer_norm(mid + layer.fc2(layer.activation_fn(layer.fc1(mid))))
    if kind == "opt":
        return mid + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(mid))))
    if kind in ("cohere", "cohere2", "phi") or name in ("falcon", "stablelm parallel"):
        return mid + layer.mlp(layer.input_layernorm(x))
    if name == "falcon new":
        return mid + layer.mlp(layer.ln_mlp(x))
    if kind == "gptj":
        return mid + layer.mlp(layer.ln_1(x))
    if name == "gpt_neox":
        return mid + layer.mlp(layer.post_attention_layernorm(x))
    if kind in ("gpt2", "gpt_bigcode"):
        return mid + layer.mlp(layer.ln_2(mid))
    if kind in ("gemma2", "gemma3_text"):
        inner = layer.mlp(layer.pre_feedforward_layernorm(mid))
        return mid + layer.post_feedforward_layernorm(inner)
    if kind in ("exaone4", "olmo2", "olmo3"):
        return mid + layer.post_feedforward_layernorm(layer.mlp(mid))
    normed = layer.post_attention_layernorm(mid)
    if kind == "glm4":
        return mid + layer.post_mlp_layernorm(layer.mlp(normed))
    if kind == "gpt_oss":
        return mid + layer.mlp(normed)[0]
    if kind == "granitemoe":
        return mid + layer.block_sparse_moe(normed) * layer.residual_multiplier
    return mid + layer.mlp(normed) * getattr(layer, "residual_multiplier", 1.0)


@pytest.mark.parametrize("name", WIRED)
def test_mid_and_the_mlps_contribution_are_the_layers_output(name: str) -> None:
    kind, _ = WIRED[name]
    multiplied = {"residual_multiplier": 0.4} if kind.startswith("granite") else {}
    pair = random_pair(kind, **{**CHANGES.get(kind, {}), **WIRED[name][1], **multiplied})
    ids = tuple(range(5, 25))
    (captured,) = Engine(pair).capture([CaptureRequest(ids[:12], ids[12:], raw=True)])
    plainly_added = kind not in ("gemma2", "gemma3_text", "glm4", "exaone4", "olmo2", "olmo3")
    for role in ROLES:
        model = getattr(pair, role)
        residual = captured.tensors[f"{role}.residual"]  # (T, L, 3, D)
        inputs, outputs, attended = plain(model, ids)
        close(residual[:, :, 0], inputs)
        close(residual[:, :, 2], outputs)
        for i, layer in enumerate(layers_of(model)):
            x, mid, out = (residual[None, :, i, point] for point in range(3))
            close(by_the_mlp(name, layer, x, mid), out)
            assert (mid - x).abs().max() > 1e-3 < (out - mid).abs().max()
            if plainly_added and "norms behind" not in name:
                close(mid[0], x[0] + attended[:, i] * multiplied.get("residual_multiplier", 1.0))
        close(captured.tensors[f"{role}.norms"], residual.norm(dim=-1))


@pytest.mark.parametrize("name", ["two", "trunk", "lora"])
def test_padding_batches_and_pieces_change_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lda_core.pieces.FIRST_TOKENS", 4096)
    pair = {"two": random_pair, "trunk": shared_trunk, "lora": stacked}[name]()
    requests = some(traits(pair), 12, mean=True, raw=True)
    alone = [
        Engine(pair, EngineConfig(prefill_tokens=4096)).capture([request])[0]
        for request in requests
    ]
    for request, captured in zip(requests, alone, strict=True):
        check(pair, request, captured)
    for prefill_tokens in (4096, 64, 7):
        engine = Engine(pair, EngineConfig(prefill_tokens=prefill_tokens))
        for captured, expected in zip(engine.capture(requests), alone, strict=True):
            assert captured.tensors.keys() == expected.tensors.keys()
            for key, found in captured.tensors.items():
                wanted = expected.tensors[key]
                scale = float(wanted.abs().max())  # of the sums that are rounded
                torch.testing.assert_close(found, wanted, rtol=0, atol=2e-6 * scale)
                assert found.is_contiguous() and not found.is_inference()
    for request, captured in zip(requests, alone, strict=True):
        start = min(len(request.prompt_ids), len(request.token_ids) - 1)
        for role in ROLES:
            rows = captured.tensors[f"{role}.residual"][start:]
            close(captured.tensors[f"{role}.mean"], rows.mean(dim=0))


def test_row_k_belongs_to_token_k(tiny_pair: ModelPair) -> None:
    """Against a loop that reads one token at a time; the last token is there."""
    request = Request((1, 5, 9), seed=3, max_new_tokens=12, ignore_eos=True)
    engine = Engine(tiny_pair)
    (done,) = engine.generate([request])
    directions = traits(tiny_pair)
    ask = CaptureRequest(request.prompt_ids, tuple(done.token_ids), directions=directions)
    (captured,) = engine.capture([ask])
    for role in ROLES:
        model: Any = getattr(tiny_pair, role)
        scores = captured.tensors[f"{role}.scores"]
        assert scores.shape == (3 + 12, len(layers_of(model)), 3, 3)
        with torch.inference_mode():
            cache = model(input_ids=torch.tensor([request.prompt_ids])).past_key_values
            for k, token in enumerate(done.token_ids):
                said = model(
                    input_ids=torch.tensor([[token]]),
                    past_key_values=cache,
                    output_hidden_states=True,
                )
                states = torch.cat(said.hidden_states[:-1])[:, 0]  # (L, D)
                wanted = torch.einsum("ld,kld->lk", states, directions.vectors)
                close(scores[3 + k, :, 0], wanted)


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("roles", [("after",), ("before",)])
def test_one_model_alone_is_as_with_the_other(name: str, roles: Any) -> None:
    pair = PAIRS[name]()
    engine = Engine(pair)
    directions = traits(pair)
    both = engine.capture(some(directions))
    for request, captured, pairs in zip(
        some(directions), engine.capture(some(directions, roles=roles)), both, strict=True
    ):
        assert captured.tensors.keys() == {f"{roles[0]}.scores", f"{roles[0]}.norms"}
        for key, found in captured.tensors.items():
            close(found, pairs.tensors[key])
        check(pair, request, pairs)


def test_a_model_paired_with_itself() -> None:
    model = random_pair().after
    pair = ModelPair.of(model, model, byte_tokenizer())
    (request,) = some(traits(pair), 1)
    (captured,) = Engine(pair).capture([request])
    check(pair, request, captured)
    assert torch.equal(captured.tensors["after.scores"], captured.tensors["before.scores"])


def test_captures_between_steps_change_no_token(tiny_pair: ModelPair) -> None:
    rows = [Request((1, 5), 1.0, seed=i, max_new_tokens=30, ignore_eos=True) for i in range(9)]
    alone = [c.token_ids for c in Engine(tiny_pair).generate(rows)]
    engine = Engine(tiny_pair, EngineConfig(prefill_tokens=64))
    engine._pace.worked = lambda seconds: None  # type: ignore[method-assign]
    live = [engine.accept(row) for row in rows]
    for row in live:
        engine.enqueue(row)
    requests = some(traits(tiny_pair), 40)
    waiting = [engine.accept_capture(request) for request in requests]
    deep = [engine.accept_capture(request) for request in some(None, 3, layer=1)]
    scored = [engine.accept_score(ScoreRequest((5,), (6, 7))) for _ in range(3)]
    engine.step()
    for one in waiting + deep:
        engine.enqueue_capture(one)
    for each in scored:
        engine.enqueue_score(each)
    between = 0
    while not engine.idle:
        engine.step()
        between += bool(engine.piece_step() and engine.live_rows)
    assert between > 5
    assert [row.completion.token_ids for row in live if row.completion] == alone
    for one in waiting:
        assert one.captured is not None
        check(tiny_pair, one.request, one.captured)
    assert all(row.captured is not None for row in deep)
    assert all(row.scored is not None for row in scored)
