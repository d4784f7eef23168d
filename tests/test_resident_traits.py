"""Steering by name: traits that a replica was started with."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from safetensors.torch import save, save_file

from deployments.replica import LDAReplica
from deployments.resident_traits import resident_traits
from deployments.schemas import CaptureRequest, GenerateRequest, InvalidRequest
from lda_core import ConfigError, EngineConfig, ModelPair, PairConfig

PAIR = PairConfig(before=str(TINY / "before"), after=str(TINY / "after"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_pair: ModelPair) -> Path:
    folder = tmp_path_factory.mktemp("traits")
    config = tiny_pair.after.config
    torch.manual_seed(0)
    vectors = torch.randn(config.num_hidden_layers, config.hidden_size)
    save_file({"mean_difference": vectors}, folder / "hedging.safetensors")
    return folder


@pytest.fixture(scope="module")
def replica(folder: Path) -> Any:
    replica = LDAReplica(PAIR, EngineConfig(max_slots=4), 30, str(folder))

    async def admit(rows: Any) -> Any:
        return replica._submit([rows])[0]

    replica._admit = admit  # type: ignore[method-assign, assignment]
    yield replica
    replica._engine.stop()


def ids(replica: Any, **changes: Any) -> list[int]:
    request = GenerateRequest(
        **{"prompt": "Hi", "seed": 1, "max_new_tokens": 12, "ignore_eos": True, **changes}
    )
    found: list[int] = asyncio.run(replica.generate(request))[0].token_ids
    return found


def test_a_name_is_its_vector_at_the_layer(replica: Any) -> None:
    steer = {"layer": 1, "coefficient": 30.0, "models": "after"}
    vector = replica._resident["hedging"][1].tolist()
    named = ids(replica, steer={**steer, "trait": "hedging"})
    assert named == ids(replica, steer={**steer, "vector": vector})
    assert named != ids(replica)
    assert ids(replica, steer={**steer, "trait": "hedging", "coefficient": 0.0}) == ids(replica)
    assert asyncio.run(replica.describe()).traits == ["hedging"]


def test_captures_without_traits_are_along_these(replica: Any) -> None:
    vector = replica._resident["hedging"]
    request = CaptureRequest(prompt="Hi there")
    own = CaptureRequest(prompt="Hi there", traits=save({"hedging": vector}))
    for want in (request, own):
        rows = [replica._engine.engine.accept_capture(w) for w in replica._captures(want)]
        (future,) = replica._engine.submit_captures(rows)
        scores = future.result(timeout=30).tensors["after.scores"]
        assert scores.shape[-1] == 1 and scores.abs().sum() > 0
        if want is request:
            first = scores
    assert torch.allclose(first, scores, atol=1e-5)


@pytest.mark.parametrize(
    ("steer", "message"),
    [
        ({"trait": "hedgin", "layer": 0}, "steer.trait: must be one of hedging"),
        ({"trait": "hedging", "layer": 3}, "steer.layer: must be between 0 and 2"),
        ({"vector": [1.0], "layer": 0}, "steer.vector: has 1 numbers, the models' width is"),
        ({"vector": [1.0], "layer": 9}, "steer.layer: must be between 0 and 2"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(
    replica: Any, steer: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidRequest, match=message):
        ids(replica, steer={**steer, "coefficient": 1.0})


def test_bad_files_keep_the_service_from_starting(tmp_path: Path, tiny_pair: ModelPair) -> None:
    with pytest.raises(ConfigError, match="traits: there is no "):
        resident_traits(tmp_path, tiny_pair)
    bad = tmp_path / "bad.safetensors"
    config = tiny_pair.after.config
    shape = (config.num_hidden_layers, config.hidden_size)
    for tensors, message in (
        ({"other": torch.ones(shape)}, "bad.safetensors: .*mean_difference"),
        ({"mean_difference": torch.ones(2, 3)}, r"mean_difference is \(2, 3\), the pair wants"),
        ({"mean_difference": torch.full(shape, torch.nan)}, "mean_difference is not finite"),
    ):
        save_file(tensors, bad)
        with pytest.raises(ConfigError, match=message):
            resident_traits(tmp_path, tiny_pair)
    bad.write_bytes(b"no tensors")
    with pytest.raises(ConfigError, match="bad.safetensors"):
        resident_traits(tmp_path, tiny_pair)
