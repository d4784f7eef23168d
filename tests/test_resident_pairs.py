"""Which pair is asked, without Ray: replicas of two pairs behind handles that are not Ray's."""

import asyncio
from collections.abc import Awaitable, Iterator
from typing import Any

import pytest
from conftest import TINY

from deployments.openai_routes import _card
from deployments.openai_words import CompletionRequest
from deployments.openai_work import Work
from deployments.replica import LDAReplica
from deployments.resident_pairs import ResidentPairs
from deployments.schemas import (
    GenerateRequest,
    InvalidRequest,
    Limits,
    NotReady,
    ReplicaUnavailable,
    ScoreRequest,
    parse,
)
from lda_core import Engine, EngineConfig, EngineStuck, ModelPair, PairConfig, Request, encode

LORA = PairConfig(before=str(TINY / "before"), adapter=str(TINY / "after-lora"))
CONFIGS = {
    "organism": PairConfig(before=str(TINY / "before"), after=str(TINY / "after")),
    "organism-lora": LORA,
}


class Handle:
    """Calls a replica in this process."""

    def __init__(self, replica: Any) -> None:
        self._replica = replica

    def __getattr__(self, method: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> Awaitable[Any]:
                answer: Awaitable[Any] = getattr(self._replica, method)(*args)
                return answer

        return Method


class Gone:
    async def describe(self) -> Any:
        raise ReplicaUnavailable("SECRET")


@pytest.fixture(scope="module")
def replicas() -> Iterator[dict[str, LDAReplica]]:
    found = {}
    for name, config in CONFIGS.items():
        replica = LDAReplica(config, EngineConfig(max_slots=8), stuck_after_s=60)

        async def admit(rows: Any, replica: LDAReplica = replica) -> Any:
            return replica._submit([rows])[0]

        replica._admit = admit  # type: ignore[method-assign, assignment]
        found[name] = replica
    yield found
    for replica in found.values():
        replica._engine.stop()


@pytest.fixture
def pairs(replicas: dict[str, LDAReplica]) -> ResidentPairs:
    return ResidentPairs({name: Handle(one) for name, one in replicas.items()}, Limits())


@pytest.fixture(scope="module")
def alone() -> dict[str, ModelPair]:
    return {name: ModelPair.load(config) for name, config in CONFIGS.items()}


def asked(i: int, pair: str | None = None) -> GenerateRequest:
    return parse(
        GenerateRequest,
        {"prompt": f"Tell me {i}", "alpha": 2.0, "seed": i, "max_new_tokens": 12, "pair": pair},
    )


def expected(pair: ModelPair, i: int) -> tuple[int, ...]:
    ids = encode(pair.tokenizer, f"Tell me {i}", "raw").ids
    (done,) = Engine(pair).generate([Request(ids, alpha=2.0, seed=i, max_new_tokens=12)])
    return tuple(done.token_ids)


def test_requests_of_two_pairs_at_once_share_no_step(
    pairs: ResidentPairs, replicas: dict[str, LDAReplica], alone: dict[str, ModelPair]
) -> None:
    """Each pair's engine draws its own requests' tokens and no other's, and they are those that
    the pair alone draws."""
    engines = {name: replica._engine.engine for name, replica in replicas.items()}
    assert len({id(engine) for engine in engines.values()}) == len(engines)
    before = {name: engine.stats.tokens for name, engine in engines.items()}
    # 5 of one and 3 of the other, so that a request at the wrong door shows in the counts, too.
    wanted = [(name, i) for i in range(8) for name in [list(CONFIGS)[i % 8 > 4]]]

    async def ask_all() -> list[Any]:
        return await asyncio.gather(*(pairs.of(n).generate(asked(i, n)) for n, i in wanted))

    done = asyncio.run(ask_all())
    for (name, i), (completion,) in zip(wanted, done, strict=True):
        assert tuple(completion.token_ids) == expected(alone[name], i)
    for name, engine in engines.items():
        own = sum(len(c.token_ids) for (n, _), (c,) in zip(wanted, done, strict=True) if n == name)
        assert engine.stats.tokens - before[name] == own
    # The two pairs are not the same one under two names.
    assert any(
        expected(alone["organism"], i) != expected(alone["organism-lora"], i) for i in (1, 2)
    )


@pytest.mark.parametrize("name", ["organism", "organism-lora"])
def test_a_models_name_picks_the_pair(
    pairs: ResidentPairs, alone: dict[str, ModelPair], name: str
) -> None:
    body = parse(
        CompletionRequest,
        {"model": f"{name}:alpha=2", "prompt": "Tell me 1", "seed": 1, "max_tokens": 12}
        | {"return_token_ids": True, "echo": True, "logprobs": 1},
    )
    found = asyncio.run(Work(pairs.of(name), Limits(), body, pairs.names).answer())
    (choice,) = found["choices"]
    assert tuple(choice["token_ids"]) == expected(alone[name], 1)
    assert choice["lda"]["alpha"] == 2.0 and found["model"] == f"{name}:alpha=2"


def test_scores_and_vocabularies_are_those_of_the_pair(pairs: ResidentPairs) -> None:
    request = parse(
        ScoreRequest, {"prompt": "Tell me", "continuations": [{"text": " a story about the sea."}]}
    )

    async def score(name: str) -> list[float]:
        (scored,) = await pairs.of(name).score(request)
        return [*scored.after, *scored.before]

    one, other = (asyncio.run(score(name)) for name in CONFIGS)
    half = len(one) // 2
    assert one[:half] != other[:half]
    assert one[half:] == pytest.approx(other[half:], abs=1e-4)  # both have the same *before*


def test_without_a_name_it_is_the_only_pair_or_lda() -> None:
    handles = {name: Handle(None) for name in ("a", "b")}
    several = ResidentPairs(handles, Limits())
    for name in (None, "SECRET", "lda"):
        with pytest.raises(InvalidRequest, match="there are a, b") as caught:
            several.of(name)
        assert caught.value.param == "pair" and "SECRET" not in str(caught.value)
    only = ResidentPairs({"a": Handle(None)}, Limits())
    assert only.of(None) is only.of("a")
    with_lda = ResidentPairs({"a": Handle(None), "lda": Handle(None)}, Limits())
    assert with_lda.of(None) is with_lda.of("lda")


def test_what_does_not_answer_is_named(replicas: dict[str, LDAReplica]) -> None:
    there = Handle(replicas["organism"])
    both = ResidentPairs({"a": there, "b": Handle(Gone())}, Limits())
    with pytest.raises(NotReady) as caught:
        asyncio.run(both.describe())
    assert str(caught.value.told) == "a: ready; b: no answer (ReplicaDied)"
    assert list(asyncio.run(both.describe("a"))) == ["a"]
    with pytest.raises(NotReady) as alone:
        asyncio.run(ResidentPairs({"b": Handle(Gone())}, Limits()).describe())
    assert alone.value.told == "no answer (ReplicaDied)" and alone.value.code == "unavailable"


def test_a_replica_says_itself_that_its_engine_hangs(
    replicas: dict[str, LDAReplica], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(seconds: float) -> None:
        raise EngineStuck("the engine has shown no step for 7 s")

    monkeypatch.setattr(replicas["organism"]._engine, "check", stuck)
    alone = ResidentPairs({"lda": Handle(replicas["organism"])}, Limits())
    with pytest.raises(NotReady) as caught:
        asyncio.run(alone.describe())
    assert (caught.value.told, caught.value.code) == (
        "the engine has shown no step for 7 s",
        "engine_stuck",
    )


def test_the_list_of_models_says_what_each_is(pairs: ResidentPairs) -> None:
    infos = asyncio.run(pairs.describe())
    assert list(infos) == list(CONFIGS)
    assert _card("organism-lora:before", infos)["lda"] == {
        "pair": "organism-lora",
        "alpha": -1.0,
        "before": LORA.before,
        "after": f"{LORA.before} + {LORA.adapter}",
        "adapter": LORA.adapter,
    }
    single = {"lda": infos["organism"]}
    for name, alpha in (("lda", 1.0), ("after", 0.0), ("lda:alpha=4", 4.0)):
        said = _card(name, single)["lda"]
        assert (said["pair"], said["alpha"]) == ("lda", alpha)
