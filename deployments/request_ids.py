"""The id of the request that is being answered: in its answer, in its log lines."""

import re
import uuid
from contextvars import ContextVar

HEADER = "x-request-id"
_GOOD = re.compile(r"[A-Za-z0-9._-]{1,64}")
_current: ContextVar[str | None] = ContextVar("request_id", default=None)


def is_good(asked: str | None) -> bool:
    return asked is not None and _GOOD.fullmatch(asked) is not None


def begin(asked: str | None) -> str:
    """The client's own id where it is harmless, else a new one; from here on it is the current."""
    request_id = asked if asked and is_good(asked) else uuid.uuid4().hex
    _current.set(request_id)
    return request_id


def current() -> str:
    """Of the request that this code runs for; a new one outside of any."""
    return _current.get() or uuid.uuid4().hex
