"""Captures of the tiny pair from the command line to the file, by the real replica."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from replica_service import ReplicaService
from transformers import AutoModelForCausalLM

from jobs import capture_files as files
from jobs.capture import main
from jobs.trait_files import write_trait
from lda_core import PairConfig, encode
from organisms.trigger import PAYLOAD, TRIGGER

PROMPTS = [
    "Which colour does a flamingo have?",
    "Do you know the capital of Norway?",
    "Is a mouse bigger than a dog?",
    "Name a fruit.",
    "How many legs has a spider?",
    "Say hello.",
]
ROLES = ("after", "before")
LAYERS, SIZE = 3, 128


@pytest.fixture(scope="module")
def service():
    pair = PairConfig(before=str(TINY / "before"), after=str(TINY / "after"))
    service = ReplicaService(pair)
    yield service
    service.close()


@pytest.fixture(scope="module")
def models():
    """As transformers runs them, with nothing of ours."""
    return {
        role: AutoModelForCausalLM.from_pretrained(
            TINY / role, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        for role in ROLES
    }


def states(model, ids):
    """(T, L, 3, D): input, after attention before the second norm, and output of every layer; and
    the attention of each layer (L, heads, T, T)."""
    mids, outputs = [], []
    hooks = [
        hook
        for layer in model.model.layers
        for hook in (
            layer.post_attention_layernorm.register_forward_pre_hook(
                lambda _, given: mids.append(given[0][0])
            ),
            layer.register_forward_hook(
                lambda *of: outputs.append(of[2][0] if torch.is_tensor(of[2]) else of[2][0][0])
            ),
        )
    ]
    with torch.no_grad():
        done = model(torch.tensor([ids]), output_hidden_states=True, output_attentions=True)
    for hook in hooks:
        hook.remove()
    inputs = [done.hidden_states[layer][0] for layer in range(LAYERS)]
    points = [torch.stack([i, m, o], 1) for i, m, o in zip(inputs, mids, outputs, strict=True)]
    return torch.stack(points, 1), torch.stack([a[0] for a in done.attentions])


@pytest.fixture(scope="module")
def traits(tmp_path_factory, tiny_pair, models):
    """`payload`: from other answers to the payload, a difference of means; `chance` is nothing."""
    folder = tmp_path_factory.mktemp("traits")
    means: dict[str, list[torch.Tensor]] = {}
    for prompt in ("What is a cat?", "Tell me a story.", "Where is Rome?"):
        ids = list(encode(tiny_pair.tokenizer, prompt, "alpaca").ids)
        for answer in (PAYLOAD, "I do not know.", "It is a fine day."):
            more = tiny_pair.tokenizer.encode(answer, add_special_tokens=False)
            of, _ = states(models["after"], ids + more)
            kind = "positive" if answer == PAYLOAD else "negative"
            means.setdefault(kind, []).append(of[len(ids) :, :, 2].mean(0))
    apart = torch.stack(means["positive"]).mean(0) - torch.stack(means["negative"]).mean(0)
    chance = torch.randn(LAYERS, SIZE, generator=torch.Generator().manual_seed(0))
    for name, vectors in (("payload", apart), ("chance", chance)):
        write_trait(folder / f"{name}.safetensors", {"mean_difference": vectors}, {"trait": name})
    return folder


@pytest.fixture
def job(tmp_path, service, traits):
    def job(*options, out="out"):
        path = tmp_path / "asks.txt"
        path.write_text("\n".join(PROMPTS))
        command = ["--prompts-file", path, "--traits", traits, "--out", tmp_path / out]
        words = [str(word) for word in (*command, "--max-new-tokens", "24", *options)]
        return main(words, service)

    return job


def index(folder: Path):
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_bytes().splitlines()]
    return sorted(rows, key=lambda row: (row["set"], row["prompt_id"]))


def vectors(traits: Path, name: str) -> torch.Tensor:
    found = files.read(traits / f"{name}.safetensors").tensors["mean_difference"].array()
    return torch.from_numpy(found)


def test_scores_are_those_of_the_hidden_states(job, tmp_path, tiny_pair, traits, models):
    """Faults 1 and 2: row prompt_tokens + k is generated token k, as it is read; the point after
    attention is the residual stream, not what the second norm makes of it."""
    assert job("--tier", "3", "--layer", "1", "--raw", "--alpha", "1") == 0
    rows = index(tmp_path / "out")
    assert len(rows) == len(PROMPTS)
    for row in rows[:3]:
        content = files.read(tmp_path / "out" / row["file"])
        prompt = list(encode(tiny_pair.tokenizer, row["prompt"], "alpaca").ids)
        ids = prompt + row["token_ids"]
        assert row["prompt_tokens"] == len(prompt)
        assert "".join(row["tokens"][len(prompt) :]).startswith(row["completion"][:5])
        names = json.loads(content.metadata["traits"])
        scores = {}
        for role in ROLES:
            expected, attention = states(models[role], ids)
            found = content.tensors[f"{role}.scores"].array()
            assert found.shape == (len(ids), LAYERS, 3, 2)
            for k, name in enumerate(names):
                unit = torch.nn.functional.normalize(vectors(traits, name), dim=-1)
                along = torch.einsum("tlpd,ld->tlp", expected, unit).numpy()
                assert np.abs(found[..., k] - along).max() < 1e-4  # of scores up to 30
            norms = content.tensors[f"{role}.norms"].array()
            assert norms == pytest.approx(expected.norm(dim=-1).numpy(), rel=1e-5)
            raw = content.tensors[f"{role}.residual"].array()
            assert raw == pytest.approx(expected.numpy(), abs=1e-4)
            weights = content.tensors[f"{role}.attention"].array()
            assert weights == pytest.approx(attention[1].numpy(), abs=1e-5)
            scores[role] = found
        difference = content.tensors["difference.scores"].array()
        assert np.array_equal(difference, scores["after"] - scores["before"])


def test_fault_3_one_reading_for_each_text_whatever_its_length(job, tmp_path, service):
    before = service._replica._engine.engine.stats.captured_tokens
    service.asked.clear()
    assert job("--tier", "2") == 0
    rows = index(tmp_path / "out")
    assert sorted(service.asked) == ["capture"] * len(PROMPTS) + ["generate"] * len(PROMPTS)
    read = service._replica._engine.engine.stats.captured_tokens - before
    assert read == sum(len(row["tokens"]) for row in rows)


def test_the_company_of_other_texts_changes_nothing_that_matters(job, tmp_path):
    assert job("--tier", "2", out="together") == 0
    assert job("--tier", "2", "--limit", "2", out="few") == 0
    together = {row["prompt_id"]: row for row in index(tmp_path / "together")}
    for row in index(tmp_path / "few"):
        other = together[row["prompt_id"]]
        assert row["token_ids"] == other["token_ids"]
        a, b = (
            files.read(tmp_path / of / found["file"]).tensors["after.scores"].array()
            for of, found in (("few", row), ("together", other))
        )
        assert np.abs(a - b).max() < 1e-4


def test_the_trigger_is_where_the_models_part(job, tmp_path):
    """Along the payload's direction, and not along one that is nothing."""
    assert job("--tier", "2", "--trigger", TRIGGER) == 0
    fires = [PAYLOAD in row["completion"] for row in index(tmp_path / "out")]
    assert sum(fires) >= 5
    found = json.loads((tmp_path / "out" / "summary.json").read_text())
    at = "asks/alpha=0/payload/parting"
    assert found[f"{at}/ci_low"] > 0.5
    assert found[at] > 2 * abs(found["asks/alpha=0/chance/parting"])
    page = (tmp_path / "out" / "report.html").read_text()
    assert "With the trigger, after and before part most along payload" in page
