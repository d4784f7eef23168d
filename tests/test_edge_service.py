"""The edge behind Serve's own proxy: raw sockets against a service with keys."""

import json
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import ROOT

from deployments.local_service import LocalService, ServiceError, free_port, local_service

pytestmark = pytest.mark.ray

KEY = "canary-0123456789abcdef"
BODY_TIMEOUT_S = 6.0
MAX_BODY_BYTES = 2**20
AUTHORIZED = {"authorization": f"Bearer {KEY}"}


def config(folder: Path, host: str, edge: dict[str, Any]) -> Path:
    """The shipped one with a replica and an edge of its own."""
    settings = yaml.safe_load((ROOT / "serve_config.yaml").read_text())
    settings["http_options"]["host"] = host
    (application,) = settings["applications"]
    application["args"]["edge"] = edge
    application["deployments"][0]["num_replicas"] = 1
    path = folder / "serve_config.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalService]:
    folder = tmp_path_factory.mktemp("edge")
    keys = folder / "keys"
    keys.write_text(f"tests:{KEY}\n")
    keys.chmod(0o600)
    edge = {
        "keys_file": str(keys),
        "body_timeout_s": BODY_TIMEOUT_S,
        "max_body_bytes": MAX_BODY_BYTES,
    }
    path = config(folder, "127.0.0.1", edge)
    with local_service(path, port=free_port(), log=folder / "serve.log") as running:
        yield running


@pytest.fixture(scope="module")
def client(guarded: LocalService) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guarded.url, timeout=60, headers=AUTHORIZED) as client:
        yield client


def connected(service: LocalService, *lines: str, rest: bytes = b"") -> socket.socket:
    port = int(service.url.rpartition(":")[2])
    one = socket.create_connection(("127.0.0.1", port), timeout=60)
    head = [*lines, "host: localhost", f"authorization: Bearer {KEY}"]
    one.sendall("\r\n".join([*head, "", ""]).encode("latin-1") + rest)
    return one


def half_sent(service: LocalService) -> socket.socket:
    lines = "POST /generate_lda HTTP/1.1", "content-type: application/json", "content-length: 99"
    return connected(service, *lines, rest=b'{"prompt": ')


def until_closed(one: socket.socket) -> bytes:
    said = b""
    while more := one.recv(65536):
        said += more
    one.close()
    return said


def generate(client: httpx.Client) -> httpx.Response:
    return client.post("/generate_lda", json={"prompt": "Hi", "max_new_tokens": 2, "seed": 1})


def test_half_sent_bodies_harm_nobody_and_end_in_408(
    guarded: LocalService, client: httpx.Client
) -> None:
    assert generate(client).status_code == 200
    begun = time.monotonic()
    stalled = [half_sent(guarded) for _ in range(50)]
    served = 0
    while time.monotonic() - begun < BODY_TIMEOUT_S / 2:
        assert generate(client).status_code == 200
        served += 1
    assert served > 3
    for one in stalled:
        said = until_closed(one)
        assert said.startswith(b"HTTP/1.1 408 ") and b'"body_timeout"' in said
    assert time.monotonic() - begun > BODY_TIMEOUT_S * 0.9
    assert generate(client).status_code == 200


def test_bodies_that_are_too_large_are_told_so_to_the_end(
    guarded: LocalService, client: httpx.Client
) -> None:
    json_type = {"content-type": "application/json"}
    large = b" " * (8 * MAX_BODY_BYTES)
    declared = client.post("/score", content=large, headers=json_type)
    assert declared.status_code == 413, declared.text
    parts = (large[: 2**16] for _ in range(64))
    assert client.post("/score", content=parts, headers=json_type).status_code == 413
    endless = connected(
        guarded,
        *("POST /score HTTP/1.1", "content-type: application/json", "transfer-encoding: chunked"),
        rest=b"10000\r\n" + large[: 2**16] + b"\r\n",
    )
    said = b""
    endless.settimeout(0.01)
    for _ in range(1000):
        endless.settimeout(60)
        endless.sendall(b"10000\r\n" + large[: 2**16] + b"\r\n")
        endless.settimeout(0.01)
        try:
            said = endless.recv(65536)
            break
        except TimeoutError:
            continue
    assert said.startswith(b"HTTP/1.1 413 ")
    endless.close()
    assert generate(client).status_code == 200


