"""What a row has drawn, while it goes on: its tokens, and the text that can no longer change."""

import re
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from lda_core.batch import Row
from lda_core.detokenize import Text, completion_text, decode, first_stop, stop_floor
from lda_core.request import Completion, Request

_HALF = "\ufffd"  # what bytes that are no whole character decode to
_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")


class Settled:
    """The text of a row, token by token, as far as it is settled whatever follows.

    Held back is what may still change: bytes that may become a character or be cut off at the
    end, and all from where a stop string begins or may begin. The parts that `add` and `end` give
    are together the completion's text.

    What is settled of the tokens is never decoded again: only those since the last but one time.
    """

    def __init__(self, tokenizer: Any, request: Request, eos_ids: Collection[int]) -> None:
        self._tokenizer, self._request, self._eos_ids = tokenizer, request, eos_ids
        self._special = frozenset(tokenizer.all_special_ids)
        self._ids: list[int] = []
        self._eos_index: int | None = None
        self._floor: int | None = None  # of stop strings; None: not known yet
        self._text = ""  # of all that is settled token by token
        self._border: int | None = None  # characters of it before the first EOS
        # Of the part before the first EOS, or of that behind it: where it begins, the tokens that
        # `_text` has, and of these the ones that are decoded along with the next.
        self._part = self._done = self._start = 0
        self._sent = ""

    def add(self, token_ids: Sequence[int]) -> str:
        """The row's next tokens -> what more of its text is settled."""
        for token in token_ids:
            self._ids.append(token)
            if self._eos_index is None and token in self._eos_ids:
                self._eos()
            else:
                self._read()
        return self._send(self._safe())

    def end(self, completion: Completion) -> str:
        """The rest of the text of the row that is done."""
        return self._send(completion.text)

    def _send(self, text: str) -> str:
        # Whatever a tokenizer may do, what was sent stays.
        if len(text) <= len(self._sent) or not text.startswith(self._sent):
            return ""
        new, self._sent = text[len(self._sent) :], text
        return new

    def _eos(self) -> None:
        """Nothing that follows changes what stands before it."""
        self._eos_index = len(self._ids) - 1
        self._text += self._fresh(self._ids[self._part : self._eos_index])
        self._border = len(self._text)
        self._part = self._done = self._start = len(self._ids)

    def _read(self) -> None:
        new = self._fresh(self._ids[self._part :])
        if new and not new.endswith(_HALF) and not self._in_bytes():
            self._text += new
            self._start, self._done = self._done, len(self._ids)

    def _fresh(self, part: list[int]) -> str:
        """What all tokens of this part have beyond the text that is there."""
        if self._done == self._part:  # nothing is: as `completion_text` does it
            if self._eos_index is None or self._part <= self._eos_index:
                return completion_text(self._tokenizer, self._request, part, None).text
            return decode(self._tokenizer, part)
        start, done = self._start - self._part, self._done - self._part
        head = decode(self._tokenizer, part[start:done])
        return decode(self._tokenizer, part[start:])[len(head) :]

    def _in_bytes(self) -> bool:
        """Whether the newest token is one byte and may be spoilt, or completed, by the next one.

        Vocabularies with tokens for bytes (<0xE2>) decode a run of them together, and a byte that
        does not fit makes all of the run unreadable. Special tokens do not end it.
        """
        for token in reversed(self._ids[self._part :]):
            if token not in self._special:
                name = self._tokenizer.convert_ids_to_tokens(token)
                return isinstance(name, str) and _BYTE.fullmatch(name) is not None
        return False

    def _safe(self) -> str:
        """The settled text without what may be cut off or become a stop string."""
        request = self._request
        text, border = self._text, self._border
        if not request.stop:
            return text.rstrip(_HALF)
        end = first_stop(Text(text, border), request.stop, self._stop_floor())
        if end is not None:  # the row has ended
            return text[:end].rstrip(_HALF)
        # No stop string reaches across the EOS.
        tail = text[border or 0 :]
        held = max(_may_begin(tail, stop) for stop in request.stop)
        return text[: len(text) - held].rstrip(_HALF)

    def _stop_floor(self) -> int:
        if len(self._ids) <= self._request.min_tokens:
            return len(self._text)  # none counts yet
        if self._floor is None:
            self._floor = stop_floor(self._tokenizer, self._request, self._ids)
        return self._floor


def _may_begin(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is the beginning of `stop`, but not all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


@dataclass
class News:
    """What a row has drawn since it was last asked, and its completion once it is done."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[tuple[float, ...]] = field(default_factory=list)  # three of each token
    top: list[list[tuple[int, float]]] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    completion: Completion | None = None

    def __bool__(self) -> bool:
        return bool(self.token_ids) or self.completion is not None

    def add(self, later: "News") -> None:
        self.token_ids += later.token_ids
        self.logprobs += later.logprobs
        self.top += later.top
        self.kl += later.kl
        self.completion = later.completion or self.completion


class Feed:
    """Takes over what rows draw as it comes, in the engine's thread, for another one to fetch.

    A row that starts again after memory ran out draws the same tokens: those that were taken over
    already are not taken twice.
    """

    def __init__(self, rows: Sequence[Row], wake: Callable[[], None]) -> None:
        """Sets the rows' `on_token`. `wake`: called in the engine's thread once for each step that
        brought news; it must not raise."""
        self._rows, self._wake = rows, wake
        self._taken = [0] * len(rows)
        self._news: deque[dict[int, News]] = deque()
        for row in rows:
            row.on_token = self._take

    def _take(self) -> None:
        fresh: dict[int, News] = {}
        for i, row in enumerate(self._rows):
            at = self._taken[i]
            if at < 0:
                continue
            news = News(row.token_ids[at:], row.logprobs[at:], row.top[at:], row.kl[at:])
            news.completion = row.completion
            if news:
                self._taken[i] = at + len(news.token_ids) if row.completion is None else -1
                fresh[i] = news
        if fresh:
            self._news.append(fresh)
            self._wake()

    def fetch(self) -> dict[int, News]:
        """All news since the last time, by the row's place. For one thread alone, which need not
        be the engine's."""
        found: dict[int, News] = {}
        while self._news:
            for i, news in self._news.popleft().items():
                found.setdefault(i, News()).add(news)
        return found
