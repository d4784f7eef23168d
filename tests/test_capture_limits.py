"""Captures: memory, what is refused, and what is left behind (nothing)."""

from typing import Any

import pytest
import torch
from chaos.oom import PAIRS, Faults
from models import byte_tokenizer, random_model, random_pair
from test_capture import check, close, some, traits
from test_memory import LivePeak

from lda_core import (
    CaptureRequest,
    ContextLengthExceeded,
    Directions,
    DoesNotFit,
    Engine,
    EngineConfig,
    EngineThread,
    ModelPair,
    RequestError,
)
from lda_core.model_runner import ModelRunner


def hooks(pair: ModelPair) -> int:
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks)
        for model in (pair.after, pair.before)
        for m in model.modules()
    )


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("layer", [None, 0])
def test_one_fault_at_any_allocation(name: str, layer: int | None) -> None:
    """Nothing is lost, no hook is left, attention is what it was."""
    pair = PAIRS[name]()
    requests = some(traits(pair), 4, layer=layer, mean=True)
    expected = Engine(pair).capture(requests)
    before, own = hooks(pair), pair.after.config._attn_implementation
    at, raised = 1, 1  # at the first, the third, the ninth, ...
    while raised:
        engine = Engine(pair, EngineConfig(prefill_tokens=64))
        with Faults(lambda n, at=at: n == at) as faults:  # type: ignore[misc]
            done = engine.capture(requests)
        raised = faults.raised
        assert engine.stats.out_of_memory == raised
        assert hooks(pair) == before and pair.after.config._attn_implementation == own
        for a, b in zip(done, expected, strict=True):
            assert a.tensors.keys() == b.tensors.keys()
            for key, x in a.tensors.items():
                close(x, b.tensors[key])
        at *= 3
    assert at > 100


def test_smaller_pieces_after_out_of_memory_and_what_cannot_be_helped_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pair = random_pair()
    monkeypatch.setattr("lda_core.pieces.FIRST_TOKENS", 256)
    engine = Engine(pair, EngineConfig(prefill_tokens=256))
    engine._pace.clock = lambda: 0.0  # no time passes: memory alone is the limit
    original = ModelRunner.read

    def small(self: ModelRunner, ids: torch.Tensor, start: int, *args: Any) -> Any:
        if ids.numel() > 32 or start + ids.shape[1] > 90:
            raise torch.OutOfMemoryError("injected")
        return original(self, ids, start, *args)

    monkeypatch.setattr(ModelRunner, "read", small)
    directions = traits(pair)
    requests = some(directions, 12)
    for request, captured in zip(requests, engine.capture(requests), strict=True):
        check(pair, request, captured)
    assert engine.stats.out_of_memory == 3  # 256, 128, 64
    before = hooks(pair)  # transformers leaves its own after a plain pass
    large = CaptureRequest((5,) * 90, (6,) * 10, directions=directions)
    with pytest.raises(DoesNotFit, match="completion.*90 prompt tokens and 10 of the completion"):
        engine.capture([*requests, large])
    assert engine.idle and hooks(pair) == before
    check(pair, requests[0], engine.capture(requests[:1])[0])


def test_an_error_inside_a_hook_leaves_no_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = random_pair()
    engine = Engine(pair)

    def broken(self: object, i: int, hidden: object) -> None:
        raise RuntimeError("broken")

    with monkeypatch.context() as patched:
        patched.setattr("lda_core.recorder.Recorder._record", broken)
        with pytest.raises(RuntimeError, match="broken"):
            engine.capture(some(None, 2, layer=1))
    assert hooks(pair) == 0 and pair.after.config._attn_implementation == "sdpa"
    assert len(engine.capture(some(None, 2))) == 2  # those that failed have left


