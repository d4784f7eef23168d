"""Tiny random models of many architectures, and a tokenizer to go with them."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from lda_core import ModelPair

VOCAB = 320

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def random_model(model_type: str, seed: int, **changes: Any) -> PreTrainedModel:
    """A float32 model whose weights are large enough that its tokens differ."""
    settings = {**SIZES, **changes}
    config = AutoConfig.for_model(
        model_type, **{k: v for k, v in settings.items() if v is not None}
    )
    torch.manual_seed(seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0.0, 0.25, generator=generator)
    return model.eval()


def byte_tokenizer(texts: tuple[str, ...] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <s>, </s>, <pad>; any text survives a round trip."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, "the cat sat on the mat and the hat"] * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def random_pair(model_type: str = "llama", **changes: Any) -> ModelPair:
    """`before` random, `after` a perturbation of it."""
    before, after = (random_model(model_type, seed=0, **changes) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in after.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return ModelPair.of(after, before, byte_tokenizer())
