"""Budgets add up, and the estimate of activations holds against measured peaks."""

import contextlib
import json
import weakref
from typing import Any

import pytest
import torch
from models import random_model, random_pair
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicCache

from lda_core import ConfigError, Engine, EngineConfig, Request
from lda_core.memory import (
    GIB,
    Budget,
    activation_bytes,
    budget,
    kv_numbers_per_token,
    model_bytes,
    pair_bytes,
    prefix_pool_bytes,
)
from lda_core.meta_models import SHAPES, on_meta
from lda_core.model_runner import kv_bytes_per_token

MIB = 1024**2
# What tests/models.py gives every architecture and these do not have.
WITHOUT = dict.fromkeys(("head_dim", "num_key_value_heads", "intermediate_size"))
GPT2 = {**WITHOUT, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 128}
FALCON = {**WITHOUT, "alibi": False}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


class LivePeak(TorchDispatchMode):
    """Most bytes that storages made inside hold at one time; meta tensors count too."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._ours: set[int] = set()

    def _gone(self, storage: int, nbytes: int) -> None:
        self._ours.discard(storage)
        self.live -= nbytes

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if is_tensor(x)}
        for storage in (x.untyped_storage() for x in tree_leaves(output) if is_tensor(x)):
            if storage._cdata not in self._ours | given:
                self._ours.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return output


def is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)


@torch.inference_mode()
def prefill_peak(model: Any, prompts: int, tokens: int) -> int:
    ids = torch.ones(prompts, tokens, dtype=torch.long, device=model.device)
    cache = DynamicCache()
    with LivePeak() as measured:
        model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
        # The engine's copy for its prefix pool.
        _ = [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]
    return measured.peak


def prefill_estimate(model: PreTrainedModel, tokens: int) -> int:
    return activation_bytes(
        model.config,
        vocab=1,
        rows=1,
        prefill_tokens=tokens,
        dtype_bytes=model.dtype.itemsize,
        models=1,
    )


# -- activations -------------------------------------------------------------------------


def test_the_measure_counts_what_lives_together() -> None:
    with LivePeak() as measured:
        a = torch.zeros(MIB)
        b = a + 1
        del a
        c = b.view(2, -1).add_(1)  # a view and an in-place change are no new memory
        del b, c
        torch.zeros(MIB)
    assert measured.peak == 2 * 4 * MIB and measured.live == 0


@pytest.mark.parametrize("shape", [(1, 2048), (16, 128)])
@pytest.mark.parametrize("name", sorted(path.name for path in SHAPES.glob("*.json")))
def test_prefill_of_real_shapes(name: str, shape: tuple[int, int]) -> None:
    config = AutoConfig.for_model(**json.loads((SHAPES / name).read_text()))
    model = on_meta(config, torch.bfloat16)
    peak = prefill_peak(model, *shape)
    estimate = prefill_estimate(model, 2048)
    assert peak > 2048 * kv_bytes_per_token(model)  # its keys and values and something more
    assert peak <= estimate <= 1.5 * peak


@pytest.mark.parametrize("tokens", [30, 120])
@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("olmo2", {}),
        ("gemma2", {"sliding_window": 8}),  # eager: the scores of all pairs
        ("mistral", {"sliding_window": 8}),  # sdpa with a mask
        ("gpt2", GPT2),
        ("mixtral", EXPERTS),
    ],
)
def test_prefill_of_tiny_models(model_type: str, changes: dict[str, Any], tokens: int) -> None:
    model = random_model(model_type, 0, **changes)
    peak = prefill_peak(model, 1, tokens)
    assert peak <= prefill_estimate(model, tokens) <= 2.5 * peak


def test_a_stacked_pair_reads_a_piece_in_rows_of_both() -> None:
    model = random_model("llama", 0)
    both = prefill_peak(model, 2, 50)  # before and after in turn
    assert both <= prefill_estimate(model, 100) <= 2.5 * both


@pytest.mark.parametrize("top_p", [1.0, 0.95])
@pytest.mark.parametrize("changes", [{}, {"attn_implementation": "eager"}])
def test_decode_steps(changes: dict[str, Any], top_p: float) -> None:
    rows, vocab = 16, 8192
    pair = random_pair("llama", vocab_size=vocab, **changes)
    # Prompts of one token have nothing to prefill: all that is measured are steps.
    config = EngineConfig(max_slots=rows, kv_tokens=rows * 8, prefill_tokens=16)
    engine = Engine(pair, config)
    request = Request((5,), alpha=2.0, top_p=top_p, max_new_tokens=4, ignore_eos=True)
    with LivePeak() as measured:
        engine.generate(request.samples(rows))
    estimate = activation_bytes(
        pair.after.config, vocab=vocab, rows=rows, prefill_tokens=16, dtype_bytes=4, models=1
    )
    assert measured.peak > 4 * rows * vocab * 4  # three distributions and what is drawn from
    assert measured.peak <= estimate <= 3 * measured.peak


# Much of a layer, or many keys and values: the two things that a prefill's peak is made of.
WIDE = {"intermediate_size": 256}
DEEP = {"num_hidden_layers": 8, "num_key_value_heads": 4, "head_dim": 16}


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("prompts", [1, 10])
@pytest.mark.parametrize("changes", [WIDE, DEEP])
def test_the_engine_reads_prompts_within_the_estimate(
    changes: dict[str, Any], prompts: int, pooled: bool
) -> None:
    tokens, rows = 100, 10
    pair = random_pair("llama", **changes)
    per_token = kv_bytes_per_token(pair.after) + kv_bytes_per_token(pair.before)
    pool = tokens * per_token if pooled else 0
    config = EngineConfig(
        max_slots=rows, kv_tokens=1100, prefill_tokens=tokens, prefix_pool_bytes=pool
    )
    engine = Engine(pair, config)

    def requests(first: int) -> list[Request]:
        ids = range(first, first + prompts)
        whole = [Request((i,) * (tokens // prompts) + (5,), max_new_tokens=1) for i in ids]
        return [row for request in whole for row in request.samples(rows // prompts)]

    with LivePeak() as measured:
        engine.generate(requests(10))
        engine.generate(requests(30))  # now the pool, if there is one, is full already
    peak = measured.peak - pool  # which has a budget of its own
    estimate = activation_bytes(
        pair.after.config, vocab=320, rows=rows, prefill_tokens=tokens, dtype_bytes=4, models=2
    )
    assert peak > tokens * per_token  # both models' keys and values at once
    assert peak <= estimate <= 3 * peak


# -- weights, keys and values ------------------------------------------------------------


def test_model_bytes_counts_shared_tensors_once() -> None:
    tied, untied = (random_model("llama", 0, tie_word_embeddings=tie) for tie in (True, False))
    assert model_bytes(untied) - model_bytes(tied) == 320 * 32 * 4
    buffers = sum(x.numel() * x.element_size() for x in tied.buffers())
    assert buffers > 0
    assert model_bytes(tied) == buffers + 4 * sum(p.numel() for p in tied.parameters())


def test_pair_bytes_counts_what_the_two_share_once() -> None:
    after, before = (random_model("llama", seed) for seed in (0, 1))
    assert pair_bytes(after, before) == 2 * model_bytes(before)
    assert pair_bytes(before, before) == model_bytes(before)
    after.model.embed_tokens.weight = before.model.embed_tokens.weight
    assert pair_bytes(after, before) == 2 * model_bytes(before) - 320 * 32 * 4


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("llama", {}),
        ("gemma2", {"head_dim": 16}),
        ("falcon", FALCON),  # one key/value head for all
        ("falcon", {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),  # repeated
        ("gpt2", GPT2),
        ("gpt_bigcode", GPT2),
        ("mixtral", EXPERTS),
        ("gpt_oss", EXPERTS),
    ],
)
def test_meta_models_and_configs_know_the_sizes(model_type: str, changes: dict[str, Any]) -> None:
    real = random_model(model_type, 0, **changes)
    kv = kv_bytes_per_token(real)
    assert 4 * kv_numbers_per_token(real.config) == kv
    with torch.device("meta"):
        meta = AutoModelForCausalLM.from_config(real.config, dtype=torch.float32)
    assert model_bytes(meta) == model_bytes(real)
    with contextlib.suppress(RuntimeError):  # some cannot run on meta: then the config is asked
        assert kv_bytes_per_token(meta) == kv


# -- budgets -----------------------------------------------------------------------------


def test_the_rule() -> None:
    made = budget(1000, weights=300, activations=100, prefix_pool=50, kv_per_token=10, reserve=150)
    assert made == Budget(300, 100, 50, 10, 38)  # 0.95 * 400 / 10


@pytest.mark.parametrize(
    ("total", "words"),
    [
        (26 * GIB, r"the weights alone, 25.00 GiB, do not fit in 26.00 GiB of which 1.50 GiB"),
        (27 * GIB, r"activations 1.00 GiB, prefix pool 0.50 GiB and 1.50 GiB reserved leave noth"),
        (28 * GIB - 1, "leave nothing of 28.00 GiB"),
    ],
)
def test_no_room_is_an_error_with_numbers(total: int, words: str) -> None:
    sizes = {"weights": 25 * GIB, "activations": GIB, "prefix_pool": GIB // 2}
    with pytest.raises(ConfigError, match=words):
        budget(total, **sizes, kv_per_token=1024, reserve=3 * GIB // 2)
    one = budget(28 * GIB + 1100, **sizes, kv_per_token=1024, reserve=3 * GIB // 2)
    assert one.kv_tokens == 1


def needed(rows: int, prompt: int, new: int, samples: int) -> int:
    """Columns of `rows` rows: of each prompt all but its last token once, then each row's own."""
    prompts = -(-rows // samples)
    return prompts * (prompt - 1) + rows * new


@pytest.mark.parametrize("samples", [1, 3, 64])
@pytest.mark.parametrize(("prompt", "new"), [(1, 1), (1, 9), (20, 1), (20, 9), (512, 64)])
def test_rows_are_the_most_that_fit(prompt: int, new: int, samples: int) -> None:
    for kv_tokens in (1, 9, 28, 29, 575, 576, 1000, 4607, 18_637):
        rows = Budget(0, 0, 0, 1, kv_tokens).rows(prompt, new, samples)
        assert needed(rows, prompt, new, samples) <= kv_tokens
        assert needed(rows + 1, prompt, new, samples) > kv_tokens


def test_a_row_alone_takes_what_its_request_says() -> None:
    request = Request(tuple(range(20)), max_new_tokens=9)
    for rows in (1, 2, 7):
        assert Budget(0, 0, 0, 1, rows * request.columns).rows(20, 9) == rows
        assert Budget(0, 0, 0, 1, rows * request.columns - 1).rows(20, 9) == rows - 1


def test_the_prefix_pool_is_a_twentieth_unless_it_is_said() -> None:
    assert prefix_pool_bytes(None, 1000) == 50
    assert prefix_pool_bytes(None, -5) == 0
    assert prefix_pool_bytes(0, 1000) == 0
    assert prefix_pool_bytes(77, 1000) == 77
