"""Files of captures: safetensors, one per text, whose name no other configuration can have.

Read and written as bytes, without torch: a capture in bfloat16 passes through unchanged, and the
same tensors and metadata give the same bytes. For these the writing is done here: safetensors' own
`serialize` puts metadata in an order that changes from process to process, and resumed runs would
have other files (https://github.com/huggingface/safetensors, the format's own page).
"""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, deserialize

from jobs.errors import Refused, naming
from jobs.summary import alpha_text

FOLDER = "captures"  # within the run's folder
SUFFIX = ".safetensors"
PLAIN = re.compile(r"[a-z0-9_][a-z0-9._-]{0,63}")
READABLE_CHARS = 40  # of a name that had to be altered
HASH_CHARS = 12
SIZES = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "BF16": 2, "F16": 2, "U8": 1, "BOOL": 1}

Array = np.ndarray[Any, np.dtype[np.float32]]


class Tensor(NamedTuple):
    """As the file has it: the format's word for the dtype, and the bytes in C order."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    @classmethod
    def of(cls, values: Array) -> "Tensor":
        return cls("F32", values.shape, np.ascontiguousarray(values, "<f4").tobytes())

    def array(self) -> Array:
        """In float32, whatever it was stored in."""
        if self.dtype == "BF16":  # the upper half of a float32, which numpy has no word for
            wide = np.frombuffer(self.data, "<u2").astype("<u4") << 16
            return wide.view("<f4").reshape(self.shape)
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[self.dtype]
        return np.frombuffer(self.data, kind).astype(np.float32).reshape(self.shape)


class Content(NamedTuple):
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def from_bytes(data: bytes) -> Content:
    """Raises ValueError for what is not a whole safetensors file."""
    try:
        found = deserialize(data)  # type: ignore[no-untyped-call]
    except SafetensorError as error:
        raise ValueError(f"not a whole safetensors file: {error}") from None
    tensors = {
        name: Tensor(entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in found
    }
    # Not among what `deserialize` answers; the header is whole, or it had raised.
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return Content(tensors, header.get("__metadata__", {}))


def to_bytes(content: Content) -> bytes:
    """The widest dtypes first, as the format's own writer does, so that all are aligned."""
    ordered = sorted(content.tensors.items(), key=lambda pair: (-SIZES[pair[1].dtype], pair[0]))
    header: dict[str, Any] = {"__metadata__": dict(sorted(content.metadata.items()))}
    at = 0
    for name, tensor in ordered:
        end = at + len(tensor.data)
        header[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    text += b" " * (-len(text) % 8)
    return b"".join([len(text).to_bytes(8, "little"), text, *(t.data for _, t in ordered)])


def read(path: Path) -> Content:
    """Raises Refused for a file that is gone or not whole."""
    try:
        return from_bytes(path.read_bytes())
    except OSError as error:
        raise Refused(f"{path}: {error.strerror}") from None
    except ValueError:
        raise Refused(f"{path} is not a whole safetensors file; run the capture again") from None


def write(path: Path, data: bytes) -> None:
    """Whole or not at all, and on the disk before it is said to be there."""
    beside = path.with_name(f".{hashlib.sha256(path.name.encode()).hexdigest()[:16]}.part")
    with naming(beside), beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def safe(name: str) -> str:
    """`name` where every file system takes it as it is, else what is readable of it and a hash
    behind a `~`, which no plain name has: two names never become one, not even where A is a."""
    if PLAIN.fullmatch(name):
        return name
    readable = re.sub(r"[^a-z0-9_-]+", "_", name.lower())[:READABLE_CHARS].lstrip("-")
    return f"{readable or '_'}~{hashlib.sha256(name.encode()).hexdigest()[:HASH_CHARS]}"


def file_name(
    set_name: str,
    prompt_id: str,
    alpha: float,
    sample: int,
    tier: int,
    layer: int | None,
    model: str,
    config: str,
) -> str:
    """Of one text, relative to the run's folder. The parts stand between `+`, which no part has;
    `config` is the hash of all that decides what is in the file."""
    parts = [
        safe(set_name),
        safe(prompt_id),
        f"a{alpha_text(alpha)}".replace("+", ""),
        f"s{sample}",
    ]
    parts += [f"tier{tier}", *([] if layer is None else [f"layer{layer}"]), model, config]
    return f"{FOLDER}/{'+'.join(parts)}{SUFFIX}"


def config_hash(config: Mapping[str, Any]) -> str:
    text = json.dumps(config, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_CHARS]
