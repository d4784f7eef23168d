"""Each text's mean residual state at the layers' outputs: asked for once, and kept.

`means.bin` is a list of records of one size: the text's key (32 bytes), its state [L, D] in
float32 and the CRC-32 of both, little-endian. It is appended to, never rewritten; half a record,
left by a run that was killed, is cut off. What is in it is not asked for again; what failed is not
in it.

L layers, D the hidden size.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self
from zlib import crc32

import numpy as np
from safetensors.numpy import load

from deployments.schemas import InvalidRequest
from jobs.call import INVALID, Ask, stop_if_config
from jobs.errors import Refused, Stopped, naming

Model = Literal["after", "before"]
KEY_BYTES, CRC_BYTES = 32, 4
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
            [
                ("key", np.void, KEY_BYTES),
                ("state", "<f4", (layers, hidden_size)),
                ("crc", "<u4"),
            ]
        )

    def cut_half_record(self) -> int:
        """Bytes cut. Raises Refused for a file of an earlier version, whose records have no CRC."""
        if not self.path.exists():
            return 0
        size = self.path.stat().st_size
        if half := size % self._record.itemsize:
            if not size % (self._record.itemsize - CRC_BYTES):
                raise Refused(
                    f"{self.path} was made by an earlier version; delete it to have it made again"
                )
            os.truncate(self.path, size - half)
        return half

    def places(self) -> dict[bytes, int]:
        """Key and number of each record. Raises Refused, with its number (the first is 1), for one
        that is damaged, and if the file's size is not that of whole ones."""
        records = self._records()
        if records is None:
            return {}
        made: dict[bytes, int] = {}
        checked = records.view(np.uint8).reshape(len(records), -1)[:, :-CRC_BYTES]
        for place, (data, crc) in enumerate(zip(checked, records["crc"], strict=True)):
            if crc32(data) != crc:
                raise Refused(
                    f"{self.path}: record {place + 1} is damaged: its CRC is not that of its key "
                    "and state; delete the file to have it made again"
                )
            made.setdefault(data[:KEY_BYTES].tobytes(), place)
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
            raise Refused(
                f"{self.path}: not whole records of this pair; delete it to have it made again"
            )
        return np.memmap(self.path, self._record, "r")

    def __enter__(self) -> Self:
        self._file = self.path.open("ab", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        with naming(self.path), self._file:
            os.fsync(self._file.fileno())

    def append(self, answers: Iterable[Answer]) -> None:
        """Those that have a state. Raises OSError (disk full, say)."""
        data = memoryview(b"".join(record(a.item, a.state) for a in answers if a.state is not None))
        whole = self._file.tell()
        with naming(self.path):
            try:
                while data:
                    data = data[self._file.write(data) or 0 :]
            except BaseException:
                # Copied by --copy-to, half a record would be more than the folder after its cut.
                self._file.truncate(whole)
                raise


def record(item: Item, state: np.ndarray) -> bytes:
    data = item.key + state.astype("<f4").tobytes()
    return data + crc32(data).to_bytes(CRC_BYTES, "little")