def test_only_scores_are_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """26 layers, three points, 16 traits, 31 M parameters: beside reading the same tokens there
    are the scores, a few times over, and never a residual stream."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 26}
    models = [random_model("llama", seed, **sizes, vocab_size=8192, head_dim=64) for seed in (0, 1)]
    assert 28e6 < sum(p.numel() for p in models[0].parameters()) < 34e6
    pair = ModelPair.of(models[0], models[1], byte_tokenizer())
    monkeypatch.setattr("lda_core.pieces.FIRST_TOKENS", 512)
    engine = Engine(pair, EngineConfig(prefill_tokens=512, max_slots=4, kv_tokens=64))
    directions = Directions.of([str(i) for i in range(16)], list(torch.randn(16, 256)), 26, 256)
    requests = [CaptureRequest((5 + i,) * 30, (6,) * 34, directions=directions) for i in range(8)]
    tokens = 8 * 64
    with LivePeak() as reading, torch.inference_mode():
        texts = [request.token_ids for request in requests]
        for _ in engine._pair.read(texts, frozenset(("after", "before")), lambda: 512):
            pass
    with LivePeak() as measured:
        captured = engine.capture(requests)
    scores = 2 * tokens * 26 * 3 * (16 + 1) * 4  # both models', with the norms
    residual = 2 * tokens * 26 * 3 * 256 * 4
    held = sum(x.nbytes for one in captured for x in one.tensors.values())
    assert held == scores
    assert measured.peak - reading.peak < 4 * scores < residual / 3


def test_a_thread_captures_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = random_pair()
    thread = EngineThread(Engine(pair, EngineConfig(prefill_tokens=64)))
    try:
        requests = some(traits(pair), 6)
        rows = [thread.engine.accept_capture(request) for request in requests]
        done = [future.result(timeout=60) for future in thread.submit_captures(rows)]

        def never(self: ModelRunner, *args: Any) -> Any:
            raise torch.OutOfMemoryError("injected")

        monkeypatch.setattr(ModelRunner, "read", never)
        (future,) = thread.submit_captures([thread.engine.accept_capture(requests[0])])
        with pytest.raises(DoesNotFit):
            future.result(timeout=60)
    finally:
        thread.stop(timeout_s=30)
    for request, captured in zip(requests, done, strict=True):
        check(pair, request, captured)


def test_what_is_not_finite_says_so() -> None:
    pair = random_pair()
    with torch.no_grad():
        pair.before.get_input_embeddings().weight[77] = torch.nan
    fine, bad = Engine(pair).capture([CaptureRequest((5, 6), ()), CaptureRequest((5,), (77,))])
    assert fine.error is None and fine.tensors
    assert bad.error == "activations are not finite" and not bad.tensors


@pytest.mark.parametrize(
    ("wants", "words"),
    [
        ({"prompt_ids": ()}, "prompt: .*at least one"),
        ({"prompt_ids": (1.5,)}, "prompt: .*integers"),
        ({"completion_ids": (True,)}, "completion: .*integers"),
        ({"completion_ids": (320,)}, "completion: .*between 0 and 319"),
        ({"roles": ()}, "roles: must be after, before or both"),
        ({"roles": ("after", "after")}, "roles: must be"),
        ({"layer": 2}, "layer: must be between 0 and 1"),
        ({"layer": -1}, "layer: must be between 0 and 1"),
    ],
)
def test_values_out_of_range_name_the_field(wants: dict[str, Any], words: str) -> None:
    engine = Engine(random_pair())
    with pytest.raises(RequestError, match=words):
        engine.capture([CaptureRequest(**{"prompt_ids": (5,), "completion_ids": (), **wants})])
    assert engine.idle


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.zeros(32), "traits.a: must be finite, and not 0"),
        (torch.tensor([[1.0] * 32, [0.0] * 32]), "traits.a: must be finite, and not 0"),
        (torch.full((32,), torch.nan), "traits.a: must be finite"),
        (torch.ones(3, 32), r"traits.a: must have shape \[2, 32\] or \[32\], has \[3, 32\]"),
        (torch.ones(32, dtype=torch.long), "traits.a: must be floating-point"),
    ],
)
def test_bad_directions_are_named(tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        Directions.of(["a"], [tensor], 2, 32)


def test_directions_are_of_length_1_and_of_this_pair() -> None:
    directions = Directions.of(["a", "b"], [torch.ones(2, 32, dtype=torch.bfloat16)] * 2, 2, 32)
    close(directions.vectors.norm(dim=-1), torch.ones(2, 2))
    for names in ([], ["a", "a"], [str(i) for i in range(257)]):
        with pytest.raises(RequestError, match="traits: must"):
            Directions.of(names, [torch.ones(32)] * len(names), 2, 32)
    wide = Directions.of(["a"], [torch.ones(48)], 2, 48)
    engine = Engine(random_pair())
    with pytest.raises(RequestError, match="traits: are of 2 layers of 48; after has 2 of 32"):
        engine.capture([CaptureRequest((5,), (), directions=wide)])
    with pytest.raises(ContextLengthExceeded, match="120 prompt tokens and 9 .* context of 128"):
        engine.capture([CaptureRequest((5,) * 120, (6,) * 9)])
    assert len(engine.capture([CaptureRequest((5,) * 120, (6,) * 8)])) == 1
