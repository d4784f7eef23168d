"""The start-up self-test: does the loaded pair compute what it should?"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lda_core.amplify import amplify
from lda_core.batch import BatchState
from lda_core.config import EngineConfig
from lda_core.draw import Draw, Drawer
from lda_core.engine import Engine
from lda_core.errors import SelfTestFailed
from lda_core.pair import ModelPair
from lda_core.request import Request

_LENGTHS = (3, 11)  # two prompts of different length, so that the slots' masks matter
_NOISE_LENGTHS = (3, 5, 9, 17, 11, 24, 30, 40)
_NEAR = 7.0  # a thousandth: e^-7
# The slots' logits against a plain forward pass, as a share of their spread: rounding only.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


@torch.inference_mode()
def self_test(pair: ModelPair) -> None:
    """Raises SelfTestFailed unless logits are finite, alpha 0 and -1 give the two models to the
    bit, and the engine's log-probabilities are those of plain forward passes.

    Costs a few tokens; run once after loading.
    """
    prompts = [_prompt(length, pair.vocab_size) for length in _LENGTHS]
    # A small budget: on a GPU the default would be most of the memory, and the real engine
    # measures what is free after this.
    engine = Engine(pair, EngineConfig(max_slots=len(_LENGTHS), kv_tokens=64))
    engine._tie = None  # what is looked at is what the slots give
    models = {"after": (pair.after, 0.0), "before": (pair.before, -1.0)}
    for name, (model, alpha) in models.items():
        requests = [
            Request(prompt, alpha, max_new_tokens=3, ignore_eos=True, logprobs=True)
            for prompt in prompts
        ]
        for prompt, completion in zip(prompts, engine.generate(requests), strict=True):
            if completion.logprobs is None or completion.error is not None:
                raise SelfTestFailed(f"{name}: logits are not finite")
            logits = _logits(model, [*prompt, *completion.token_ids], pair.vocab_size)[:-1]
            logits = logits[len(prompt) - 1 :]  # (3, V)
            drawn = torch.tensor(completion.token_ids, device=logits.device).unsqueeze(-1)
            expected = logits.log_softmax(dim=-1).gather(-1, drawn).squeeze(-1)
            seen = torch.tensor(completion.logprobs.amplified, device=logits.device)
            spread = float(logits.max() - logits.min())
            worst = float((expected - seen).abs().max())
            if not worst <= _TOLERANCE[model.dtype] * max(spread, 1.0):
                raise SelfTestFailed(
                    f"{name}: the engine's log-probabilities are off by {worst:.3g}; is "
                    f"{model.config.model_type} really supported?"
                )
    after, before = (_logits(m, [*prompts[1]], pair.vocab_size) for m in (pair.after, pair.before))
    for name, wanted, alpha in (("alpha 0", after, 0.0), ("alpha -1", before, -1.0)):
        alphas = torch.full((len(wanted),), alpha, device=wanted.device)
        if not torch.equal(amplify(after, before, alphas), wanted):
            raise SelfTestFailed(f"{name} is not exactly the model it should be")


@torch.inference_mode()
def noise_floor(
    pair: ModelPair, alphas: Sequence[float] = (0.0, 1.0, 2.0, 5.0)
) -> dict[float, float]:
    """By alpha, the largest change of a mixed logit when the same row decodes in another batch.

    The same rows first alone, then together beside longer ones: other padding, other shapes of the
    matrix products. In float32 it is rounding; in 16 bits it says how sure a seed's draw is. Only
    tokens that alpha 0 gives at least a thousandth of the best one's probability are looked at.
    """
    prompts = [_prompt(length, pair.vocab_size) for length in _NOISE_LENGTHS]
    alone = [_first_logits(pair, [prompt])[0] for prompt in prompts]
    together = _first_logits(pair, prompts)
    worst = dict.fromkeys(alphas, 0.0)
    for (after, before), (after_too, before_too) in zip(alone, together, strict=True):
        near = after > after.amax() - _NEAR
        for alpha in alphas:
            at = torch.tensor(alpha, device=after.device)
            change = amplify(after, before, at) - amplify(after_too, before_too, at)
            worst[alpha] = max(worst[alpha], float(change[near].abs().max()))
    return worst


def _first_logits(
    pair: ModelPair, prompts: Sequence[tuple[int, ...]]
) -> list[tuple[Tensor, Tensor]]:
    """After's and before's logits [V] of each prompt's first new token, from one engine step."""
    engine = Engine(pair, EngineConfig(max_slots=len(prompts), kv_tokens=64 * len(prompts)))
    engine._tie = None
    engine._draw = watching = _Watching(pair.vocab_size)
    engine.generate([Request(prompt, 1.0, max_new_tokens=1) for prompt in prompts])
    return watching.seen


class _Watching(Drawer):
    def __init__(self, vocab: int) -> None:
        super().__init__(vocab)
        self.seen: list[tuple[Tensor, Tensor]] = []

    def __call__(
        self, after: Tensor | None, before: Tensor | None, state: BatchState
    ) -> tuple[Tensor, Draw]:
        assert after is not None and before is not None
        both = (x[:, : self._vocab].float() for x in (after, before))
        self.seen += zip(*both, strict=True)
        return super().__call__(after, before, state)


def _prompt(length: int, vocab: int) -> tuple[int, ...]:
    return tuple((1 + 97 * i) % vocab for i in range(length))


def _logits(model: Any, ids: list[int], vocab: int) -> Tensor:
    """[T, V] float32 of one plain forward pass, without cache."""
    output = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
    logits: Tensor = output.logits[0, :, :vocab].float()
    return logits
