"""Replicas that die, hang and are replaced under load; clients that go; a door that is full.

On a cluster of its own whose replicas fail on demand (`fault_app.py`). Every prompt has a word that
may be found in no log.
"""

import json
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import httpx
import pytest
import safetensors.torch
import torch
import yaml
from conftest import ROOT, TINY
from fault_app import BUG, FOLDER, HANG, POISON

from deployments.local_service import LocalService, free_port, local_service
from lda_core import Engine, ModelPair, Request, encode

pytestmark = [pytest.mark.ray, pytest.mark.slow]

CANARY = "zq7canary3vx"
SLOTS, QUEUE = 8, 32
CONFIG: dict[str, Any] = {
    "http_options": {"host": "127.0.0.1"},
    "logging_config": {"encoding": "JSON"},
    "applications": [
        {
            "name": "lda",
            "route_prefix": "/",
            "import_path": "tests.fault_app:build_app",
            "args": {
                "pair": {"before": str(TINY / "before"), "after": str(TINY / "after")},
                "engine": {"max_slots": SLOTS},
                "stuck_after_s": 2.0,
            },
            "deployments": [
                {
                    "name": "LDAReplica",
                    "num_replicas": 2,
                    "max_ongoing_requests": SLOTS,
                    "max_queued_requests": QUEUE,
                    "health_check_period_s": 1,
                    "user_config": {"max_batch_size": SLOTS},
                    "ray_actor_options": {
                        "num_cpus": 0.3,
                        "runtime_env": {"env_vars": {"OMP_NUM_THREADS": "1"}},
                    },
                }
            ],
        }
    ],
}


class Inside:
    """A process connected to the cluster: runs code, and answers what it leaves in `answer`."""

    LOOP = """
import json, sys, traceback
import ray
from ray import serve
ray.init(log_to_driver=False)
handle = serve.get_app_handle("lda")
names = {"ray": ray, "serve": serve, "handle": handle}
for line in sys.stdin:
    try:
        exec(json.loads(line), names)
        print("ANSWER", json.dumps([names.get("answer"), None]), flush=True)
    except BaseException:
        print("ANSWER", json.dumps([None, traceback.format_exc()]), flush=True)
"""

    def __init__(self, service: LocalService) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", self.LOOP],
            env=service.env,
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, code: str) -> Any:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(json.dumps(textwrap.dedent(code)) + "\n")
        self._process.stdin.flush()
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                answer, error = json.loads(line.removeprefix("ANSWER "))
                assert error is None, error
                return answer
        raise AssertionError("the process has ended")

    def counts(self) -> dict[str, list[int]]:
        """Of each replica, by its process: rows that live, rows that wait, steps. For ten seconds
        Serve may ask only the one that had less to do."""
        return self.run(
            """
            import time
            replicas, answer = serve.get_deployment_handle("LDAReplica", "lda"), {}
            deadline = time.monotonic() + 20
            while len(answer) < 2 and time.monotonic() < deadline:
                pid, *numbers = replicas.counts.remote().result(timeout_s=60)
                answer[pid] = numbers
            """
        )

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        self._process.wait(30)
        self._process.stdout.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def service(folder: Path) -> Iterator[LocalService]:
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(FOLDER, str(folder))
        patched.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        with local_service(config, port=free_port(), log=folder / "serve.log") as running:
            yield running


@pytest.fixture(scope="module")
def inside(service: LocalService) -> Iterator[Inside]:
    inside = Inside(service)
    yield inside
    inside.close()


@pytest.fixture(scope="module")
def client(service: LocalService) -> Iterator[httpx.Client]:
    limits = httpx.Limits(max_connections=None)
    with httpx.Client(base_url=service.url, timeout=180, limits=limits) as client:
        yield client


def happened(folder: Path, what: str) -> int:
    return len(list(folder.glob(f"{what}.*")))


def body(i: int, new: int = 24, word: str = "") -> dict[str, Any]:
    return {
        "prompt": f"{CANARY} {i} {word}",
        "prompt_format": "raw",
        "seed": 100 + i,
        "max_new_tokens": new,
        "ignore_eos": True,
    }


def expected(pair: ModelPair, asked: list[dict[str, Any]]) -> list[list[int]]:
    """What the engine draws in this process, where nothing fails."""
    fields = ("seed", "max_new_tokens", "ignore_eos")
    requests = [
        Request(encode(pair.tokenizer, one["prompt"], "raw").ids, **{k: one[k] for k in fields})
        for one in asked
    ]
    return [done.token_ids for done in Engine(pair).generate(requests)]


def ask(client: httpx.Client, asked: dict[str, Any]) -> httpx.Response:
    return client.post("/v1/lda/generate", json=asked)


