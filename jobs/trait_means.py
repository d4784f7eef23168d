"""Each text's mean residual state at the layers' outputs: asked for once, and kept.

`means.bin` is a list of records of one size: the text's key (32 bytes) and its state [L, D] in
float32. It is appended to, never rewritten; half a record, left by a run that was killed, is cut
off. What is in it is not asked for again; what failed is not in it.

L layers, D the hidden size.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from safetensors.numpy import load

from deployments.schemas import InvalidRequest
from jobs.call import INVALID, Ask, stop_if_config
from jobs.errors import Refused, Stopped

Model = Literal["after", "before"]
MEANS = "means.bin"
KEY_BYTES = 32
POINTS, OUTPUT = 3, 2  # of a layer: its input, after attention, its output


class Item(NamedTuple):
    """A prompt and a response, to be read by the model in one pass."""

    prompt: str
    response: str

    @property
    def key(self) -> bytes:
        return hashlib.sha256(json.dumps(self).encode()).digest()


@dataclass(frozen=True, eq=False)
class Answer:
    """`state` [L, D] float32, or why there is none; `unanswered` if nothing came at all."""

    item: Item
    state: np.ndarray | None
    error: str | None = None
    unanswered: str | None = None


@dataclass(frozen=True)
class Means:
    """The work of capturing them (`jobs.call.Work`). `form`: the request's prompt_format and
    system_prompt."""

    form: Mapping[str, Any] = field(hash=False)
    model: Model
    layers: int
    hidden_size: int
    timeout_s: float

    def answer(self, item: Item, ask: Ask) -> Answer:
        request = {
            **self.form,
            "prompt": item.prompt,
            "completions": [{"text": item.response}],
            "models": self.model,
            "mean": True,
        }
        try:
            (captured,) = ask("capture", request)
        except InvalidRequest as error:
            stop_if_config(error)
            return Answer(item, None, f"{INVALID}: {error}")
        state = load(captured.tensors).get(f"{self.model}.mean")
        wanted = (self.layers, POINTS, self.hidden_size)
        if state is None or state.shape != wanted:
            got = "nothing" if state is None else list(state.shape)
            raise Stopped(f"the service answered {got} as {self.model}.mean, not {list(wanted)}")
        state = np.ascontiguousarray(state[:, OUTPUT], dtype=np.float32)  # (L, D)
        if not np.isfinite(state).all():
            return Answer(item, None, "its activations are not finite in the service's dtype")
        return Answer(item, state)

    def without_answer(self, item: Item, error: str) -> Answer:
        return Answer(item, None, error, error)


class MeanFile:
    """Records of one pair's shapes; where a key comes twice, the first one counts."""

    def __init__(self, path: Path, layers: int, hidden_size: int) -> None:
        self.path = path
        self._record = np.dtype(
            [("key", np.void, KEY_BYTES), ("state", "<f4", (layers, hidden_size))]
        )

    def cut_half_record(self) -> int:
        """Bytes cut."""
        if not self.path.exists():
            return 0
        size = self.path.stat().st_size
        if half := size % self._record.itemsize:
            os.truncate(self.path, size - half)
        return half

    def places(self) -> dict[bytes, int]:
        """Key and number of each record. Raises Refused if its size is not that of whole ones."""
        records = self._records()
        if records is None:
            return {}
        made: dict[bytes, int] = {}
        for place, key in enumerate(records["key"]):
            made.setdefault(key.tobytes(), place)
        return made

    def states(self) -> np.ndarray:
        """(records, L, D) float32, left in the file: read what is needed, by `places`."""
        records = self._records()
        shape = self._record["state"].shape
        return np.zeros((0, *shape), "<f4") if records is None else records["state"]

    def _records(self) -> np.ndarray | None:
        if not self.path.exists() or not self.path.stat().st_size:
            return None
        if self.path.stat().st_size % self._record.itemsize:
            raise Refused(f"{self.path}: not whole records of this pair; delete it to have it made")
        return np.memmap(self.path, self._record, "r")

    def __enter__(self) -> Self:
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            os.fsync(self._file.fileno())

    def append(self, answers: Iterable[Answer]) -> None:
        """Those that have a state. Raises OSError (disk full, say)."""
        data = memoryview(
            b"".join(
                a.item.key + a.state.astype("<f4").tobytes() for a in answers if a.state is not None
            )
        )
        while data:
            data = data[self._file.write(data) or 0 :]
