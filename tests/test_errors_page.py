"""docs/errors.md has a row for everything that can be said."""

import ast
from collections.abc import Iterator

from conftest import ROOT

# Told by themselves where they are caught; nobody sees their names.
INSIDE = {
    "CannotShare",
    "ClientGone",
    "Damaged",
    "InvalidRequest",
    "JobError",
    "LDAError",
    "NotReady",
    "NotStackable",
    "RefusedPrompts",
    "ReplicaDied",
    "ReplicaUnavailable",
    "TooManyValues",
    "_SaidTwice",
}


def trees() -> Iterator[ast.Module]:
    for package in ("deployments", "lda_core", "jobs"):
        for file in sorted((ROOT / package).glob("*.py")):
            yield ast.parse(file.read_text())


def codes() -> set[str]:
    """Literals that are given as a `code`: as such, as the third argument of InvalidRequest,
    Refused and try_later, the second of NotReady, or in a body."""
    found: set[str] = set()

    def add(node: ast.AST | None) -> None:
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)

    place = {"InvalidRequest": 2, "Refused": 2, "try_later": 2, "NotReady": 1}
    for tree in trees():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                at = place.get(getattr(node.func, "id", ""))
                if at is not None and len(node.args) > at:
                    add(node.args[at])
                if at is not None:
                    for keyword in node.keywords:
                        add(keyword.value if keyword.arg == "code" else None)
            elif isinstance(node, ast.Assign):
                if [getattr(target, "id", "") for target in node.targets] == ["code"]:
                    add(node.value)
            elif isinstance(node, ast.Dict):
                for key, value in zip(node.keys, node.values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "code":
                        add(value)
            elif isinstance(node, ast.arguments) and node.defaults:
                defaulted = node.args[-len(node.defaults) :]
                for arg, default in zip(defaulted, node.defaults, strict=True):
                    add(default if arg.arg == "code" else None)
    return found


def errors() -> set[str]:
    """Names of all exception classes, by their bases' names, or their bases' bases'."""
    bases = {
        node.name: {getattr(base, "id", "") for base in node.bases}
        for tree in trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
    }
    builtin = {"Exception", "ValueError", "RuntimeError"}
    found: set[str] = set()
    while more := {n for n, b in bases.items() if b & (builtin | found)} - found:
        found |= more
    return found


def rows() -> list[list[str]]:
    text = (ROOT / "docs" / "errors.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_code_and_every_error_has_a_row_and_every_row_is_one() -> None:
    said = [row[0].strip("`") for row in rows()]
    assert len(set(said)) == len(said)
    assert {"invalid_value", "replicas_died", "queue_full", "starting"} <= codes()
    assert {"invalid_api_key", "body_timeout", "too_many_bodies", "duplicate_key"} <= codes()
    assert "Stopped" in errors() and "DoesNotFitAtAll" in errors()
    assert set(said) == codes() | (errors() - INSIDE)


def test_every_row_says_why_and_what_helps() -> None:
    for row in rows():
        assert all(row[1:-1]) and (row[-1] or row[1].startswith("as `")), row
