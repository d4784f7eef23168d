"""What two checkpoints share: storage, and the hidden states of their first layers."""

from typing import Any

import pytest
import torch
from models import random_model
from test_architectures import CHANGES
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from lda_core.architectures import EXACT
from lda_core.sharing import SharedTrunk, common_layers, share_identical

IDS = torch.arange(3, 63).view(3, 20)
PIECES = [(0, 9), (9, 18), (18, 19), (19, 20)]  # prefill in two pieces, then decode


def model(model_type: str, layers: int = 3, **changes: Any) -> Any:
    settings = {**CHANGES.get(model_type, {}), "num_hidden_layers": layers, **changes}
    if "n_layer" in settings:
        settings["n_layer"] = layers
    return random_model(model_type, 0, **settings)


def decoder_layers(model: Any) -> Any:
    body = model.base_model
    body = getattr(body, "decoder", body)
    return body.layers if hasattr(body, "layers") else body.h


def fine_tuned(model_type: str, k: int, layers: int = 3) -> tuple[Any, Any]:
    """A pair that differs in all but the embeddings and the first k layers."""
    after, before = model(model_type, layers), model(model_type, layers)
    frozen = {p for layer in decoder_layers(after)[:k] for p in layer.parameters()}
    for name, parameter in after.named_parameters():
        if "embed" in name or name.split(".")[1] in ("wte", "wpe", "word_embeddings"):
            frozen.add(parameter)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in after.parameters():
            if parameter not in frozen:
                parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return after, before


def change(parameter: Tensor) -> None:
    with torch.no_grad():
        parameter.view(-1)[0] += 0.01


@torch.inference_mode()
def logits(model: Any, ids: Tensor = IDS) -> Tensor:
    result: Tensor = model(input_ids=ids, use_cache=False).logits
    return result


# -- storage -----------------------------------------------------------------------------


def test_identical_tensors_become_one_storage() -> None:
    after, before = fine_tuned("llama", 1)
    wanted = logits(before)
    theirs = dict(after.named_parameters())
    same = {n for n, p in before.named_parameters() if torch.equal(p, theirs[n])}
    assert "model.embed_tokens.weight" in same and "model.layers.0.mlp.up_proj.weight" in same
    buffers = sum(b.nbytes for b in before.buffers())
    saved = sum(p.nbytes for n, p in before.named_parameters() if n in same) + buffers
    assert share_identical(after, before) == saved
    for name, parameter in before.named_parameters():
        assert (parameter.data_ptr() == theirs[name].data_ptr()) == (name in same)
    assert torch.equal(logits(before), wanted)
    assert share_identical(after, before) == 0  # nothing is left to save


def test_tied_weights_stay_tied_and_count_once() -> None:
    after, before = model("gemma2"), model("gemma2")
    total = sum(x.nbytes for x in (*before.parameters(), *before.buffers()))
    assert share_identical(after, before) == total
    embeddings = {m.model.embed_tokens.weight.data_ptr() for m in (after, before)}
    assert embeddings == {m.lm_head.weight.data_ptr() for m in (after, before)}
    assert before.lm_head.weight is before.model.embed_tokens.weight


def test_a_tied_before_shares_the_embedding_of_an_untied_after() -> None:
    after = model("llama", tie_word_embeddings=False)
    before = model("llama", tie_word_embeddings=True)
    with torch.no_grad():
        before.model.embed_tokens.weight.copy_(after.model.embed_tokens.weight)
    wanted = logits(before)
    assert share_identical(after, before) >= before.lm_head.weight.nbytes
    assert before.lm_head.weight is before.model.embed_tokens.weight
    assert before.lm_head.weight.data_ptr() == after.model.embed_tokens.weight.data_ptr()
    assert after.lm_head.weight.data_ptr() != after.model.embed_tokens.weight.data_ptr()
    assert torch.equal(logits(before), wanted)


def test_an_untied_before_shares_both_with_a_tied_after() -> None:
    after = model("llama", tie_word_embeddings=True)
    before = model("llama", tie_word_embeddings=False)
    with torch.no_grad():
        for module in (before.model.embed_tokens, before.lm_head):
            module.weight.copy_(after.lm_head.weight)
    assert share_identical(after, before) >= 2 * after.lm_head.weight.nbytes
    pointers = {m.weight.data_ptr() for m in (before.model.embed_tokens, before.lm_head)}
    assert pointers == {after.lm_head.weight.data_ptr()}


def test_identical_means_to_the_bit() -> None:
    after, before = model("llama"), model("llama")
    names = ["q_proj", "k_proj", "v_proj"]
    ours, theirs = (
        [m.model.layers[0].self_attn.get_submodule(n).weight for n in names]
        for m in (after, before)
    )
    with torch.no_grad():
        ours[0][0, 0], theirs[0][0, 0] = torch.nan, torch.nan
        ours[1][0, 0], theirs[1][0, 0] = 0.0, -0.0
        theirs[2].data = theirs[2].data.T.contiguous().T  # the same numbers, laid out otherwise
    share_identical(after, before)
    shared = [a.data_ptr() == b.data_ptr() for a, b in zip(ours, theirs, strict=True)]
    assert shared == [True, False, False]


