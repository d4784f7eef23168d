"""The client and the command against the shipped service, for real."""

import os
import subprocess
import sys
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import ROOT

from deployments.local_service import LocalService
from jobs.client import InvalidRequest, LDAClient

pytestmark = pytest.mark.ray


def test_over_http(service: LocalService) -> None:
    asked: dict[str, Any] = {"prompt_format": "alpaca", "max_new_tokens": 12, "logprobs": True}
    question = "What is the capital of France?"
    with LDAClient(service.url) as lda, httpx.Client(base_url=service.url, timeout=60) as http:
        assert lda.describe().architecture == "llama"
        rows = lda.generate([question, "Hi"], alpha=[0, 2], n=2, seed=7, **asked)
        assert [r.seed for r in rows] == [7, 8, 7, 8, 9, 10, 9, 10] and not rows.failed
        # Prompt i with seed + i * n: the rows of a batch of the plain server's endpoint.
        batch = {"prompts": [question, "Hi"], "alpha": 2, "n": 2, "seed": 7, "ignore_eos": False}
        answer = http.post(
            "/generate_lda_batch",
            json={**batch, "max_new_tokens": 12, "temperature": 1, "top_p": 1},
        ).json()
        texts = [sample["completion"] for r in answer["results"] for sample in r["samples"]]
        assert [r.completion for r in rows if r.alpha == 2] == texts
        assert "<span title=" in rows._repr_html_()

        found = rows[0]
        assert found.logprobs is not None
        (scored,) = lda.score(
            question, [{"token_ids": found.token_ids}], prompt_format="alpaca", grid=[0]
        )
        assert scored.after == pytest.approx(found.logprobs.after, abs=1e-4)
        (capture,) = lda.capture("Hi", "there", models="after")
        assert capture.scores["after"].shape == (len(capture.tokens), 3, 3, len(capture.traits))
        assert capture.norms["after"].dtype == np.float32
        with pytest.raises(InvalidRequest, match="raw"):
            lda.capture("Hi", "there", raw=True)
        with pytest.raises(InvalidRequest, match="^alpha: must be between"):
            lda.generate("Hi", alpha=99)
        (long,) = lda.generate("word " * 2000)
        assert long.failed and "tokens" in str(long.error)


def test_a_stream_is_what_is_generated(service: LocalService) -> None:
    asked: dict[str, Any] = {"n": 2, "seed": 7, "max_new_tokens": 200, "ignore_eos": True}
    with LDAClient(service.url) as lda:
        pieces = list(lda.stream("What is 2 plus 3?", alpha=[0, 2], **asked, kl=True))
        rows = lda.generate("What is 2 plus 3?", alpha=[0, 2], **asked, kl=True)
        for row in rows:
            of = [p for p in pieces if (p.alpha, p.index) == (row.alpha, row.sample)]
            assert "".join(p.text for p in of) == row.completion and len(of) > 1
            assert [id for p in of for id in p.token_ids] == row.token_ids
            assert of[-1].completion is not None and of[-1].completion.seed == row.seed
            assert row.kl is not None and len(row.kl) == len(row.token_ids)
        left = lda.stream("Hi", max_new_tokens=400, ignore_eos=True)
        next(left)
        left.close()
        with pytest.raises(InvalidRequest, match="alphas.*between"):
            next(lda.stream("Hi", alpha=[0, 99]))


def test_by_handle_it_is_the_same(service: LocalService) -> None:
    code = """
from jobs.client import LDAClient
with LDAClient.in_cluster() as lda:
    asked = {"alpha": [0, 2], "n": 2, "seed": 7, "max_new_tokens": 12}
    rows = lda.generate(["What is 2 plus 3?"], **asked)
    texts = {}
    for piece in lda.stream("What is 2 plus 3?", **asked):
        key = piece.alpha, piece.index
        texts[key] = texts.get(key, "") + piece.text
    assert texts == {(row.alpha, row.sample): row.completion for row in rows}, texts
    print("ANSWER", [row.completion for row in rows])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=service.env, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with LDAClient(service.url) as lda:
        rows = lda.generate(["What is 2 plus 3?"], alpha=[0, 2], n=2, seed=7, max_new_tokens=12)
    assert done.stdout.splitlines()[-1] == f"ANSWER {[row.completion for row in rows]}"


def test_the_command(service: LocalService) -> None:
    command = [sys.executable, "-m", "jobs.cli", "generate", "Hi", "--alpha", "0,2", "--seed", "3"]
    env = {**os.environ, "LDA_URL": service.url}
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "alpha 2, seed 3" in done.stdout and done.stderr == ""
