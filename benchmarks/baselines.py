"""What people run today, written plainly, to compare the engine with.

Each takes a pair and requests and returns the drawn tokens of every row; `useful` says which of
them count. Those that draw with our sampler draw the engine's own tokens, and that is asserted
wherever they are timed. It also makes them faster than with torch's.

Shapes: B rows, T tokens, V common vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, LogitsProcessorList

from lda_core import ModelPair, Request, Sampling, amplify, sample

Rows = list[list[int]]


def useful(pair: ModelPair, request: Request, tokens: Sequence[int]) -> list[int]:
    """What the request asked for: up to its length, and up to and including the first EOS."""
    asked = list(tokens[: request.max_new_tokens])
    if request.ignore_eos:
        return asked
    end = next((i for i, token in enumerate(asked) if token in pair.eos_ids), len(asked))
    return asked[: end + 1]


def one_by_one(pair: ModelPair, requests: Sequence[Request]) -> Rows:
    """A loop over prompts, each decoded by both models until its EOS."""
    return [decode(pair, [request], stop=True)[0] for request in requests]


def batched(pair: ModelPair, requests: Sequence[Request], batch: int = 8) -> Rows:
    """Left-padded batches in the order given; every row runs to the longest max_new_tokens."""
    chunks = (requests[i : i + batch] for i in range(0, len(requests), batch))
    return [row for chunk in chunks for row in decode(pair, chunk)]


@torch.inference_mode()
def decode(pair: ModelPair, requests: Sequence[Request], stop: bool = False) -> Rows:
    """One batch through both models in lockstep; `stop` ends it at the first EOS of row 0."""
    new, mask = left_padded(requests, pair.device)  # (B, T)
    after, before = (GrowingModel(m, pair.vocab_size) for m in (pair.after, pair.before))
    sampler = Sampler(requests, pair.device)
    drawn: list[Tensor] = []
    for step in range(max(r.max_new_tokens for r in requests)):
        tokens = sampler.draw(after.read(new, mask), before.read(new, mask), step)  # (B,)
        drawn.append(tokens)
        if stop and int(tokens[0]) in pair.eos_ids and not requests[0].ignore_eos:
            break
        new, mask = tokens.unsqueeze(-1), grown(mask)
    rows: Rows = torch.stack(drawn, dim=-1).tolist()
    return rows


def mixed_generate(pair: ModelPair, requests: Sequence[Request], batch: int = 32) -> Rows:
    """transformers' `generate` on *after*, with *before* inside a logits processor.

    Draws with torch's own sampling, so its tokens are not the engine's. Alpha is per row; the
    rest is as in the first request.
    """
    rows: Rows = []
    for i in range(0, len(requests), batch):
        chunk = requests[i : i + batch]
        _, mask = left_padded(chunk, pair.device)
        rows += generate(pair.after, chunk, [Amplifier(pair, chunk, mask)], pair.eos_ids)
    return rows


@torch.inference_mode()
def generate(
    model: Any,
    requests: Sequence[Request],
    processors: Sequence[LogitsProcessor] = (),
    eos_ids: frozenset[int] = frozenset(),
) -> Rows:
    """transformers' `generate` on one left-padded batch; without `eos_ids` of fixed length."""
    ids, mask = left_padded(requests, model.device)
    first = requests[0]
    config = GenerationConfig(
        max_new_tokens=max(r.max_new_tokens for r in requests),
        do_sample=first.temperature > 0,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=0,
        # Only said where they are used: generate warns of sampling settings for greedy.
        **(
            {"temperature": first.temperature, "top_p": first.top_p, "top_k": first.top_k}
            if first.temperature > 0
            else {}
        ),
    )
    with no_defaults(model):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=LogitsProcessorList(processors),
        )
    rows: Rows = output[:, ids.shape[1] :].tolist()
    return rows


@contextmanager
def no_defaults(model: Any) -> Iterator[None]:
    """`generate` fills what a config leaves at None, such as no EOS, from the model's own."""
    own, model.generation_config = model.generation_config, GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own


class Amplifier(LogitsProcessor):  # type: ignore[misc]
    """Mixes the logits of *before*, which it runs over the same left-padded batch."""

    def __init__(self, pair: ModelPair, requests: Sequence[Request], mask: Tensor) -> None:
        self._before = GrowingModel(pair.before, pair.vocab_size)
        self._alpha = torch.tensor([r.alpha for r in requests], device=pair.device)
        self._mask, self._read = mask, 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, T], [B, V+] of *after* -> [B, V+]."""
        while self._mask.shape[1] < input_ids.shape[1]:
            self._mask = grown(self._mask)
        before = self._before.read(input_ids[:, self._read :], self._mask)
        self._read = input_ids.shape[1]
        mixed = torch.full_like(scores, -torch.inf)
        mixed[:, : before.shape[1]] = amplify(scores[:, : before.shape[1]], before, self._alpha)
        return mixed


class GrowingModel:
    """A model with transformers' own cache, which grows by a copy of itself at every token."""

    def __init__(self, model: Any, vocab: int) -> None:
        self._model, self._vocab, self._cache = model, vocab, DynamicCache()

    def read(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Reads [B, T], the last T columns of `mask`, and returns [B, V] float32 logits."""
        position_ids = (mask.cumsum(dim=-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1, : self._vocab].float()
        return logits


class Sampler:
    """Mixes and draws for a batch of requests, as the engine does."""

    def __init__(self, requests: Sequence[Request], device: torch.device) -> None:
        def floats(name: str) -> Tensor:
            return torch.tensor([float(getattr(r, name)) for r in requests], device=device)

        def ints(name: str) -> Tensor:
            return torch.tensor([int(getattr(r, name)) for r in requests], device=device)

        self._alpha = floats("alpha")
        self._sampling = Sampling(
            floats("temperature"), floats("top_p"), ints("top_k"), ints("seed")
        )

    def draw(self, after: Tensor, before: Tensor, step: int) -> Tensor:
        """[B, V], [B, V] -> [B]."""
        mixed = amplify(after, before, self._alpha)
        return sample(mixed, self._sampling, torch.full_like(self._sampling.seed, step))


def left_padded(requests: Sequence[Request], device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts as ids [B, T] and their mask [B, T], 0 where padded."""
    longest = max(len(r.prompt_ids) for r in requests)
    padding = [longest - len(r.prompt_ids) for r in requests]
    ids = [[0] * n + list(r.prompt_ids) for n, r in zip(padding, requests, strict=True)]
    mask = [[0] * n + [1] * (longest - n) for n in padding]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def grown(mask: Tensor) -> Tensor:
    """[B, T] -> [B, T + 1]: one more token for every row."""
    return torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
