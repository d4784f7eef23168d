"""A LoRA pair as one stacked pass, against peft's own merged model."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from conftest import TINY
from models import random_model
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_architectures import CHANGES
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from lda_core.adapter import Lane, NotStackable, merge_adapter, stack_adapter
from lda_core.errors import CheckpointError

IDS = torch.arange(3, 31).view(4, 7)
QUIET = "ignore:(fan_in_fan_out is set to False|Setting `save_embedding):UserWarning"


def random_adapter(folder: Path, model_type: str = "llama", **settings: Any) -> Any:
    """Saves an adapter of random_model(model_type, 0) in `folder`; returns peft's model."""
    torch.manual_seed(3)
    options: dict[str, Any] = {
        "r": 4,
        "target_modules": "all-linear",
        "init_lora_weights": False,
        "task_type": "CAUSAL_LM",
        **settings,
    }
    base = random_model(model_type, 0, **CHANGES.get(model_type, {}))
    adapted = get_peft_model(base, LoraConfig(**options)).eval()
    adapted.save_pretrained(folder)
    return adapted


def plain(model_type: str = "llama") -> Any:
    return random_model(model_type, 0, **CHANGES.get(model_type, {}))


@torch.inference_mode()
def logits(model: Any, ids: Tensor, cache: DynamicCache | None = None) -> Tensor:
    """[N, T, V], positions given where a cache says how many tokens it has."""
    start = 0 if cache is None else cache.get_seq_length()
    positions = torch.arange(start, start + ids.shape[1]).expand_as(ids)
    result: Tensor = model(
        input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=cache is not None
    ).logits
    return result


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