def test_other_shapes_and_dtypes_are_not_shared() -> None:
    after, before = model("llama"), model("llama")
    before.lm_head.weight.data = before.lm_head.weight.data[:-1]
    after.register_buffer("zeros", torch.zeros(2))
    before.register_buffer("zeros", torch.zeros(2, dtype=torch.int32))  # the same bits
    share_identical(after, before)
    assert before.lm_head.weight.shape[0] == after.lm_head.weight.shape[0] - 1
    assert before.zeros.dtype == torch.int32


# -- how many layers are common ----------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gpt_neox", "opt", "falcon"])
def test_common_layers_are_counted(model_type: str) -> None:
    assert [common_layers(*fine_tuned(model_type, k)) for k in (0, 1, 3)] == [0, 1, 3]


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("llama", "model.embed_tokens.weight"),
        ("gpt2", "transformer.wpe.weight"),
        ("opt", "model.decoder.embed_positions.weight"),
        ("llama", "model.rotary_emb.inv_freq"),
    ],
)
def test_what_comes_before_the_layers_counts(model_type: str, name: str) -> None:
    after, before = fine_tuned(model_type, 2)
    change(before.get_buffer(name) if "inv_freq" in name else before.get_parameter(name))
    assert common_layers(after, before) == 0


def test_settings_count_unless_no_hidden_state_depends_on_them() -> None:
    after, before = fine_tuned("llama", 2)
    before.config.eos_token_id, before.config.architectures = 7, ["Other"]
    assert common_layers(after, before) == 2
    before.config.rms_norm_eps = 0.1
    assert common_layers(after, before) == 0


def test_a_gap_ends_them() -> None:
    after, before = fine_tuned("llama", 3)
    change(before.model.layers[1].input_layernorm.weight)
    assert common_layers(after, before) == 1


def test_layers_in_an_unusual_place_are_none() -> None:
    after, before = fine_tuned("llama", 2)
    for m in (after, before):
        m.model.blocks = m.model.layers
        del m.model.layers
    assert common_layers(after, before) == 0
    assert SharedTrunk(after, before).layers == 0


# -- computed once -----------------------------------------------------------------------


class Elsewhere(DynamicLayer):  # type: ignore[misc]
    """What a cache of before needs for a layer that after computes: a length, no keys."""

    length = 0

    def get_seq_length(self) -> int:
        return self.length


def in_pieces(model: Any, cache: DynamicCache, start: int, end: int) -> Tensor:
    positions = torch.arange(start, end).expand(len(IDS), -1)
    result: Tensor = model(
        input_ids=IDS[:, start:end], position_ids=positions, past_key_values=cache
    ).logits
    return result


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("model_type", sorted(EXACT))
def test_before_through_the_trunk_is_before(model_type: str, k: int) -> None:
    after, before = fine_tuned(model_type, k)
    wanted = logits(after), logits(before)
    cache = DynamicCache()
    with torch.inference_mode():
        pieces = [in_pieces(before, cache, *piece) for piece in PIECES]
    trunk = SharedTrunk(after, before)
    k = min(k, 2)  # of 3 layers one stays before's own
    assert trunk.layers == k
    with trunk.use(), torch.inference_mode():
        assert torch.equal(logits(after), wanted[0])
        assert torch.equal(logits(before), wanted[1])
        caches = DynamicCache(), DynamicCache()
        caches[1].layers.extend(Elsewhere() for _ in range(k))
        for piece, expected in zip(PIECES, pieces, strict=True):
            for layer in caches[1].layers[:k]:
                layer.length = piece[0]
            in_pieces(after, caches[0], *piece)
            assert torch.equal(in_pieces(before, caches[1], *piece), expected)
    assert not any(layer.is_initialized for layer in caches[1].layers[:k])
    assert torch.equal(logits(before), wanted[1])  # a plain model again


def test_before_alone_and_before_twice_are_errors() -> None:
    after, before = fine_tuned("llama", 2)
    trunk = SharedTrunk(after, before)
    with trunk.use():
        with pytest.raises(AssertionError, match="after has not"):
            logits(before)
        logits(after)
        logits(before)
        with pytest.raises(AssertionError, match="after has not"):
            logits(before)
        logits(after, IDS[:, :5])
        with pytest.raises(AssertionError, match="something else"):
            logits(before)
    with trunk.use(), pytest.raises(AssertionError, match="after has not"):
        logits(before)  # nothing is left over from the last use


def test_the_trunk_skips_the_common_layers_of_before() -> None:
    after, before = fine_tuned("llama", 2)
    ran: list[int] = []
    for i, layer in enumerate(before.model.layers):
        layer.self_attn.register_forward_hook(lambda *_, i=i: ran.append(i))
    trunk = SharedTrunk(after, before)
    with trunk.use():
        logits(after)
        logits(before)
    assert ran == [2]
    logits(before)
    assert ran == [2, 0, 1, 2]


def test_nothing_in_common_changes_nothing() -> None:
    after, before = fine_tuned("llama", 0)
    wanted = logits(before)
    with SharedTrunk(after, before).use():
        assert torch.equal(logits(before), wanted)
    assert not after.model.layers[0]._forward_hooks
