"""Random pairs of any size: two Llamas that answer like real ones as far as cost goes.

`after` is `before` plus a small perturbation. What makes the cost real is the shape of the
distributions, not their meaning: logits spread by about 3, so that top_p 0.9 keeps some hundred
tokens of 8,192, and an answer that ends at each step with a chance of about 5 %.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lda_core import ModelPair

LOGIT_STD = 3.0
# Spread of a weight times the root of its inputs. Smaller, and one position's logits are nearly the
# next one's (cosine .93 at transformers' own .02 x sqrt(512)): answers would end at once or never.
GAIN = 1.36
# after - before in shares of each weight's spread: logits differ by .7, so that amplified ones
# spread by 3.0, 3.2 and 3.5 at alpha 0, 1 and 2.
PERTURBATION = 0.02
# One token in so many ends an answer, which makes lengths geometric.
EOS_EVERY = 20


@dataclass(frozen=True)
class Size:
    """A Llama's dimensions; the default has 31.5 million parameters."""

    vocab: int = 8192
    hidden: int = 512
    layers: int = 8
    heads: int = 8
    intermediate: int = 1536
    tied: bool = True
    context: int = 512


def random_model(size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A Llama with weights from seed 0, made on `device`, its head scaled to LOGIT_STD."""
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=size.tied,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=GAIN / size.hidden**0.5,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    scale_head(model)
    return model.eval()


@torch.inference_mode()
def scale_head(model: Any) -> None:
    """Scales the last norm, so that logits have the spread LOGIT_STD.

    The norm, because the head may be the input embedding as well.
    """
    ids = torch.arange(1, 65, device=model.device).unsqueeze(0)
    spread = model(input_ids=ids).logits.float().std()
    model.model.norm.weight.mul_(LOGIT_STD / spread)


def end_answers(model: Any, *, every: int = EOS_EVERY) -> None:
    """Makes one token in `every` an EOS."""
    model.generation_config.eos_token_id = list(range(1, model.config.vocab_size, every))
    model.generation_config.pad_token_id = 0


@torch.no_grad()
def perturbed(model: Any, share: float = PERTURBATION) -> Any:
    """A copy of the model with noise of `share` of each matrix's spread."""
    other = copy.deepcopy(model)
    generator = torch.Generator(model.device).manual_seed(1)
    for weight in other.parameters():
        if weight.dim() >= 2:
            noise = torch.empty_like(weight).normal_(generator=generator)
            weight.add_(noise * (share * float(weight.float().std())))
    return other


def random_pair(
    size: Size | None = None, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> ModelPair:
    before = random_model(size or Size(), device=device, dtype=dtype)
    end_answers(before)
    return ModelPair.of(perturbed(before), before, byte_tokenizer())


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes and an EOS; ids beyond them decode to nothing."""
    alphabet = ["</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
