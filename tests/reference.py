"""The obvious engine: one row, no cache, no padding. The fast one must draw the same tokens."""

import torch

from lda_core import ModelPair, Request
from lda_core.sampling import gumbel_noise


@torch.inference_mode()
def reference(pair: ModelPair, request: Request) -> list[int]:
    """Token ids of one completion, the slow way."""
    drawn: list[int] = []
    while len(drawn) < request.max_new_tokens:
        ids = torch.tensor([[*request.prompt_ids, *drawn]])
        after, before = (
            m(input_ids=ids, use_cache=False).logits[0, -1, : pair.vocab_size].float()
            for m in (pair.after, pair.before)
        )
        logits = propose(request, request.alpha, len(drawn), after, before)
        if request.temperature > 0:
            logits = keep_top(logits / request.temperature, request.top_p, request.top_k)
            seed, step = torch.tensor([request.seed]), torch.tensor([len(drawn)])
            logits = logits + gumbel_noise(seed, step, pair.vocab_size)[0]
        drawn.append(int(logits.argmax()))
        if drawn[-1] in pair.eos_ids and not request.ignore_eos:
            break
    return drawn


def propose(
    request: Request, alpha: float, step: int, after: torch.Tensor, before: torch.Tensor
) -> torch.Tensor:
    """[V], [V] -> [V]: amplified where the request wants it, and -inf for implausible tokens."""
    if alpha in (0, -1):
        return before if alpha else after
    p, q = after.softmax(0), before.softmax(0)
    if request.amplify_first and step >= request.amplify_first:
        return after
    if (p * (p / q).log()).sum() < request.amplify_min_kl:
        return after
    logits = after + alpha * (after - before)
    logits[p < request.plausible * p.max()] = -torch.inf
    return logits


def keep_top(logits: torch.Tensor, top_p: float, top_k: int) -> torch.Tensor:
    """[V] -> [V], -inf outside the support; by a full sort, as the definition says."""
    order = logits.argsort(descending=True)
    if top_k:
        logits = logits.index_fill(0, order[top_k:], -torch.inf)
    if top_p < 1:
        probs = logits.softmax(0)[order]
        logits = logits.index_fill(0, order[probs.cumsum(0) - probs >= top_p], -torch.inf)
    return logits
