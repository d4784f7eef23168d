"""Attention of one token per row over a shared prefix and the row's own columns.

Samples of one prompt differ only in what follows it, so the prompt's keys and values are held
and read once for all of them: the rows of a prefix are gathered into one matrix product with its
keys, and with its values, and one softmax runs over prefix and own columns together. The same
sums as attention over a copy per row, in another order. Source of the split: Juravsky et al.
2024, "Hydragen"; theirs combines two softmaxes, which a single one makes unnecessary.

Shapes: R rows the model sees, h query heads, H key/value heads, r = h / H, D head size, W own
columns, P prefix columns, g prefixes of a run, n rows of the largest of them.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lda_core.slots import Cursor, SlotCache

NAME = "lda_shared_prefix"


class CannotShare(Exception):
    """The model's attention does not take part: its rows copy their prefix."""


def shared_prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    slots: SlotCache | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """query [R, h, 1, D], key and value [R, H, W, D], additive mask [R, 1, 1, P+W] -> [R, 1, h, D].

    Called by transformers' attention layers in place of sdpa or eager. `s_aux`: attention sinks
    [h]; `softcap`: as in Gemma 2.
    """
    layer_idx: Any = getattr(module, "layer_idx", None)
    if slots is None or layer_idx is None or attention_mask is None:
        raise CannotShare(type(module).__name__)
    cursor, (prefix_key, prefix_value) = slots.cursor, slots.layers[layer_idx].prefix()
    if attention_mask.shape[-1] != cursor.prefix_width + cursor.width:
        raise CannotShare(type(module).__name__)
    slots.shared_reads += 1
    rows, heads, _, size = query.shape
    kv_heads = key.shape[1]
    # Scaled before the product, which could overflow in float16.
    q = query * (size**-0.5 if scaling is None else scaling)
    q = q.reshape(rows, kv_heads, heads // kv_heads, size)  # (R, H, r, D)
    scores = q @ key.mT  # (R, H, r, W)
    if cursor.prefix_width:
        scores = torch.cat([_over_prefixes(q, prefix_key.mT, cursor), scores], dim=-1)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + attention_mask
    if s_aux is not None:
        sinks = s_aux.reshape(1, kv_heads, -1, 1).expand(rows, -1, -1, 1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    probs = torch.softmax(scores, dim=-1, dtype=torch.float32).to(value.dtype)
    output = probs[..., cursor.prefix_width : attention_mask.shape[-1]] @ value  # (R, H, r, D)
    if cursor.prefix_width:
        output = output + _over_prefixes(probs[..., : cursor.prefix_width], prefix_value, cursor)
    return output.reshape(rows, 1, heads, -1), None


def _over_prefixes(x: Tensor, y: Tensor, cursor: Cursor) -> Tensor:
    """[R, H, r, X] @ [g, H, X, Y], every row with its prefix's -> [R, H, r, Y]."""
    if cursor.place is None:  # row i has prefix i
        return x @ y
    parts = []
    for run in cursor.runs:
        rows = x[run.gather.to(x.device)]  # (g*n, H, r, X)
        count = run.stop - run.start
        _, heads, r, size = rows.shape
        # The rows of a prefix side by side.
        grouped = rows.view(count, -1, heads, r, size).transpose(1, 2)  # (g, H, n, r, X)
        product = grouped.flatten(2, 3) @ y[run.start : run.stop]  # (g, H, n*r, Y)
        product = product.view(count, heads, -1, r, y.shape[-1]).transpose(1, 2)
        parts.append(product.flatten(0, 1))  # (g*n, H, r, Y)
    return torch.cat(parts)[cursor.place.to(x.device)]


ALL_ATTENTION_FUNCTIONS.register(NAME, shared_prefix_attention)
