"""The output layer's product in float32 for models in 16 bits.

Logits between 16 and 32 are 0.125 apart in bfloat16, and alpha multiplies that. Rounding them
later cannot bring back what the product's own rounding lost, so its accumulator's float32 is kept.

Shapes: N rows, D hidden size, V vocabulary.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def float32_head(model: PreTrainedModel) -> bool:
    """Makes a 16-bit model give float32 logits, in place; False if its device cannot."""
    head: Any = model.get_output_embeddings()
    if head.weight.dtype == torch.float32:
        return True
    try:
        project(head, head.weight[:1])
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError):
        return False
    head.forward = partial(project, head)
    return True


@torch.no_grad()
def project(head: nn.Linear, hidden: Tensor) -> Tensor:
    """[..., D] of 16 bits -> [..., V] float32."""
    flat = hidden.to(head.weight.device).flatten(0, -2)  # (N, D)
    if flat.is_cuda:
        logits = torch.mm(flat, head.weight.T, out_dtype=torch.float32)
    else:  # a CPU has no such product, and float32 is its dtype anyway
        logits = flat.float() @ head.weight.float().T
    if head.bias is not None:
        logits += head.bias
    return logits.view(*hidden.shape[:-1], -1)