def token_ids(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    (completion,) = answer.json()
    ids: list[int] = completion["token_ids"]
    return ids


def wait_until(true: Callable[[], Any], seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


# -- clients that go -----------------------------------------------------------------------

# Eight waves of rows through the slots, if nobody leaves.
BIG = {**body(0, 400), "n": 8 * SLOTS}
STEPS_OF_BIG = 8 * 400


def leave_unary(client: httpx.Client, inside: Inside) -> None:
    with pytest.raises(httpx.ReadTimeout):
        client.post("/v1/lda/generate", json=BIG, timeout=1.0)


def leave_stream(client: httpx.Client, inside: Inside) -> None:
    with client.stream("POST", "/stream", json=BIG) as answer:
        next(answer.iter_lines())


def cancel_by_handle(client: httpx.Client, inside: Inside) -> None:
    inside.run(
        f"""
        import time
        response = handle.generate.remote({BIG!r})
        time.sleep(0.5)
        response.cancel()
        """
    )


def one_of_many_is_refused(client: httpx.Client, inside: Inside) -> None:
    """Where one prompt is too long, so are all of them; that, a replica says."""
    asked = {"model": "lda", "n": 4, "max_tokens": 400, "ignore_eos": True, "seed": 1}
    prompts = [f"{CANARY} {i}" for i in range(15)] + [f"{CANARY} " * 200]
    answer = client.post("/v1/completions", json={**asked, "prompt": prompts})
    assert answer.status_code == 400 and "context_length" in answer.text


@pytest.mark.parametrize(
    "leave", [leave_unary, leave_stream, cancel_by_handle, one_of_many_is_refused]
)
def test_rows_of_a_client_that_goes_are_gone(
    client: httpx.Client, inside: Inside, leave: Callable[[httpx.Client, Inside], None]
) -> None:
    before = sum(steps for _, _, steps in inside.counts().values())
    leave(client, inside)
    wait_until(lambda: not any(live + wait for live, wait, _ in inside.counts().values()))
    steps = sum(steps for _, _, steps in inside.counts().values()) - before
    # Of many prompts one may be refused before the others take a step.
    assert steps > 0 or leave is one_of_many_is_refused
    assert 0 <= steps < STEPS_OF_BIG / 2


# -- replicas ------------------------------------------------------------------------------


def test_a_hung_engine_is_replaced_and_what_it_held_is_answered(
    client: httpx.Client, folder: Path, tiny_pair: ModelPair
) -> None:
    starts = happened(folder, "start")
    asked = [body(0, word=HANG), *(body(i, 200) for i in range(1, 13))]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: ask(client, one), asked))
    assert happened(folder, "hang") == 1
    assert [token_ids(a) for a in answers] == expected(tiny_pair, asked)
    wait_until(lambda: happened(folder, "start") == starts + 1)


def test_a_request_that_kills_is_refused_after_three_and_the_others_are_answered(
    client: httpx.Client, folder: Path, tiny_pair: ModelPair, inside: Inside
) -> None:
    """Those that died beside it, also twice, are."""
    wait_until(lambda: len(inside.counts()) == 2)
    others = [body(i, 300) for i in range(10)]
    with ThreadPoolExecutor(len(others) + 1) as pool:
        going = pool.map(lambda one: ask(client, one), others)
        wait_until(lambda: all(live for live, _, _ in inside.counts().values()))
        poison = pool.submit(ask, client, body(0, word=POISON))
        answers = list(going)
    refused = poison.result()
    assert refused.status_code == 400, refused.text
    assert refused.json()["error"]["code"] == "replicas_died"
    assert refused.headers["x-should-retry"] == "false"
    assert happened(folder, "poison") == 3
    assert [token_ids(a) for a in answers] == expected(tiny_pair, others)


def test_overload_is_refused_at_the_door_and_nothing_accepted_is_lost(
    client: httpx.Client, tiny_pair: ModelPair, inside: Inside
) -> None:
    wait_until(lambda: len(inside.counts()) == 2)
    asked = [body(i % 7, 100) for i in range(10 * 2 * SLOTS)]

    def timed(one: dict[str, Any]) -> tuple[float, httpx.Response]:
        start = time.monotonic()
        answer = ask(client, one)
        return time.monotonic() - start, answer

    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(timed, asked))
    right = dict(zip((one["seed"] for one in asked), expected(tiny_pair, asked[:7]), strict=False))
    refused = [(s, a) for s, a in answers if a.status_code == 429]
    accepted = [(s, a) for s, a in answers if a.status_code == 200]
    print(f"{len(accepted)} accepted, {len(refused)} refused")
    assert len(accepted) + len(refused) == len(asked) and len(refused) > len(asked) / 4
    assert len(accepted) >= 2 * SLOTS
    for one, (_, answer) in zip(asked, answers, strict=True):
        if answer.status_code == 200:
            assert token_ids(answer) == right[one["seed"]]
    for _, answer in refused:
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) > 0
        assert answer.headers["x-should-retry"] == "true"
    assert median(s for s, _ in refused) < median(s for s, _ in accepted)


