from typing import Any

import pytest

from deployments.ingress import require_good
from deployments.plain_api import LDAResult
from deployments.schemas import Completion, InvalidRequest


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
