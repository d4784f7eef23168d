"""Which pair is asked, without Ray: replicas of two pairs behind handles that are not Ray's."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from conftest import TINY
from fakes import PAIR
from ray import serve
from ray.exceptions import ActorDiedError
from ray.serve.schema import DeploymentStatus, DeploymentStatusOverview, ReplicaState

from deployments import ingress, readiness, resident_pairs
from deployments.edge import Edge
from deployments.edge_options import EdgeOptions
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
    Overdue,
    ReplicaUnavailable,
    ScoreRequest,
    parse,
)
from lda_core import Engine, EngineConfig, EngineStuck, ModelPair, PairConfig, Request, encode
from lda_core.model_runner import ModelRunner

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


class Silent:
    """Says what it is so many times, then nothing."""

    def __init__(self, times: int) -> None:
        self.times = times

    async def describe(self) -> Any:
        self.times -= 1
        if self.times < 0:
            await asyncio.Event().wait()
        return PAIR


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


class Streamed:
    """What `handle.options(stream=True)` answers, of a replica in this process."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __anext__(self) -> Awaitable[Any]:
        item: Awaitable[Any] = self._items.__anext__()
        return item

    def cancel(self) -> None:
        pass


class StreamingHandle(Handle):
    def options(self, stream: bool) -> Any:
        def remote(*args: Any) -> Streamed:
            return Streamed(self._replica.stream(*args))

        return SimpleNamespace(stream=SimpleNamespace(remote=remote))


@pytest.mark.parametrize(("kind", "status"), [("overdue", 503), ("does_not_fit", 400)])
def test_a_stream_that_is_refused_whole_has_a_status_of_its_own(
    replicas: dict[str, LDAReplica], monkeypatch: pytest.MonkeyPatch, kind: str, status: int
) -> None:
    replica = replicas["organism"]
    step = replica._engine.engine.step

    def late() -> Any:
        time.sleep(0.3)
        return step()

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("injected")

    if kind == "overdue":
        monkeypatch.setattr(replica._engine.engine, "step", late)
    else:
        monkeypatch.setattr(ModelRunner, "decode_step", full)
    plain = ingress.Ingress.__mro__[1]  # without what Serve adds
    one = plain.__new__(plain)
    one._limits = Limits(max_request_s=0.2 if kind == "overdue" else 60.0)
    one.results, one.edge = None, Edge(EdgeOptions(), "127.0.0.1")
    one._pairs = ResidentPairs({"lda": StreamingHandle(replica)}, one._limits)
    context = SimpleNamespace(servable_object=one)
    monkeypatch.setattr(serve, "get_replica_context", lambda: context)
    asyncio.run(one._pairs.of("lda").vocabulary())

    async def ask(path: str, body: dict[str, Any]) -> httpx.Response:
        transport = httpx.ASGITransport(ingress.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            return await client.post(path, json={"prompt": "Hi", "n": 2, "seed": 1, **body})

    for path, body in (
        ("/stream", {"max_new_tokens": 5}),
        ("/v1/completions", {"model": "lda", "max_tokens": 5, "stream": True}),
    ):
        answer = asyncio.run(ask(path, body))
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["code"] == kind
        assert ("retry-after" in answer.headers) == (status == 503)


def serve_says(
    monkeypatch: pytest.MonkeyPatch, states: dict[str, int], silent: bool = False
) -> None:
    """What Serve knows of `LDAReplica` of `lda`, without Serve."""
    overview = DeploymentStatusOverview(
        status=DeploymentStatus.HEALTHY if "RUNNING" in states else DeploymentStatus.UPDATING,
        status_trigger="UNSPECIFIED",
        replica_states={ReplicaState(name): n for name, n in states.items()},
        message="",
    )
    application = SimpleNamespace(deployments={"LDAReplica": overview})

    def status() -> Any:
        if silent:
            raise ActorDiedError
        return SimpleNamespace(applications={"lda": application})

    monkeypatch.setattr(Handle, "app_name", "lda", raising=False)
    monkeypatch.setattr(Handle, "deployment_name", "LDAReplica", raising=False)
    monkeypatch.setattr(readiness.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(readiness.serve, "status", status)


def test_replicas_that_run_and_have_no_time_are_ready_once_they_have_said_what_they_are(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    serve_says(monkeypatch, {"RUNNING": 2})
    pair = ResidentPairs({"lda": Handle(Silent(1))}, Limits())
    for _ in range(3):
        assert asyncio.run(pair.describe(timeout_s=0.05)) == {"lda": PAIR}
    unknown = ResidentPairs({"lda": Handle(Silent(0))}, Limits())
    with pytest.raises(NotReady, match="too busy") as caught:
        asyncio.run(unknown.describe(timeout_s=0.05))
    assert caught.value.code == "busy"
    serve_says(monkeypatch, {"STARTING": 2})
    with pytest.raises(NotReady) as starting:
        asyncio.run(pair.describe(timeout_s=0.05))
    assert starting.value.code == "starting"


def test_asking_what_a_pair_is_ends_also_where_serve_itself_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(readiness, "_STATUS_TIMEOUT_S", 0.05)
    pair = ResidentPairs({"lda": Handle(Silent(1))}, Limits()).of("lda")
    assert asyncio.run(pair.describe(0.05)) == PAIR
    serve_says(monkeypatch, {}, silent=True)
    release = threading.Event()
    for hangs in (False, True):
        if hangs:
            monkeypatch.setattr(readiness.serve, "status", lambda: release.wait(30))

        async def ask() -> None:
            async with asyncio.timeout(5):
                with pytest.raises(NotReady, match="no answer .TimeoutError.") as caught:
                    await pair.describe(0.05)
            assert caught.value.code == "unavailable"

        try:
            asyncio.run(ask())
        finally:
            release.set()


def test_the_names_of_the_models_are_asked_for_once_and_wait_as_a_request_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    replica = Silent(1)
    pair = ResidentPairs({"lda": Handle(replica)}, Limits()).of("lda")
    for _ in range(2):
        names = asyncio.run(pair.models())
        assert names == {"model_after": PAIR.after, "model_before": PAIR.before}
    monkeypatch.setattr(resident_pairs, "_LATE_S", 0.0)
    late = ResidentPairs({"lda": Handle(Silent(0))}, Limits(max_request_s=0.05)).of("lda")
    with pytest.raises(Overdue):
        asyncio.run(late.models())


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
