"""One model and its slots: prefill of prompts, one decode step for every row.

Shapes: B rows, P distinct prefixes, T tokens, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from lda_core.architectures import decode_mask
from lda_core.slots import SlotCache


class ModelRunner:
    """Runs one of the pair's two models over slots. Call under torch.inference_mode."""

    def __init__(self, model: PreTrainedModel, kv_tokens: int) -> None:
        self._model: Any = model
        self._config: Any = model.config
        self._device = model.device
        self.slots = SlotCache(probe_cache(model), kv_tokens)

    def prefill(self, prefixes: Sequence[Sequence[int]], targets: Sequence[Sequence[int]]) -> None:
        """Reads P distinct prefixes once and copies each to the slots targets[p].

        Padded on the right and causal, without a mask: no real token can see the padding, and
        what the padding leaves in a slot lies beyond the row's length.
        """
        longest = max(len(prefix) for prefix in prefixes)
        padded = torch.tensor(
            [[*prefix, *[0] * (longest - len(prefix))] for prefix in prefixes],
            device=self._device,
        )  # (P, T)
        # A bare DynamicCache keeps every column; one made from the config would drop real
        # tokens of shorter rows on sliding-window layers.
        cache = DynamicCache()
        # The body alone: nobody needs the prefix's logits.
        self._model.base_model(
            input_ids=padded,
            position_ids=torch.arange(longest, device=self._device).expand_as(padded),
            past_key_values=cache,
            use_cache=True,
        )
        pairs = [(slot, p) for p, slots in enumerate(targets) for slot in slots]
        slot, source = torch.tensor(pairs, device=self._device).unbind(-1)
        self.slots.fill(slot, cache, source)

    def decode_step(self, tokens: Tensor, lengths: Tensor, width: int) -> Tensor:
        """Reads one token per row at column `lengths`: [B], [B] int64 -> logits [B, V].

        `width` is the longest row's length + 1, known to the host without asking the device.
        """
        cursor = self.slots.cursor
        cursor.rows = torch.arange(tokens.shape[0], device=tokens.device)
        cursor.lengths, cursor.width = lengths, width
        output = self._model(
            input_ids=tokens.unsqueeze(-1),
            position_ids=lengths.unsqueeze(-1),
            attention_mask=decode_mask(self._config, lengths, width),
            past_key_values=self.slots,
            use_cache=True,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


@torch.inference_mode()
def probe_cache(model: PreTrainedModel) -> DynamicCache:
    """The cache after reading one token: shape, dtype and device of every layer."""
    cache = DynamicCache()
    model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), past_key_values=cache)
    return cache


def kv_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes that one token takes in the model's key/value cache, all layers together."""
    return sum(
        x.shape[1] * x.shape[3] * x.element_size()
        for layer in probe_cache(model).layers
        for x in (layer.keys, layer.values)
    )