def test_overload_by_handle_is_a_backpressure_error(inside: Inside) -> None:
    kinds = inside.run(
        f"""
        calls = [handle.generate.remote({body(1, 100)!r}) for _ in range({10 * 2 * SLOTS})]
        answer = []
        for call in calls:
            try:
                answer.append(len(call.result(timeout_s=90)[0].token_ids))
            except Exception as error:
                cause = getattr(error, "cause", error)
                full = isinstance(cause, serve.exceptions.BackPressureError)
                answer.append("full" if full else repr(cause))
        """
    )
    assert set(kinds) == {100, "full"}


# -- deploys -------------------------------------------------------------------------------


class Load:
    """Requests one after the other from several clients, until the block ends."""

    def __init__(self, client: httpx.Client, clients: int) -> None:
        self._client, self._clients = client, clients
        self._going = True
        self.answers: list[tuple[dict[str, Any], httpx.Response]] = []

    def _ask_on(self, first: int) -> None:
        i = first
        while self._going:
            asked = body(i % 7, 60 if i % 3 else 300)
            self.answers.append((asked, ask(self._client, asked)))
            i += 1

    def __enter__(self) -> "Load":
        self._pool = ThreadPoolExecutor(self._clients)
        self._threads: list[Future[None]] = [
            self._pool.submit(self._ask_on, i) for i in range(self._clients)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._going = False
        for thread in self._threads:
            thread.result()
        self._pool.shutdown()


def deploy(inside: Inside, config: dict[str, Any], wait: bool = True) -> None:
    """What `serve deploy` does, then until all is as it was asked for."""
    inside.run(
        f"""
        import time
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({config!r}))
        deadline = time.monotonic() + 240
        while {wait} and not all(
            app.status == "RUNNING" for app in serve.status().applications.values()
        ):
            assert time.monotonic() < deadline, serve.status()
            time.sleep(0.2)
        answer = None
        """
    )


def changed(**changes: Any) -> dict[str, Any]:
    """The config with another user_config, engine ..."""
    config: dict[str, Any] = json.loads(json.dumps(CONFIG))
    (application,) = config["applications"]
    application["args"].update(changes.get("args", {}))
    application["deployments"][0].update(changes.get("options", {}))
    return config


def test_deploys_under_load_lose_nothing(
    client: httpx.Client, inside: Inside, folder: Path, tiny_pair: ModelPair
) -> None:
    starts = happened(folder, "start")
    with Load(client, clients=6) as load:
        time.sleep(1)
        options = {"user_config": {"max_batch_size": 3}}
        deploy(inside, changed(options=options))
        assert happened(folder, "start") == starts  # live: nothing is started again
        deploy(inside, changed(options=options, args={"engine": {"max_slots": SLOTS - 1}}))
        assert happened(folder, "start") == starts + 2
        time.sleep(1)
    assert_right(load, tiny_pair)
    print(f"{len(load.answers)} requests during two deploys")
    assert len(load.answers) > 20


def assert_right(load: Load, pair: ModelPair) -> None:
    kinds = [(i, new) for i in range(7) for new in (60, 300)]
    right = dict(zip(kinds, expected(pair, [body(*kind) for kind in kinds]), strict=True))
    for asked, answer in load.answers:
        i = asked["seed"] - 100
        assert token_ids(answer) == right[i, asked["max_new_tokens"]]


def test_replicas_come_and_go_with_the_load_and_nothing_is_lost(
    client: httpx.Client, inside: Inside, tiny_pair: ModelPair
) -> None:
    """As in serve_config.a40.yaml, with seconds for its minutes."""
    config = changed()
    options = config["applications"][0]["deployments"][0]
    del options["num_replicas"]
    options["max_ongoing_requests"] = 2 * SLOTS
    options["autoscaling_config"] = {
        **{"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": SLOTS},
        **{"upscale_delay_s": 1, "downscale_delay_s": 2},
        **{"metrics_interval_s": 0.5, "look_back_period_s": 1},
    }

    def serving() -> int:
        found: int = inside.run(
            """
            of = serve.status().applications["lda"].deployments["LDAReplica"].replica_states
            answer = of.get("RUNNING", 0) if len(of) == 1 else 0
            """
        )
        return found

    deploy(inside, config)
    wait_until(lambda: serving() == 1)
    with Load(client, clients=3 * SLOTS) as load:
        wait_until(lambda: serving() == 2)
        answered = len(load.answers)
        wait_until(lambda: len(load.answers) > answered + 50)
    with Load(client, clients=2) as later:
        wait_until(lambda: serving() == 1)
    for one in (load, later):
        assert_right(one, tiny_pair)
    deploy(inside, CONFIG)


def test_ready_says_what_keeps_a_pair_from_answering(
    client: httpx.Client, inside: Inside, tmp_path: Path
) -> None:
    nan = tmp_path / "nan"
    nan.mkdir()
    for file in (TINY / "after").iterdir():
        (nan / file.name).symlink_to(file)
    weights = safetensors.torch.load_file(TINY / "after" / "model.safetensors")
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], torch.nan)
    (nan / "model.safetensors").unlink()
    safetensors.torch.save_file(weights, nan / "model.safetensors", {"format": "pt"})
    before = str(TINY / "before")
    config = changed()
    broken = {
        "name": "broken",
        "route_prefix": "/broken",
        "import_path": "deployments.app:build_app",
        "args": {
            "pairs": {
                "nan": {"pair": {"before": before, "after": str(nan)}},
                "missing": {"pair": {"before": before, "after": str(tmp_path / "nowhere")}},
            }
        },
        "deployments": [
            {"name": f"LDAReplica-{name}", "ray_actor_options": {"num_cpus": 0.2}}
            for name in ("nan", "missing")
        ],
    }
    config["applications"].append(broken)
    deploy(inside, config, wait=False)
    seen: list[str] = []

    def failed() -> bool:
        for pair in ("nan", "missing"):
            answer = client.get(f"/broken/ready?pair={pair}")
            print(answer.status_code, answer.text)
            if answer.status_code == 503:
                seen.append(answer.json()["error"]["code"])
        return seen[-2:] == ["deploy_failed"] * 2

    wait_until(failed, 240)
    answer = client.get("/broken/ready?pair=nan")
    print(answer.text)
    assert "SelfTestFailed" in answer.json()["error"]["message"]
    assert answer.headers["retry-after"]
    answer = client.get("/broken/ready?pair=missing")
    assert "CheckpointError" in answer.json()["error"]["message"]
    both = client.get("/broken/ready").json()["error"]
    assert both["code"] == "deploy_failed"
    assert "nan: " in both["message"] and "missing: " in both["message"]
    assert set(seen) <= {"starting", "deploy_failed", "no_replica"}
    # The other application does not mind.
    assert client.get("/ready").status_code == 200
    deploy(inside, changed())


