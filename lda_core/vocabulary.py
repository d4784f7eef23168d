"""Whether two tokenizers are one vocabulary; if not, the first difference."""

import json
from typing import Any, NamedTuple

from lda_core.errors import IncompatibleTokenizers


class Comparison(NamedTuple):
    """`difference` None: one vocabulary (on the ids both models have). `notices`: harmless."""

    difference: str | None
    notices: list[str]
    size_after: int
    size_before: int


def compare(after: Any, before: Any, common: int) -> Comparison:
    """Compares the part of two tokenizers that names ids below `common`.

    `common` is the width of the narrower output layer: ids beyond it are never drawn, so a
    token that only one tokenizer has up there (a padding token added in fine-tuning) is a
    notice. Looks at the vocabulary map, the special tokens and the merges.
    """
    sizes = len(after), len(before)
    vocab_a, vocab_b = (_by_id(t.get_vocab()) for t in (after, before))
    notices = []
    for name, vocab in (("after", vocab_a), ("before", vocab_b)):
        beyond = sorted(i for i in vocab if i >= common)
        if beyond:
            notices.append(
                f"{name} names {len(beyond)} tokens from id {beyond[0]} on that the other "
                "model has no output for; they are never drawn and refused in prompts"
            )
    for role in ("bos_token", "eos_token", "pad_token", "unk_token"):
        ours, theirs = getattr(after, role), getattr(before, role)
        if ours != theirs:
            notices.append(f"{role}: {ours!r} in after, {theirs!r} in before")
    difference = (
        _first_difference("token", vocab_a, vocab_b, common)
        or _first_difference("special token", _specials(after), _specials(before), common)
        or _merges_difference(_merges(after), _merges(before))
    )
    return Comparison(difference, notices, *sizes)


def require_same(after: Any, before: Any, common: int) -> Comparison:
    """`compare`, but raises IncompatibleTokenizers with the first difference."""
    result = compare(after, before, common)
    if result.difference:
        raise IncompatibleTokenizers(result.difference)
    return result


def _by_id(vocab: dict[str, int]) -> dict[int, str]:
    return {i: token for token, i in vocab.items()}


def _specials(tokenizer: Any) -> dict[int, str]:
    return {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}


def _first_difference(
    what: str, after: dict[int, str], before: dict[int, str], common: int
) -> str | None:
    differing = (i for i in after.keys() | before.keys() if after.get(i) != before.get(i))
    first = min((i for i in differing if i < common), default=None)
    if first is None:
        return None
    return f"{what} {first}: {after.get(first)!r} in after, {before.get(first)!r} in before"


def _merges(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return []
    merges: list[Any] = json.loads(backend.to_str())["model"].get("merges") or []
    return merges


def _merges_difference(after: list[Any], before: list[Any]) -> str | None:
    for i, (ours, theirs) in enumerate(zip(after, before, strict=False)):
        if ours != theirs:
            return f"merge {i}: {ours} in after, {theirs} in before"
    if len(after) != len(before):
        return f"merges: {len(after)} in after, {len(before)} in before"
    return None
