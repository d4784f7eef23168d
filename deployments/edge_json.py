"""What is refused of a JSON body before anything is built of it: depth, number, keys said twice.

A body that is no JSON at all is let pass: the route's own answer says so.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Container
from typing import Any

from deployments.schemas import InvalidRequest

# One pass without going back, also over a string that never ends: `"?`.
_STRINGS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)
# Up to where so many of them end. What is done with all at once holds the interpreter: seconds.
_SOME = re.compile(rb'(?:[^"]*+"(?:[^"\\]++|\\.)*+"?){1,20000}+', re.DOTALL)
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{},"))
MAX_KEYS = 10_000  # of one object: those that are not known are each an error
_ONE_KIND = bytes.maketrans(b"{}", b"[]")


class TooManyValues(Exception):
    """They would take far more memory than their text."""


class _SaidTwice(Exception):
    pass


def check_json(
    body: bytes, max_depth: int, max_values: int, known: Callable[[], Container[str]]
) -> None:
    """Raises InvalidRequest or TooManyValues. `known`: the names that a message may repeat."""
    # By whatever other encoding json.loads would find, it would read other JSON than is seen here.
    if json.detect_encoding(body) not in ("utf-8", "utf-8-sig"):
        raise _not_utf8()
    # At most two strings for each value. More are not even taken out, which holds the interpreter.
    if body.count(b'"') - body.count(b'\\"') > 4 * (max_values + 1):
        raise TooManyValues
    structure = _structure(body)
    if structure.count(b",") + structure.count(b"[") > max_values:
        raise TooManyValues
    if _depth(structure.replace(b",", b""), max_depth) > max_depth:
        raise InvalidRequest("", f"nested deeper than {max_depth} levels", "nested_too_deeply")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise _not_utf8() from None
    try:
        json.loads(text, object_pairs_hook=_distinct)
    except _SaidTwice as twice:
        (key,) = twice.args
        param = key if key in known() else ""
        raise InvalidRequest(param, "a key is given more than once", "duplicate_key") from None
    except (json.JSONDecodeError, RecursionError):
        pass
    except ValueError:  # of Python's integers
        raise InvalidRequest("", "a number has too many digits", "invalid_json") from None


def _structure(body: bytes) -> bytes:
    """Its `[`, `]` and commas outside of strings; objects as if they were lists."""
    parts, at = [], 0
    while at < len(body):
        some = _SOME.match(body, at)
        end = some.end() if some else len(body)
        outside = _STRINGS.sub(b"", body[at:end])
        parts.append(outside.translate(_ONE_KIND, _NOT_STRUCTURE))
        at = end
    return b"".join(parts)


def _not_utf8() -> InvalidRequest:
    return InvalidRequest("", "the body is not UTF-8", "invalid_json")


def _depth(brackets: bytes, most: int) -> int:
    """Of `[` and `]`, without recursion: each pass takes the innermost level away. Beyond `most`
    it only says that it is beyond. What is left unclosed counts as deep as it is."""
    for level in range(most + 1):
        less = brackets.replace(b"[]", b"")
        if len(less) == len(brackets):
            return level + brackets.count(b"[")
        brackets = less
    return most + 1


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise TooManyValues
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise _SaidTwice(next(key for key, count in counts.items() if count > 1))
    return found
