"""From drawn tokens to text: where the EOS was, where a stop string ends it, which token ends
where."""

from collections.abc import Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from lda_core.request import Request

_HALF = "\ufffd"  # what bytes that are no whole character decode to


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


class Pieces(dict[int, str]):
    """The text of each token alone, decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        self[token] = text = decode(self.tokenizer, [token])
        return text


def token_ends(
    pieces: Pieces,
    request: Request,
    token_ids: Sequence[int],
    eos_index: int | None,
    text: str,
) -> list[int]:
    """How many characters of a row's final `text` are settled once each of its tokens is drawn.

    A character whose bytes come with several tokens is settled with the last of them, and bytes
    that are none with what follows them, or the EOS. All of the text with the last token.
    """
    tokenizer, context = pieces.tokenizer, list(request.prompt_ids[-4:])
    first = list(token_ids if eos_index is None else token_ids[:eos_index])
    head, whole = decode(tokenizer, context), decode(tokenizer, [*context, *first])
    if not whole.startswith(head):  # as in `completion_text`
        head, context, whole = "", [], decode(tokenizer, first)
    ends = _ends(pieces, context, first, whole[len(head) :])
    if eos_index is not None:
        at, rest = len(whole) - len(head), list(token_ids[eos_index + 1 :])
        ends.append(at)
        ends += [at + end for end in _ends(pieces, [], rest, decode(tokenizer, rest))]
    ends = [min(end, len(text)) for end in ends]
    ends[-1:] = [len(text)] * bool(ends)
    return ends


def _ends(pieces: Pieces, context: list[int], drawn: list[int], text: str) -> list[int]:
    """For each drawn token how much of `text`, that of all of them, is settled with it."""
    for how in (_by_pieces, _by_windows):
        found = how(pieces, context, drawn)
        # A tail of half a character belongs to no token yet.
        if found and text.startswith(found.text) and not text[len(found.text) :].strip(_HALF):
            return found.ends
    return _by_prefixes(pieces.tokenizer, context, drawn, text)


class _Ends(NamedTuple):
    ends: list[int]
    text: str  # up to the last end


def _by_pieces(pieces: Pieces, context: list[int], drawn: list[int]) -> _Ends | None:
    """Tokens one by one, each of whole characters: most are, and nothing is decoded twice."""
    ends, text = [], ""
    for token in drawn:
        text += pieces[token]
        ends.append(len(text))
    # Half characters may have come together.
    return None if _HALF in text else _Ends(ends, text)


def _by_windows(pieces: Pieces, context: list[int], drawn: list[int]) -> _Ends:
    """What each token adds to the few before it, back to the start of the last settled one: some
    tokenizers drop a space at the very beginning."""
    tokenizer, ids = pieces.tokenizer, [*context, *drawn]
    start, settled = 0, len(context)  # of the window; tokens whose text is settled
    head = decode(tokenizer, ids[:settled])
    ends, text = [], ""
    for stop in range(settled + 1, len(ids) + 1):
        window = decode(tokenizer, ids[start:stop])
        if len(window) > len(head) and not window.endswith(_HALF):
            text += window[len(head) :]
            start, settled = settled, stop
            head = decode(tokenizer, ids[start:settled])
        ends.append(len(text))
    return _Ends(ends, text)


def _by_prefixes(tokenizer: Any, context: list[int], drawn: list[int], text: str) -> list[int]:
    """By the definition: every prefix decoded, and what it has in common with all later ones."""
    head = len(decode(tokenizer, context))
    ends: list[int] = []
    least = len(text)
    for stop in range(len(drawn), 0, -1):
        prefix = decode(tokenizer, [*context, *drawn[:stop]])[head:].rstrip(_HALF)
        least = min(least, len(commonprefix([prefix, text])))
        ends.append(least)
    return ends[::-1]


def hits_stop(
    tokenizer: Any, request: Request, token_ids: Sequence[int], eos_index: int | None
) -> bool:
    """Whether the newest token completes a stop string, also across token borders.

    First only a tail is decoded: a character is at most four tokens (bytes), so this many reach
    back beyond the start of any stop that ends in the newest token.
    """
    if len(token_ids) <= request.min_tokens:
        return False
    tail = token_ids[-(4 * max(map(len, request.stop)) + 4) :]
    if eos_index is None and len(tail) < len(token_ids):
        end = decode(tokenizer, tail)
        if not any(stop in end for stop in request.stop):
            return False
    text = completion_text(tokenizer, request, token_ids, eos_index)
    floor = stop_floor(tokenizer, request, token_ids)
    return first_stop(text, request.stop, floor) is not None


def stop_floor(tokenizer: Any, request: Request, token_ids: Sequence[int]) -> int:
    """Characters of a row's text beyond which a stop string must end: those of its first
    min_tokens tokens, among which there is no EOS."""
    if not request.min_tokens:
        return 0
    first = token_ids[: request.min_tokens]
    return len(completion_text(tokenizer, request, first, None).text.rstrip(_HALF))


def cut_at_stop(text: Text, stops: Sequence[str], floor: int = 0) -> Text:
    """The text up to where the first stop string begins; see `stop_floor`."""
    end = first_stop(text, stops, floor)
    if end is None:
        return text
    offset = text.eos_offset
    return Text(text.text[:end], offset if offset is None or offset <= end else None)


def first_stop(text: Text, stops: Sequence[str], floor: int = 0) -> int | None:
    """Where the first stop string begins; none reaches across the EOS, which is not text."""
    border = len(text.text) if text.eos_offset is None else text.eos_offset
    starts = [max(0, floor + 1 - len(stop)) for stop in stops]
    found = [text.text.find(stop, at, border) for stop, at in zip(stops, starts, strict=True)]
    found += [text.text.find(stop, max(border, floor + 1 - len(stop))) for stop in stops]
    return min((at for at in found if at >= 0), default=None)
