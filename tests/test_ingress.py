import asyncio
import json
import threading
import time
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from deployments import capture_lists, ingress
from deployments.capture_lists import CapturedLists
from deployments.ingress import require_good
from deployments.plain_api import LDAResult
from deployments.resident_pairs import ResidentPairs
from deployments.schemas import Captured, CaptureRequest, Completion, InvalidRequest, Limits


def completion(seed: int, **changes: Any) -> Completion:
    fields = {
        "text": "fine",
        "token_ids": [1, 2],
        "finish_reason": "length",
        "eos_index": None,
        "eos_text_offset": None,
        "seed": seed,
        "alpha": 1.0,
        "prompt_tokens": 3,
        "formatted_prompt": "p",
    }
    return Completion(**{**fields, **changes})


def failed(seed: int) -> Completion:
    return completion(seed, text="", finish_reason="error", error="logits are not finite")


def test_a_failed_sample_carries_its_error_and_the_others_are_kept() -> None:
    done = require_good([completion(1), failed(2), completion(3)])
    result = LDAResult(**LDAResult.result_fields("p", done, 2))
    assert result.samples is not None
    assert [s.error for s in result.samples] == [None, "logits are not finite", None]
    assert result.samples[1].finish_reason == "error"


def test_where_all_failed_the_request_did() -> None:
    with pytest.raises(InvalidRequest, match="not finite") as caught:
        require_good([failed(1), failed(2)])
    assert caught.value.code == "row_failed"


def test_captures_become_json_in_another_thread_and_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 2, 3, 2) / 7
    tensors = {"after.scores": values, "after.norms": values[..., 0].copy()}
    one = Captured(
        prompt_tokens=1,
        token_ids=[5, 6],
        tokens=[' "', "\u00e9"],
        traits=["a", "b"],
        tensors=safetensors.numpy.save(tensors),
    )
    asked: list[Any] = []
    threads: list[threading.Thread] = []

    async def remote(*args: Any) -> list[Captured]:
        asked.append(args)
        return [one, one]

    def as_json(captured: Any) -> bytes:
        threads.append(threading.current_thread())
        return own(captured)

    own = capture_lists.as_json
    limits = Limits(max_capture_numbers=99)
    replica: Any = SimpleNamespace(capture=SimpleNamespace(remote=remote))
    door: Any = SimpleNamespace(_limits=limits, _pairs=ResidentPairs({"lda": replica}, limits))
    inner: Any = ingress.Ingress
    # Serve has copied the routes, with their globals.
    monkeypatch.setitem(inner.capture_over_http.__globals__, "as_json", as_json)
    body = CaptureRequest(prompt="Hi")
    answer = asyncio.run(inner.capture_over_http(door, body))
    ((*sent, until),) = asked
    assert sent == [body, 99] and until > time.time()
    assert threads and threading.main_thread() not in threads
    first, second = map(CapturedLists.model_validate, json.loads(answer.body))
    assert first == second and first.tokens == one.tokens and first.traits == one.traits
    assert np.array_equal(np.array(first.scores["after"], np.float32), values)
    assert np.array_equal(np.array(first.norms["after"], np.float32), tensors["after.norms"])
