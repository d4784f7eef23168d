"""One text of a capture, in a remote task: generated unless it is given, then read by both models.

The task sends back the finished file and its row; the driver alone writes.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deployments.schemas import Captured, FinishReason, InvalidRequest
from jobs.call import INVALID, Ask, stop_if_config
from jobs.capture_files import Array, Content, Tensor, file_name, from_bytes, to_bytes
from jobs.capture_rows import CaptureRow, Means
from jobs.errors import Refused, Stopped

POINTS = ("input", "mid", "output")  # of a layer: before it, after attention, after it
OUTPUT = POINTS.index("output")
AXES = {
    "scores": "token, layer, point, trait",
    "norms": "token, layer, point",
    "residual": "token, layer, point, hidden",
    "q": "token, head, dimension",
    "k": "token, key/value head, dimension",
    "v": "token, key/value head, dimension",
    "attention": "head, token, token attended to",
    "mlp_up": "token, unit",
    "mlp_activation": "token, unit",
    "mlp_down": "token, hidden",
}
OPTION_OF = {"traits": "--traits", "layer": "--layer", "models": "--model", "raw": "--raw"}


@dataclass(frozen=True)
class Given:
    """A completion of an earlier run."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    eos_index: int | None


@dataclass(frozen=True)
class Text:
    """What one file is made of. `seed` draws its completion where none is given."""

    set: str
    prompt_id: str
    prompt: str
    alpha: float
    sample: int
    seed: int | None
    given: Given | None = None


@dataclass(frozen=True)
class CapturedText:
    """The row of one text, and its file's bytes if it did not fail."""

    item: Text
    row: CaptureRow
    data: bytes | None = None
    unanswered: str | None = None


