"""What the edge of the service lets in: its settings, API keys, and where none are needed."""

import base64
import binascii
import hashlib
import hmac
import ipaddress
import os
import re
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})
MIN_KEY_CHARS = 16

_Count = Annotated[int, Field(ge=1)]


class EdgeError(ValueError):
    """The service must not be started with these settings; the message holds no key."""


class EdgeOptions(BaseModel):
    """Who is let in, and how much of what they send is read; part of the application's config."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys_file: str | None = Field(
        None, description="a file of API keys, a line `name:key` each, that others cannot read"
    )
    keys_file_env: str | None = Field(
        None, description="instead: an environment variable that names that file"
    )
    allow_no_key: bool = Field(
        False, description="listen beyond this machine without keys: something in front asks"
    )
    hosts: list[str] | None = Field(
        None,
        description="names, without port, by which the service may be called besides localhost, "
        "`*` for any; if not given: none, or any where it listens beyond this machine with keys",
    )
    max_in_flight_per_key: _Count | None = Field(
        None, description="requests that one key may have unanswered in each ingress, then 429"
    )
    body_timeout_s: float = Field(20.0, gt=0, description="for the whole of a body, then 408")
    max_body_bytes: _Count = Field(32 * 2**20, description="of one body, then 413")
    max_bodies: _Count = Field(4096, description="being read at once by one ingress, then 429")
    max_bodies_bytes: _Count = Field(
        512 * 2**20,
        description="of all bodies of one ingress together, those up to 64 KiB not counted; "
        "then 429",
    )
    max_json_depth: Annotated[int, Field(ge=1, le=128)] = 64
    max_json_values: _Count = Field(2_000_000, description="in one body, then 413")
    max_headers: _Count = Field(100, description="then 431")
    max_headers_bytes: _Count = Field(32 * 2**10, description="names and values, then 431")

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.keys_file is not None and self.keys_file_env is not None:
            raise ValueError("give at most one of keys_file and keys_file_env")
        return self

    @property
    def asks_for_key(self) -> bool:
        return self.keys_file is not None or self.keys_file_env is not None

    def read_keys(self) -> dict[str, str]:
        """By their names; none where none are asked for. Raises EdgeError."""
        path = self.keys_file
        if self.keys_file_env is not None and not (path := os.environ.get(self.keys_file_env)):
            raise EdgeError(f"edge.keys_file_env: {self.keys_file_env} names no file")
        return {} if path is None else read_keys(Path(path))

    def allowed_hosts(self, listening: str | None) -> frozenset[str] | None:
        """The names that a Host header may hold; None: any."""
        if self.hosts is None:
            beyond = not is_loopback(listening)
            return None if beyond and self.asks_for_key else LOOPBACK_HOSTS
        return None if "*" in self.hosts else LOOPBACK_HOSTS | {h.lower() for h in self.hosts}

    def require_keys_beyond_loopback(self, listening: str | None) -> None:
        """Raises EdgeError where anyone in the network could use the service."""
        if not (is_loopback(listening) or self.asks_for_key or self.allow_no_key):
            raise EdgeError(
                f"http_options.host is {listening}: whoever reaches it could use this service. "
                "Give edge.keys_file, listen on 127.0.0.1, or set edge.allow_no_key where "
                "something in front of it asks for a key"
            )


def is_loopback(host: str | None) -> bool:
    """None: not listening at all."""
    if host is None or host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: Path) -> dict[str, str]:
    """Raises EdgeError naming the line, never what is in it."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & (stat.S_IROTH | stat.S_IWOTH):
                raise EdgeError(f"{path}: everyone may read or write it; chmod o-rw it")
            lines = file.read().decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        said = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise EdgeError(f"{path}: {said}") from None
    keys: dict[str, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        name, colon, key = (part.strip() for part in line.partition(":"))
        if not colon or not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
            raise EdgeError(f"{path}:{number}: not NAME:KEY, with letters, digits, . _ - as name")
        if not re.fullmatch(rf"[!-~]{{{MIN_KEY_CHARS},}}", key):
            raise EdgeError(
                f"{path}:{number}: a key has at least {MIN_KEY_CHARS} ASCII characters, no blanks"
            )
        if name in keys or key in keys.values():
            raise EdgeError(f"{path}:{number}: a name, or a key, for the second time")
        keys[name] = key
    if not keys:
        raise EdgeError(f"{path}: no keys in it")
    return keys


class Keys:
    """Digests only: no key stays in memory, where a dump or a message could show it."""

    def __init__(self, keys: Mapping[str, str]) -> None:
        self._digests = {n: hashlib.sha256(key.encode()).digest() for n, key in keys.items()}

    def name_of(self, headers: Iterable[tuple[bytes, bytes]]) -> str | None:
        """Whose key the request carries: as a bearer, as x-api-key, or as Basic's password,
        for which browsers ask by themselves."""
        found = None
        for key in _presented(headers):
            given = hashlib.sha256(key).digest()
            for name, digest in self._digests.items():  # all of them: its time tells nothing
                if hmac.compare_digest(given, digest):
                    found = name
        return found


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[bytes]:
    for name, value in headers:
        if name == b"x-api-key":
            yield value.strip()
        elif name == b"authorization":
            scheme, _, rest = value.strip().partition(b" ")
            if scheme.lower() == b"bearer":
                yield rest.strip()
            elif scheme.lower() == b"basic":
                try:
                    yield base64.b64decode(rest.strip(), validate=True).partition(b":")[2]
                except binascii.Error:
                    continue