# -- logs ----------------------------------------------------------------------------------


def test_no_log_has_a_prompt_and_a_request_id_is_in_them(
    client: httpx.Client, service: LocalService
) -> None:
    request_id = "0d7c5f1e-faults-test"
    prompt = {"prompt": f"{CANARY} {BUG}"}
    score = {"prompt": CANARY, "continuations": [{"text": CANARY}]}
    openai = {"model": "lda", "seed": 1, "max_tokens": 4}
    chat = {**openai, "messages": [{"role": "user", "content": CANARY}]}
    wanted: list[tuple[int, str, dict[str, Any]]] = [
        (200, "/v1/lda/generate", body(1)),
        (200, "/stream", body(1)),
        (200, "/score", score),
        (200, "/capture", {"prompt": CANARY}),
        (200, "/generate_lda", {"prompt": CANARY, "max_new_tokens": 4}),
        (200, "/v1/completions", {**openai, "prompt": CANARY}),
        (200, "/v1/chat/completions", chat),
        (200, "/v1/chat/completions", {**chat, "stream": True}),
        (200, "/tokenize", {"prompt": CANARY}),
        (500, "/v1/lda/generate", prompt),
        (500, "/v1/completions", {**openai, **prompt}),
        (400, "/v1/lda/generate", {"prompt": CANARY, "alpha": CANARY}),
        (400, "/v1/lda/generate", {"prompt": CANARY, CANARY: 1}),
        (400, "/v1/lda/generate", {"prompt": f"{CANARY} " * 200}),
        (400, "/score", {**score, "grid": [CANARY]}),
        (404, "/v1/completions", {**openai, "model": CANARY, "prompt": CANARY}),
    ]
    for status, path, asked in wanted:
        answer = client.post(path, json=asked, headers={"x-request-id": request_id})
        assert answer.status_code == status, (path, answer.text)
    logs = Path(service.env["RAY_TMPDIR"]) / "ray" / "session_latest" / "logs"

    def lines_of_replicas() -> list[dict[str, Any]]:
        files = logs.glob("serve/replica_lda_LDAReplica_*.log")
        lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
        return [line for line in lines if line.get("request_id") == request_id]

    wait_until(lines_of_replicas)
    texts = {p: p.read_text(errors="replace") for p in logs.rglob("*") if p.is_file()}
    texts[service.log] = service.log.read_text(errors="replace")
    assert sum("a bug" in text for text in texts.values()) > 0  # what went wrong is there
    assert [str(p) for p, text in texts.items() if CANARY in text] == []