@dataclass(frozen=True)
class CaptureWork:
    """What all texts of one configuration share. `traits` is a safetensors file's bytes."""

    config: str
    tier: int
    layer: int | None
    model: str
    raw: bool
    prompt_format: str
    system_prompt: str | None
    sampling: Mapping[str, Any]
    traits: bytes
    timeout_s: float

    def answer(self, item: Text, ask: Ask) -> CapturedText:
        try:
            given = item.given or self._generated(item, ask)
            if isinstance(given, str):
                return self._failed(item, given)
            (captured,) = ask("capture", self._request(item, given))
        except InvalidRequest as error:
            _refuse_option(error)
            stop_if_config(error)
            return self._failed(item, f"{INVALID}: {error}")
        return self._captured(item, given, captured)

    def without_answer(self, item: Text, error: str) -> CapturedText:
        return replace(self._failed(item, error), unanswered=error)

    def _generated(self, item: Text, ask: Ask) -> Given | str:
        """The completion, or why there is none."""
        request = {**self._prompt(item), **self.sampling}
        (found,) = ask("generate", {**request, "alpha": item.alpha, "n": 1, "seed": item.seed})
        if found.seed != item.seed or found.alpha != item.alpha:
            raise Stopped("the service answered another seed or alpha than asked for")
        if found.finish_reason == "error" or found.error is not None:
            return str(found.error or "failed without a reason")
        return Given(found.text, tuple(found.token_ids), found.finish_reason, found.eos_index)

    def _request(self, item: Text, given: Given) -> dict[str, Any]:
        """Without a token in the completion, the prompt alone is captured."""
        ids = list(given.token_ids)
        return {
            **self._prompt(item),
            "completions": [{"token_ids": ids}] if ids else [],
            "traits": self.traits,
            "models": self.model,
            "layer": self.layer,
            "raw": self.raw,
        }

    def _prompt(self, item: Text) -> dict[str, Any]:
        return {
            "prompt": item.prompt,
            "prompt_format": self.prompt_format,
            "system_prompt": self.system_prompt,
        }

    def _captured(self, item: Text, given: Given, captured: Captured) -> CapturedText:
        first = captured.prompt_tokens
        if tuple(captured.token_ids[first:]) != given.token_ids:
            raise Stopped("the service captured another text than it was given")
        tensors = dict(from_bytes(captured.tensors).tensors)
        scores = {
            role: tensors[f"{role}.scores"].array()  # (T, L, 3, K)
            for role in ("after", "before")
            if f"{role}.scores" in tensors
        }
        length = len(captured.token_ids)
        if not scores or any(len(of_role) != length for of_role in scores.values()):
            raise Stopped("the service captured other tokens than those of the text")
        if not all(np.isfinite(of_role).all() for of_role in scores.values()):
            return self._failed(item, "scores that are not finite", given)
        if len(scores) == 2:
            scores["difference"] = scores["after"] - scores["before"]
            tensors["difference.scores"] = Tensor.of(scores["difference"])
        until = len(given.token_ids) if given.eos_index is None else given.eos_index
        name = file_name(
            item.set,
            item.prompt_id,
            item.alpha,
            item.sample,
            self.tier,
            self.layer,
            self.model,
            self.config,
        )
        data = to_bytes(Content(tensors, self._metadata(item, captured)))
        row = self._failed(item, "", given).row.model_copy(
            update={
                "prompt_tokens": first,
                "answer_tokens": until,
                "tokens": captured.tokens,
                "file": name,
                "sha256": hashlib.sha256(data).hexdigest(),
                "size": len(data),
                "means": means(scores, captured.traits, first, first + until),
                "error": None,
            }
        )
        return CapturedText(item, row, data)

    def _metadata(self, item: Text, captured: Captured) -> dict[str, str]:
        """What the file says of itself; all of it text, as the format wants."""
        said: dict[str, Any] = {
            "config": self.config,
            "set": item.set,
            "prompt_id": item.prompt_id,
            "alpha": repr(item.alpha),
            "sample": item.sample,
            "tier": self.tier,
            "layer": "" if self.layer is None else self.layer,
            "model": self.model,
            "prompt_tokens": captured.prompt_tokens,
            "traits": json.dumps(captured.traits),
            "points": json.dumps(POINTS),
            "axes": json.dumps(AXES),
            "tokens": json.dumps(captured.tokens),
            "row": "row prompt_tokens + k is generated token k, where that token is read",
        }
        return {name: str(value) for name, value in said.items()}

    def _failed(self, item: Text, error: str, given: Given | None = None) -> CapturedText:
        given = given or item.given
        row = CaptureRow(
            config=self.config,
            set=item.set,
            prompt_id=item.prompt_id,
            prompt=item.prompt,
            alpha=item.alpha,
            sample=item.sample,
            seed=item.seed,
            completion=given.text if given else None,
            token_ids=list(given.token_ids) if given else [],
            finish_reason=given.finish_reason if given else None,
            eos_index=given.eos_index if given else None,
            prompt_tokens=None,
            answer_tokens=0,
            tokens=[],
            file=None,
            sha256=None,
            size=0,
            means={},
            error=error,
        )
        return CapturedText(item, row)


def means(
    scores: Mapping[str, Array], traits: Sequence[str], first: int, last: int
) -> dict[str, Means]:
    """Of scores (T, L, 3, K) per role over tokens [first, last), to six digits; none of no token:
    there is no mean of an answer that is not there."""
    if last <= first:
        return {}
    found = {role: of_role[first:last, :, OUTPUT].mean(axis=0) for role, of_role in scores.items()}
    return {
        trait: Means(
            **{role: [float(f"{x:.6g}") for x in of_role[:, k]] for role, of_role in found.items()}
        )
        for k, trait in enumerate(traits)
    }


def _refuse_option(error: InvalidRequest) -> None:
    """What the command line asked of every text, and the service does not do."""
    option = OPTION_OF.get(error.param.partition("[")[0].partition(".")[0])
    if option is not None:
        raise Refused(f"the service refuses {option}: {error.message}")
