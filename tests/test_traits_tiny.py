"""traits.py over a real replica of the tiny pair: shipped sets separate held-out prompts."""

import json

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from replica_service import ReplicaService

from jobs.contrast import read_contrast
from jobs.trait_files import read_traits
from jobs.trait_means import MeanFile
from jobs.traits import item_of, main
from lda_core import PairConfig
from lda_core import encode as lda_encode

SETS = ROOT / "traits" / "contrast"
NAMES = ("hedged", "payload")


@pytest.fixture(scope="module")
def service():
    made = ReplicaService(PairConfig(before=str(TINY / "before"), after=str(TINY / "after")))
    yield made
    made.close()


@pytest.fixture(scope="module")
def run(service, tmp_path_factory):
    folder = tmp_path_factory.mktemp("traits")

    def run(out, asked=service, names=NAMES):
        files = [str(SETS / f"{name}.jsonl") for name in names]
        status = main(["--contrast", *files, "--out", str(folder / out)], asked)
        return status, folder / out

    run.folder = folder
    return run


@pytest.fixture(scope="module")
def whole(run):
    status, out = run("whole")
    assert status == 0
    return out


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def test_shipped_sets_separate_prompts_that_were_held_out(whole):
    summary = summary_of(whole)
    assert summary["failed"] == 0 and summary["traits_made"] == len(NAMES)
    for name in NAMES:
        assert summary[f"{name}/held_out_prompts"] == 25
        at = f"{name}/probe"
        assert summary[f"{at}/separates"] == 1 and summary[f"{at}/p_value"] == 0.01
        for layer in range(3):
            assert summary[f"{at}/layer_{layer}/accuracy"] > 0.8
            assert summary[f"{at}/layer_{layer}/auc"] > 0.9
            assert 0.4 < summary[f"{at}/layer_{layer}/control_accuracy"] < 0.6


def test_states_are_those_that_transformers_computes(whole, tiny_pair):
    """Of the layer's output, over the response's tokens alone."""
    texts = read_contrast(SETS / "hedged.jsonl").texts[:6]
    kept = MeanFile(whole / "means.bin", 3, 128).read(item_of(text).key for text in texts)
    model, tokenizer = tiny_pair.after, tiny_pair.tokenizer
    for text, state in zip(texts, kept, strict=True):
        prompt = lda_encode(tokenizer, text.prompt, "alpaca").ids
        response = tokenizer.encode(text.response, add_special_tokens=False)
        seen = []
        hooks = [
            layer.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out))
            for layer in model.model.layers
        ]
        with torch.no_grad():
            model(torch.tensor([[*prompt, *response]]))
        for hook in hooks:
            hook.remove()
        outputs = torch.stack([o[0] if isinstance(o, tuple) else o for o in seen])  # (L, 1, T, D)
        expected = outputs[:, 0, len(prompt) :].mean(dim=1)
        np.testing.assert_allclose(state, expected.float().numpy(), atol=1e-5)


class Killed(BaseException):
    pass


def test_resumed_equals_uninterrupted(run, service, whole):
    class Dies:
        describe = staticmethod(service.describe)

        def answers(self, items, kind, requests):
            for batch in service.answers(items, kind, requests):
                yield batch
                raise Killed

    with pytest.raises(Killed):
        run("resumed", Dies(), ["hedged"])
    assert 0 < (run.folder / "resumed" / "means.bin").stat().st_size < 200 * 3 * 128 * 4
    status, resumed = run("resumed", names=["hedged"])
    assert status == 0
    for which in ("mean_difference", "probe"):
        one, two = (
            read_traits([folder / "hedged.safetensors"], 3, 128, which)
            for folder in (whole, resumed)
        )
        assert torch.allclose(one["hedged"], two["hedged"], atol=1e-4)
    one, two = (
        {key: value for key, value in summary_of(folder).items() if key.startswith("hedged/")}
        for folder in (whole, resumed)
    )
    assert one.keys() == two.keys()
    assert [key for key in one if abs(one[key] - two[key]) > 1e-3] == []


def test_nothing_is_asked_for_twice(run, service, whole):
    asked = len(service.asked)
    assert run("whole")[0] == 0
    assert len(service.asked) == asked