SETTINGS: list[tuple[str, dict[str, Any]]] = [
    *(
        (model_type, {})
        for model_type in """llama qwen2 gpt2 gemma2 mistral gpt_neox phi olmo2 falcon gptj cohere
            gpt_bigcode phi3 starcoder2""".split()
    ),
    ("opt", {"target_modules": ["q_proj", "v_proj", "out_proj"]}),
    ("qwen2_moe", {"target_modules": ["q_proj", "o_proj"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    ("llama", {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "lora_alpha": 5}),
    ("llama", {"alpha_pattern": {"layers.1.mlp.up_proj": 32}}),
    ("llama", {"use_rslora": True, "lora_alpha": 3, "lora_dropout": 0.5}),
    ("llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("gpt2", {"target_modules": ["c_attn"], "fan_in_fan_out": True}),
]


@pytest.mark.parametrize(("model_type", "settings"), SETTINGS)
@pytest.mark.filterwarnings(QUIET)
def test_both_lanes_are_the_two_models(
    model_type: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    adapted = random_adapter(tmp_path, model_type, **settings)
    after = merge_adapter(plain(model_type), tmp_path)
    close(logits(after, IDS), logits(adapted, IDS))
    before, model = plain(model_type), plain(model_type)
    lanes = stack_adapter(model, tmp_path)
    caches = [DynamicCache() for _ in range(3)]
    for part in (IDS[:, :5], IDS[:, 5:6], IDS[:, 6:]):  # T > 1, then T == 1 twice
        both = part.repeat_interleave(2, dim=0)
        stacked = logits(model, both, caches[0])
        wanted = logits(after, part, caches[1])
        close(stacked[1::2], wanted)
        base = logits(before, both, caches[2])
        close(stacked[::2], base[::2])
        # Experts gather their tokens from all rows, so that neighbours change the rounding.
        assert "moe" in model_type or torch.equal(stacked[::2], base[::2])
        assert not torch.allclose(wanted, base[::2], atol=0.1)
    close(logits(Lane(model, lanes, "after"), IDS), logits(after, IDS))
    assert torch.equal(logits(Lane(model, lanes, "before"), IDS), logits(before, IDS))


def test_the_shipped_adapter() -> None:
    folder, options = str(TINY / "before"), {"dtype": torch.float32}
    after, before, model = (
        AutoModelForCausalLM.from_pretrained(folder, **options) for _ in range(3)
    )
    adapter = TINY / "after-lora"
    after = peft.PeftModel.from_pretrained(after, str(adapter)).merge_and_unload()
    stack_adapter(model, adapter)
    stacked = logits(model, IDS.repeat_interleave(2, dim=0))
    close(stacked[1::2], logits(after, IDS))
    close(stacked[::2], logits(before, IDS))


def test_the_weights_are_the_same_and_nothing_of_peft_is_left(tmp_path: Path) -> None:
    random_adapter(tmp_path)
    model = plain()
    tensors = {name: p.data_ptr() for name, p in model.named_parameters()}
    modules = {name: id(module) for name, module in model.named_modules()}
    stack_adapter(model, tmp_path)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == tensors
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert not hasattr(model, "peft_config")


def test_a_lane_passes_for_a_plain_model(tmp_path: Path) -> None:
    after = random_adapter(tmp_path).merge_and_unload()
    model = plain()
    lanes = stack_adapter(model, tmp_path)
    lane: Any = Lane(model, lanes, "after")
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    one = IDS[:1]
    assert torch.equal(lane.generate(one, **options), after.generate(one, **options))
    with torch.inference_mode():
        close(lane.base_model(one)[0], after.base_model(one)[0])
        close(lane.forward(one).logits, logits(after, one))
    assert lane.eval() is lane
    assert lane.config is model.config and lane.device == model.device
    assert lane.dtype == torch.float32 and lane.generation_config is model.generation_config
    assert lane.get_output_embeddings() is model.lm_head
    assert len(list(lane.parameters())) == len(list(model.parameters()))
    assert lanes.mode == "both"


def test_the_mode_is_the_old_one_after_an_error(tmp_path: Path) -> None:
    random_adapter(tmp_path)
    model = plain()
    lanes = stack_adapter(model, tmp_path)
    with pytest.raises(IndexError):
        Lane(model, lanes, "after")(input_ids=torch.tensor([[10**6]]))
    assert lanes.mode == "both"


def test_rows_that_are_no_pairs_are_an_error(tmp_path: Path) -> None:
    random_adapter(tmp_path)
    model = plain()
    stack_adapter(model, tmp_path)
    with pytest.raises(AssertionError, match="pairs"):
        logits(model, IDS[:3])


# -- good adapters that cannot run stacked -----------------------------------------------

REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"use_dora": True}, "use_dora is True"),
    ("llama", {"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
    ("gpt2", {"target_modules": ["c_attn"], "bias": "lora_only"}, "bias is 'lora_only'"),
    ("gpt2", {"target_modules": ["c_attn"], "lora_bias": True}, "lora_bias is True"),
    ("llama", {"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    ("llama", {"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    ("llama", {"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
    ("llama", {"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"]}, "embed_tokens, a Embedding"),
    (
        "gemma2",
        {"target_modules": ["lm_head", "q_proj"]},
        "lm_head, which is tied to the embedding",
    ),
    ("opt", {"target_modules": ["q_proj", "fc1"]}, "layers.0.fc1 does not read its rows"),
    ("qwen2_moe", {"target_modules": ["shared_expert.up_proj"]}, "shared_expert.up_proj does not"),
    (
        "mixtral",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
        "target_parameters",
    ),
]


@pytest.mark.parametrize(("model_type", "settings", "reason"), REFUSED)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_not_stackable_says_why_and_leaves_the_model(
    model_type: str, settings: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    random_adapter(tmp_path, model_type, **settings)
    unchanged(plain(model_type), tmp_path, reason)


def test_other_kinds_of_adapter_are_not_stackable(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=[])
    get_peft_model(plain(), config).save_pretrained(tmp_path)
    unchanged(plain(), tmp_path, "IA3, not LoRA")


def unchanged(model: Any, folder: Path, reason: str) -> None:
    wanted = logits(model, IDS)
    modules = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(NotStackable, match=reason):
        stack_adapter(model, folder)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(logits(model, IDS), wanted)


# -- faulty adapters ---------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["missing", "misshapen", "nan", "truncated", "no weights"])
def test_a_faulty_adapter_is_a_checkpoint_error(fault: str, tmp_path: Path) -> None:
    random_adapter(tmp_path, target_modules=["q_proj"])
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    if fault == "missing":
        del tensors[name]
    elif fault == "misshapen":
        tensors[name] = torch.zeros(4, 5)
    elif fault == "nan":
        tensors[name][0, 0] = torch.nan
    save_file(tensors, file)
    if fault == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    elif fault == "no weights":
        file.unlink()
    for use in (stack_adapter, merge_adapter):
        with pytest.raises(CheckpointError, match=f"{tmp_path}: the adapter does not fit"):
            use(plain(), tmp_path)


def test_a_folder_without_a_config_is_a_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=str(tmp_path)):
        stack_adapter(plain(), tmp_path)