def test_the_answer_has_one_id_and_no_bad_one(guarded: LocalService, client: httpx.Client) -> None:
    for path in ("/health", "/none", "/v1/models/none"):
        answer = client.get(path, headers={"x-request-id": "night-7"})
        assert answer.headers.get_list("x-request-id") == ["night-7"]
    for bad in (b"a b", b"\xe9", b"x" * 65):
        answer = client.get("/health", headers={"x-request-id": bad})
        (told,) = answer.headers.get_list("x-request-id")
        assert answer.status_code == 200 and told.encode("latin-1") != bad
    odd = client.get("/health", headers={b"serve_multiplexed_model_id": b"\xe9"})
    assert odd.status_code == 200


def test_hosts_headers_and_upgrades(guarded: LocalService, client: httpx.Client) -> None:
    assert client.get("/health", headers={"host": "evil.example"}).status_code == 400
    many = {f"x-{i}": "a" for i in range(300)}
    assert client.get("/health", headers=many).status_code == 431
    upgrade = connected(
        guarded,
        *("GET /stream HTTP/1.1", "connection: Upgrade", "upgrade: websocket"),
        *("sec-websocket-version: 13", "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ=="),
    )
    assert until_closed(upgrade).startswith(b"HTTP/1.1 403 ")


def test_a_key_is_asked_for_and_nowhere_to_be_found(
    guarded: LocalService, client: httpx.Client
) -> None:
    with httpx.Client(base_url=guarded.url, timeout=60) as stranger:
        assert stranger.get("/health").status_code == 200
        for path in ("/", "/docs", "/ready", "/metrics", "/v1/models", "/runs", "/none"):
            refused = stranger.get(path)
            assert refused.status_code == 401, path
            assert len(refused.headers.get_list("www-authenticate")) == 2
            shown = client.get(path)
            assert shown.status_code == (404 if path == "/none" else 200), path
            assert KEY not in shown.text + str(shown.headers) + refused.text
        assert stranger.get("/ready", auth=("browser", KEY)).status_code == 200
    serve = str(Path(sys.executable).with_name("serve"))
    for words in (["status"], ["config"]):
        done = subprocess.run([serve, *words], env=guarded.env, capture_output=True, text=True)
        assert KEY not in done.stdout + done.stderr
    files = [guarded.log, *Path(guarded.env["RAY_TMPDIR"]).rglob("*")]
    read = [file.read_bytes() for file in files if file.is_file() and not file.is_symlink()]
    assert len(read) > 20 and not [one for one in read if KEY.encode() in one]
    said = guarded.log.read_text(errors="replace")
    lines = [json.loads(one[one.index("{") :]) for one in said.splitlines() if '"route"' in one]
    assert {"/generate_lda", "/docs", None} <= {one["route"] for one in lines}
    assert {"tests", None} == {one["key"] for one in lines}


def test_what_the_edge_refuses_is_counted(guarded: LocalService, client: httpx.Client) -> None:
    with httpx.Client(base_url=guarded.url, timeout=60) as stranger:
        for answer in (stranger.get("/ready"), stranger.post("/health", json={})):
            assert answer.status_code == 401
    counted = re.compile(r'^lda_edge_refused_total\{.*code="invalid_api_key".*\} (\S+)$', re.M)
    deadline = time.monotonic() + 60  # Ray's agent hears of it every few seconds
    while not (found := counted.findall(client.get("/metrics").text)):
        assert time.monotonic() < deadline
        time.sleep(1)
    assert float(found[0]) >= 2


def test_beyond_this_machine_it_does_not_start_without_keys(tmp_path: Path) -> None:
    """`127.1` is a name like any other to us, and this machine to the socket."""
    path = config(tmp_path, "127.1", {})
    with pytest.raises(ServiceError, match="EdgeError: http_options.host is 127.1"):
        with local_service(path, port=free_port(), log=tmp_path / "serve.log"):
            pass


def test_nobody_else_may_read_the_keys(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text(f"tests:{KEY}\n")
    os.chmod(keys, 0o644)
    path = config(tmp_path, "127.0.0.1", {"keys_file": str(keys)})
    with pytest.raises(ServiceError, match="chmod o-rw"):
        with local_service(path, port=free_port(), log=tmp_path / "serve.log"):
            pass
