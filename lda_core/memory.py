"""Where the memory of a device goes: weights, activations, prompts kept, keys and values.

One rule, for the engine after loading and for `lda_core.plan` before it:

    keys and values = 0.95 * (total - reserve - weights - activations - prefix pool)

The 5 % are for what the allocator loses in odd sizes and for one layer's columns while they are
copied from place to place (one layer of one model, so 1.6 % of the keys and values of two models
of 32 layers). The engine, which asks the device what is free, passes that as the total, with no
weights and no reserve.

Everything is in bytes. Nothing here reads a weight: models may be on the meta device.
"""

from itertools import chain
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from lda_core.errors import ConfigError

GIB = 1024**3
KV_SHARE = 0.95
# Where the config names no pool: this share of what is free after the weights.
PREFIX_POOL_SHARE = 0.05
# A decode step's peak in float32 arrays of [rows, vocabulary]: the logits of both models as they
# came and in float32, the mixture, what is drawn from, the noise and, at worst, a full sort.
# tests/test_memory.py measures up to 12, and up to 16 where rows are gated and record the densities
# they are drawn from (however many alphas: one after the other); logits in 16 bits are there twice,
# which adds one.
_DECODE_ARRAYS = 17


class Budget(NamedTuple):
    """What one device holds. Bytes, but for kv_tokens."""

    weights: int
    activations: int
    prefix_pool: int
    kv_per_token: int
    kv_tokens: int

    def rows(self, prompt: int, new: int, samples_per_prompt: int = 1) -> int:
        """Most rows of `prompt` + `new` tokens whose keys and values fit (max_slots aside).

        The samples of one prompt hold all of it but its last token once; that one is each row's
        own, as are the new tokens but the last, which is never read.
        """
        once = prompt - 1
        groups, left = divmod(self.kv_tokens, once + samples_per_prompt * new)
        return groups * samples_per_prompt + max(0, (left - once) // new)


def budget(
    total_bytes: int,
    *,
    weights: int,
    activations: int,
    prefix_pool: int,
    kv_per_token: int,
    reserve: int,
) -> Budget:
    """What is left for keys and values (the rule above), in tokens of `kv_per_token` bytes.

    Raises ConfigError, with the numbers, if that is not one token.
    """
    left = total_bytes - reserve - weights
    if left <= 0:
        raise ConfigError(
            f"the weights alone, {gib(weights)}, do not fit in {gib(total_bytes)} of which "
            f"{gib(reserve)} are reserved"
        )
    tokens = int(KV_SHARE * (left - activations - prefix_pool)) // kv_per_token
    if tokens < 1:
        raise ConfigError(
            f"weights {gib(weights)}, activations {gib(activations)}, prefix pool "
            f"{gib(prefix_pool)} and {gib(reserve)} reserved leave nothing of "
            f"{gib(total_bytes)} for keys and values"
        )
    return Budget(weights, activations, prefix_pool, kv_per_token, tokens)


def prefix_pool_bytes(configured: int | None, free: int) -> int:
    """The pool of prompts on a GPU with `free` bytes after the weights; None is 5 % of them."""
    return int(PREFIX_POOL_SHARE * max(0, free)) if configured is None else configured


def model_bytes(model: PreTrainedModel) -> int:
    """Bytes of parameters and buffers; what several names share counts once."""
    return sum(_storages(model).values())


def pair_bytes(after: PreTrainedModel, before: PreTrainedModel) -> int:
    """Bytes of both models; what they share (the base of a stacked adapter) counts once."""
    return sum((_storages(after) | _storages(before)).values())


def _storages(model: PreTrainedModel) -> dict[int, int]:
    """Bytes by storage. By the storage's own address, because on meta all data is at 0."""
    found = (t.untyped_storage() for t in chain(model.parameters(), model.buffers()))
    return {storage._cdata: storage.nbytes() for storage in found}


def activation_bytes(
    config: Any, *, vocab: int, rows: int, prefill_tokens: int, dtype_bytes: int, models: int
) -> int:
    """An upper estimate of what comes and goes: one prefill piece or one decode step, the larger.

    Args:
      config: a transformers config (of a model, which knows its kind of attention).
      vocab: tokens of the output layer.
      rows: most rows of one decode step.
      prefill_tokens: padded tokens of one prefill piece; at worst they are one long prompt.
      dtype_bytes: of the activations.
      models: models on the device that read a piece by turns: 2, or 1 for a stacked pair (whose
        piece holds the rows of both) and for a model with a device of its own. Their keys and
        values of the piece stay until all have read it. A step's logits are always those of both.

    Held by the test to the measured peak of real shapes: never below, at most three times it.
    """
    layer = dtype_bytes * _layer_width(config, dtype_bytes)
    kv = dtype_bytes * kv_numbers_per_token(config)
    # When the last layer is done, what was read is copied to the prefix pool, model by model.
    prefill = prefill_tokens * (models * kv + max(layer, kv) + 16)  # 16: its id and position
    prefill += prefill_tokens**2 * _score_bytes(config, dtype_bytes)
    # One layer's scores, over as many columns as a prefill piece has; both models may be stacked.
    scores = prefill_tokens * _heads(config)[0] * (dtype_bytes + 8)
    decode = rows * (4 * _DECODE_ARRAYS * vocab + 2 * (layer + scores))
    return max(prefill, decode)


def kv_numbers_per_token(config: Any) -> int:
    """Numbers in one token's keys and values, all layers together, by the config alone."""
    heads, kv_heads, head_dim = _heads(config)
    return 2 * int(config.num_hidden_layers) * kv_heads * head_dim


def _layer_width(config: Any, dtype_bytes: int) -> int:
    """Numbers that one token needs at a layer's widest place, beside the keys and values.

    That is the residual and what is read from it, and the largest of: attention with its
    rotations, a normalisation (in float32), the perceptron.
    """
    heads, _, head_dim = _heads(config)
    hidden = int(config.hidden_size)
    attention = 10 * heads * head_dim
    norm = 4 * hidden * 4 // dtype_bytes
    return 5 * hidden + max(attention, norm, _perceptron_width(config, hidden))


def _perceptron_width(config: Any, hidden: int) -> int:
    """Gate, up, activation, product and one more; for experts, of every one a token visits."""
    dense = _first(config, "intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
    dense = dense or 4 * hidden
    chosen = _first(config, "num_experts_per_tok")
    if not chosen:
        return 5 * dense
    expert = _first(config, "moe_intermediate_size") or dense
    shared = _first(config, "shared_expert_intermediate_size") or 0
    return chosen * (5 * expert + 3 * hidden) + 5 * shared


def _score_bytes(config: Any, dtype_bytes: int) -> int:
    """Bytes for each pair of tokens of a prefill: no score matrix with sdpa, at most a mask."""
    if config._attn_implementation != "sdpa":
        return _heads(config)[0] * (dtype_bytes + 8) + dtype_bytes  # softmax is in float32
    return 1 + dtype_bytes if _first(config, "sliding_window") else 0


def _heads(config: Any) -> tuple[int, int, int]:
    """Attention heads, key/value heads, size of a head."""
    heads = int(config.num_attention_heads)
    one = getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    )
    kv_heads = 1 if one else _first(config, "num_key_value_heads") or heads
    return heads, kv_heads, _first(config, "head_dim") or int(config.hidden_size) // heads


def _first(config: Any, *names: str) -> int | None:
    """The first of these settings that the config has; architectures name them differently."""
    values = (getattr(config, name, None) for name in names)
    return next((int(value) for value in values if value is not None), None)


def gib(n: int) -> str:
    return f"{n / GIB:.2f} GiB"
