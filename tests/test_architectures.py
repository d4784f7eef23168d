import random
from typing import Any

import pytest
from models import random_model, random_pair
from reference import reference

from lda_core import Engine, EngineConfig, Request, UnsupportedArchitecture
from lda_core.architectures import EXACT, require_exact

# Sizes by their own names, sliding windows small enough to matter, few experts.
GPT2 = {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
WINDOW = {"sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
CHANGES: dict[str, dict[str, Any]] = {
    "cohere2": WINDOW,
    "exaone4": WINDOW,
    "falcon": {"alibi": False, "head_dim": None, "num_key_value_heads": None},
    "gemma2": WINDOW,
    "gemma3_text": WINDOW,
    "glm": {"partial_rotary_factor": 0.5},
    "glm4": {"partial_rotary_factor": 0.5},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_oss": {
        **WINDOW,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "gptj": {**GPT2, "rotary_dim": 4},
    "granitemoe": {"num_local_experts": 4},
    "ministral": WINDOW,
    "mistral": WINDOW,
    "mixtral": WINDOW,
    "olmo3": WINDOW,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "phi3": WINDOW,
    "qwen2": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {**WINDOW, "use_sliding_window": True, "max_window_layers": 1},
    "qwen3_moe": {**EXPERTS, "moe_intermediate_size": 16},
    "starcoder2": WINDOW,
}


def requests(n: int) -> list[Request]:
    rng = random.Random(0)
    return [
        Request(
            tuple(rng.randrange(3, 320) for _ in range(rng.choice((1, 2, 7, 20)))),
            alpha=rng.choice((-1.0, 0.0, 0.5, 3.0)),
            temperature=rng.choice((0.0, 0.7, 1.0)),
            top_p=rng.choice((1.0, 0.9)),
            seed=rng.randrange(2**40),
            max_new_tokens=rng.randrange(1, 20),
            ignore_eos=True,
        )
        for _ in range(n)
    ]


@pytest.mark.parametrize("model_type", sorted(EXACT))
def test_engine_equals_the_reference(model_type: str) -> None:
    pair = random_pair(model_type, **CHANGES.get(model_type, {}))
    tight = EngineConfig(max_slots=5, kv_tokens=200, prefill_tokens=64)
    done = Engine(pair, tight).generate(requests(14))
    assert [c.token_ids for c in done] == [reference(pair, request) for request in requests(14)]


@pytest.mark.parametrize(
    ("model_type", "changes", "reason"),
    [
        ("bloom", {"n_head": 4, "n_layer": 2}, "bloom: .* supported: .*llama"),
        ("falcon", {"alibi": True, "head_dim": None, "num_key_value_heads": None}, "ALiBi"),
        ("mamba", {"state_size": 4}, "mamba"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            "llama with dynamic RoPE",
        ),
    ],
)
def test_the_others_are_refused_by_name(
    model_type: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UnsupportedArchitecture, match=reason):
        require_exact(random_model(model_type, 0, **changes).config)
