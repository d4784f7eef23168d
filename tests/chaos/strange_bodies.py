"""Bodies for a route by its schema: good ones, and ones with something wrong in them."""

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

from hypothesis import strategies as st

Schema = dict[str, Any]
Strategy = st.SearchStrategy[Any]
Draw = Callable[[Strategy], Any]

_LARGE = "1e400 is no float"  # written as the number that JSON allows and Python reads as infinite
PROMPTS = ("prompt", "prompt_ids", "messages", "open_prompt")  # one of them, where none is required
LENGTHS = ("max_new_tokens", "max_tokens")
# What no field expects.
STRANGE = (
    *(
        None,
        True,
        False,
        "",
        "\0",
        "a\0b",
        "\ud800",
        "\u202e",
        "\U0001f9ff" * 3,
        "</s>",
        "2",
        "NaN",
    ),
    *("' OR 1=1 --", "../../etc/passwd", "{{7*7}}", "NaN", "\x1b[31m", "a" * 5000, "\r\nX: y"),
    *(0, -1, 1, 768, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400, 1e-320, -0.0, 1.5, 1e308),
    *(float("nan"), float("inf"), float("-inf"), _LARGE),
    *([], {}, [[]], [None], {"": None}, [1, "a", {}], [0] * 300, {"$ref": "#"}, [[["a"]]]),
)
strange: Strategy = st.sampled_from(STRANGE).map(deepcopy)
whole: Strategy = st.integers(0, 8) | st.integers() | st.integers(-(2**70), 2**70)
real: Strategy = st.floats(0, 2) | st.floats(allow_nan=False, allow_infinity=False)
text: Strategy = st.text(max_size=20) | st.sampled_from(["Hi", "What is 2 plus 2?", "raw", "lda"])


def values(schema: Schema, root: Schema, depth: int = 0) -> Strategy:
    """What the schema allows, most of it; bounds are kept where they are small."""
    if "$ref" in schema:
        resolved = root
        for part in schema["$ref"].removeprefix("#/").split("/"):
            resolved = resolved[part]
        return values(resolved, root, depth)
    if options := schema.get("anyOf") or schema.get("oneOf"):
        return st.one_of([values(option, root, depth) for option in options])
    if "const" in schema:
        return st.just(schema["const"])
    if schema.get("enum"):
        return st.sampled_from(schema["enum"])
    kind = schema.get("type")
    if kind == "object":
        return objects(schema, root, depth)
    if kind == "array":
        items = values(schema.get("items", {}), root, depth + 1)
        least = schema.get("minItems", 0)
        return st.lists(items, min_size=least, max_size=max(least, 3))
    if kind == "string":
        return text.filter(lambda s: len(s) >= schema.get("minLength", 0))
    if kind == "integer":
        low = int(schema.get("minimum", 0))
        return st.integers(low, low + 6)
    if kind == "number":
        low = float(schema.get("minimum", schema.get("ge", schema.get("gt", -2.0))))
        return st.floats(low, low + 1.5, exclude_min="gt" in schema)
    return st.booleans() if kind == "boolean" else st.none() if kind == "null" else strange


def objects(schema: Schema, root: Schema, depth: int = 0) -> Strategy:
    fields = {
        name: values(of, root, depth + 1) for name, of in schema.get("properties", {}).items()
    }
    # Always said: what is accepted is then soon done.
    required = [name for name in (*schema.get("required", []), *LENGTHS) if name in fields]
    prompts = [name for name in PROMPTS if name in fields and name not in required]
    others = sorted(fields.keys() - set(required) - set(prompts))

    @st.composite
    def one(draw: Draw) -> dict[str, Any]:
        # Few of the others at a time: where all are there, some exclude each other.
        some = draw(st.lists(st.sampled_from(others), max_size=5)) if others else []
        if prompts:
            some += draw(st.sampled_from([[name] for name in prompts] + [[], prompts[:2]]))
        return {name: draw(fields[name]) for name in [*required, *some]}

    return one()


def spoiled(good: Strategy) -> Strategy:
    """One place of the body changed, left out or added."""

    @st.composite
    def one(draw: Draw) -> Any:
        body = deepcopy(draw(good))  # parts of it may be the schema's own, for all bodies to come
        places = list(_places(body))
        how = draw(st.sampled_from(["change", "leave out", "unknown", "whole"]))
        if how == "whole" or not places:
            return draw(strange)
        holder, key = draw(st.sampled_from(places))
        if how == "unknown" and isinstance(holder, dict):
            holder[draw(st.sampled_from(["aplha", "", "\0", "__proto__", "x" * 300]))] = 1
        elif how == "leave out":
            del holder[key]
        else:
            holder[key] = draw(strange | whole | real | text)
        return body

    return one()


def _places(value: Any) -> Any:
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def encoded(body: Any) -> bytes:
    said = json.dumps(body)  # NaN and Infinity as they are, half characters as \\ud800
    return said.replace(json.dumps(_LARGE), "1e400").encode("ascii")


def damaged(good: Strategy) -> Strategy:
    """Bytes that are no JSON, or hardly."""

    @st.composite
    def one(draw: Draw) -> bytes:
        content = encoded(draw(good))
        at = draw(st.integers(0, len(content)))
        how = draw(st.sampled_from(["cut", "nul", "bytes", "twice", "deep", "raw", "empty", "utf"]))
        return {
            "cut": content[:at],
            "nul": content[:at] + b"\0" + content[at:],
            "bytes": content[:at] + draw(st.binary(max_size=8)) + content[at:],
            "twice": content + content,
            "deep": b'{"prompt": ' + b"[" * draw(st.sampled_from([100, 5_000, 100_000])),
            "raw": draw(st.binary(max_size=60)),
            "empty": b"",
            "utf": content.decode().encode(
                draw(st.sampled_from(["utf-16", "utf-32", "utf-8-sig"]))
            ),
        }[how]

    return one()


def requests(openapi: Schema) -> Strategy:
    """(method, path, content, headers) for every route of the document."""
    each: list[Strategy] = []
    for path, methods in openapi["paths"].items():
        for method, route in methods.items():
            if path == "/metrics":
                continue  # it asks the cluster's nodes
            if "requestBody" not in route:
                names = [p["name"] for p in route.get("parameters", [])]
                params = st.fixed_dictionaries({}, optional={n: words for n in names})
                each.append(st.tuples(st.just((method, path)), params.map(_query)))
                continue
            schema = route["requestBody"]["content"]["application/json"]["schema"]
            good = values(schema, openapi)
            bodies = good.map(encoded) | spoiled(good).map(encoded) | damaged(good)
            # More often than the routes that only tell: they do the work.
            each += [st.tuples(st.just((method, path)), bodies)] * 3
    return st.tuples(st.one_of(each), content_types)


def _query(params: dict[str, str]) -> dict[str, str]:
    return {name: value.encode("utf-8", "replace").decode() for name, value in params.items()}


encodings: Strategy = st.sampled_from(["utf-16", "utf-32", "utf-8-sig"])
words: Strategy = text | st.sampled_from([s for s in STRANGE if isinstance(s, str)])
content_types: Strategy = st.sampled_from(
    [{"content-type": "application/json"}] * 12
    + [{}, {"content-type": "text/plain"}, {"content-type": "application/json; charset=utf-16"}]
    + [{"content-type": "application/json", "content-encoding": "gzip"}]
)
