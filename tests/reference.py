"""The obvious engine: one row, no cache, no padding. The fast one must draw the same tokens."""

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lda_core import ModelPair, Request
from lda_core.sampling import gumbel_noise


@torch.inference_mode()
def reference(pair: ModelPair, request: Request) -> list[int]:
    """Token ids of one completion, the slow way."""
    drawn: list[int] = []
    while len(drawn) < request.max_new_tokens:
        ids = torch.tensor([[*request.prompt_ids, *drawn]])
        both = []
        for role, model in (("after", pair.after), ("before", pair.before)):
            with steered(role, model, request):
                said = model(input_ids=ids, use_cache=False).logits
            both.append(said[0, -1, : pair.vocab_size].float())
        after, before = both
        banned = sorted(pair.eos_ids) if len(drawn) < request.min_tokens else []
        logits = propose(request, request.alpha, len(drawn), after, before, banned)
        if request.temperature > 0:
            logits = keep_top(logits / request.temperature, request.top_p, request.top_k)
            seed, step = torch.tensor([request.seed]), torch.tensor([len(drawn)])
            logits = logits + gumbel_noise(seed, step, pair.vocab_size)[0]
        drawn.append(int(logits.argmax()))
        if drawn[-1] in pair.eos_ids and not request.ignore_eos:
            break
    return drawn


@contextmanager
def steered(role: str, model: Any, request: Request) -> Any:
    """The direction added at the layer's output, from the prompt's last token on."""
    steer = request.steer
    if steer is None or role not in steer.roles:
        yield
        return
    body = getattr(model.base_model, "decoder", model.base_model)
    layer = (body.layers if hasattr(body, "layers") else body.h)[steer.layer]
    vector = torch.tensor(steer.vector)

    def add(module: Any, inputs: Any, output: Any) -> Any:
        states = (output[0] if isinstance(output, tuple) else output).clone()
        states[:, len(request.prompt_ids) - 1 :] += steer.coefficient * vector / vector.norm()
        return (states, *output[1:]) if isinstance(output, tuple) else states

    handle = layer.register_forward_hook(add, prepend=True)
    yield
    handle.remove()


def propose(
    request: Request,
    alpha: float,
    step: int,
    after: torch.Tensor,
    before: torch.Tensor,
    banned: Sequence[int] = (),
) -> torch.Tensor:
    """[V], [V] -> [V]: amplified where the request wants it, and -inf for implausible tokens and
    banned ones, which none is less plausible than."""
    logits = _propose(request, alpha, step, after, before, banned).clone()
    logits[list(banned)] = -torch.inf
    return logits


def _propose(
    request: Request,
    alpha: float,
    step: int,
    after: torch.Tensor,
    before: torch.Tensor,
    banned: Sequence[int],
) -> torch.Tensor:
    if alpha in (0, -1):
        return before if alpha else after
    p, q = after.softmax(0), before.softmax(0)
    if request.amplify_first and step >= request.amplify_first:
        return after
    if (p * (p / q).log()).sum() < request.amplify_min_kl:
        return after
    logits = after + alpha * (after - before)
    best = max(float(x) for i, x in enumerate(p) if i not in banned)
    logits[p < request.plausible * best] = -torch.inf
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
