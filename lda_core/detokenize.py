"""From drawn tokens to text: where the EOS was, where a stop string ends it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lda_core.request import Request


class Text(NamedTuple):
    text: str
    eos_offset: int | None  # characters of `text` before the first EOS


def decode(tokenizer: Any, token_ids: Sequence[int]) -> str:
    text: str = tokenizer.decode(
        list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text


def completion_text(
    tokenizer: Any, request: Request, token_ids: Sequence[int], eos_index: int | None
) -> Text:
    """Text of the drawn tokens without the prompt.

    Some tokenizers drop a leading space or join bytes across tokens, so the end of the prompt
    is decoded along and taken off again. What stands after the first EOS is decoded by itself.
    """
    context = list(request.prompt_ids[-4:])
    first = token_ids if eos_index is None else token_ids[:eos_index]
    head, whole = decode(tokenizer, context), decode(tokenizer, [*context, *first])
    text = whole[len(head) :] if whole.startswith(head) else decode(tokenizer, first)
    if eos_index is None:
        return Text(text, None)
    return Text(text + decode(tokenizer, token_ids[eos_index + 1 :]), len(text))


def hits_stop(
    tokenizer: Any, request: Request, token_ids: Sequence[int], eos_index: int | None
) -> bool:
    """Whether the newest token completes a stop string, also across token borders.

    First only a tail is decoded: a character is at most four tokens (bytes), so this many reach
    back beyond the start of any stop that ends in the newest token.
    """
    tail = token_ids[-(4 * max(map(len, request.stop)) + 4) :]
    if eos_index is None and len(tail) < len(token_ids):
        end = decode(tokenizer, tail)
        if not any(stop in end for stop in request.stop):
            return False
    text = completion_text(tokenizer, request, token_ids, eos_index)
    return _first_stop(text, request.stop) is not None


def cut_at_stop(text: Text, stops: Sequence[str]) -> Text:
    """The text up to where the first stop string begins."""
    end = _first_stop(text, stops)
    if end is None:
        return text
    offset = text.eos_offset
    return Text(text.text[:end], offset if offset is None or offset <= end else None)


def _first_stop(text: Text, stops: Sequence[str]) -> int | None:
    """Where the first stop string begins; none reaches across the EOS, which is not text."""
    border = len(text.text) if text.eos_offset is None else text.eos_offset
    found = [text.text.find(stop, 0, border) for stop in stops]
    found += [text.text.find(stop, border) for stop in stops]
    return min((at for at in found if at >= 0), default=None)
