"""A request of the OpenAI API, worked off: prompts read, scored, answered, or streamed.

Sample i of prompt j is drawn with `seed + j * n + i`, as in a native batch, so each is that of a
single request with the seed in its `lda`.
"""

import asyncio
import json
import re
import secrets
import time
import uuid
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from deployments import model_names
from deployments.openai_answers import (
    Heard,
    Tokens,
    chat_logprobs,
    finish_reason,
    lda_words,
    legacy_logprobs,
    prompt_logprobs,
    usage,
)
from deployments.openai_words import ChatRequest, CompletionRequest, OnePrompt
from deployments.resend import together
from deployments.schemas import (
    Completion,
    GenerateRequest,
    InvalidRequest,
    Limits,
    Piece,
    Scored,
    ScoreRequest,
    parse,
)
from deployments.sse import DONE, Begun, EventStream, error_event, event, merged
from deployments.tokenizer_words import ReadPrompt, ReadRequest, Vocabulary


class Service(Protocol):
    """What of a resident pair is needed here."""

    async def generate(self, request: GenerateRequest) -> list[Completion]: ...

    def stream(self, request: GenerateRequest) -> AsyncGenerator[list[Piece], None]: ...

    async def score(self, request: ScoreRequest) -> list[Scored]: ...

    async def read(self, request: ReadRequest) -> ReadPrompt: ...

    async def vocabulary(self) -> Vocabulary: ...


@dataclass(frozen=True)
class Opening:
    """One prompt, ready to be answered. `request`: None where nothing is to be generated. `read`
    and `tokens` (of the prompt, with their log-probabilities) are there where they are needed."""

    request: GenerateRequest | None
    read: ReadPrompt | None
    tokens: Tokens | None

    @property
    def ids(self) -> list[int]:
        assert self.read is not None
        return self.read.token_ids


class Work:
    """One body. Raises InvalidRequest, naming fields as the body does, also while working.

    `service` is the pair that the body's model names among `pairs`.
    """

    def __init__(
        self,
        service: Service,
        limits: Limits,
        body: CompletionRequest | ChatRequest,
        pairs: Sequence[str] = (model_names.DEFAULT,),
    ) -> None:
        body.check()
        self._service, self._limits, self._body = service, limits, body
        self._chat = isinstance(body, ChatRequest)
        self._echo = isinstance(body, CompletionRequest) and body.echo
        # How many of the likeliest tokens are wanted; None: no log-probabilities.
        self._top: int | None
        if isinstance(body, ChatRequest):
            self._top = (body.top_logprobs or 0) if body.logprobs else None
        else:
            self._top = body.logprobs
        self._alpha = model_names.resolve(body.model, body.alpha, pairs).alpha
        self._prompts = body.prompts
        if len(self._prompts) > self._limits.max_batch_prompts:
            most = self._limits.max_batch_prompts
            raise InvalidRequest("prompt", f"has {len(self._prompts)} prompts, at most {most}")
        base = secrets.randbelow(2**52) if body.seed is None else body.seed
        self._seeds = body.seeds(base, len(self._prompts))
        # All of it is looked at before any work.
        most = limits.max_new_tokens if body.new_tokens is None else body.new_tokens or 1
        for j, prompt in enumerate(self._prompts):
            with _Placed(self, prompt):
                self._limits.check(self._request(j, prompt.fields, most))
        self._gate = asyncio.Semaphore(max(1, self._limits.batch_rows_in_flight // body.n))
        kind = "chat.completion" if self._chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind + ".chunk" * (self._chat and body.stream),
            "created": int(time.time()),
            "model": body.model,
        }

    # -- all at once ---------------------------------------------------------------------

    async def answer(self) -> dict[str, Any]:
        vocabulary = await self._service.vocabulary()
        done = await together(*(self._one(j, vocabulary) for j in range(len(self._prompts))))
        choices = [choice for some, _, _ in done for choice in some]
        answer = {
            **self._head,
            "choices": choices,
            "usage": usage(sum(p for _, p, _ in done), sum(c for _, _, c in done)),
        }
        if self._chat:
            # Of the one prompt, so not within a choice: as vLLM does it.
            for name in ("prompt_token_ids", "prompt_logprobs"):
                values = [choice.pop(name) for choice in choices if name in choice]
                answer |= {name: values[0]} if values else {}
        return answer

    async def _one(self, j: int, vocabulary: Vocabulary) -> tuple[list[dict[str, Any]], int, int]:
        """The choices of prompt j, and how many tokens it and they have."""
        n = self._body.n
        async with self._gate:
            with _Placed(self, self._prompts[j]):
                opening = await self._open(j, vocabulary)
                if opening.request is None:
                    choices = [self._choice(j, i, opening, None, vocabulary) for i in range(n)]
                    return choices, len(opening.ids), 0
                done = await self._service.generate(opening.request)
                for completion in done:
                    _need_good(completion)
        choices = [self._choice(j, i, opening, one, vocabulary) for i, one in enumerate(done)]
        return choices, done[0].prompt_tokens, sum(len(one.token_ids) for one in done)

    def _choice(
        self,
        j: int,
        i: int,
        opening: Opening,
        completion: Completion | None,
        vocabulary: Vocabulary,
    ) -> dict[str, Any]:
        body = self._body
        text = "" if completion is None else completion.text
        token_ids = [] if completion is None else completion.token_ids
        choice: dict[str, Any] = {"index": j * body.n + i, "logprobs": None}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            if self._top is not None and completion is not None and completion.logprobs:
                choice["logprobs"] = chat_logprobs(
                    token_ids,
                    completion.logprobs.amplified,
                    completion.top_logprobs,
                    vocabulary,
                )
        else:
            before = self._echoed(opening)
            choice["text"] = before + text
            if self._top is not None:
                drawn = None if completion is None else Tokens.drawn(completion, len(before))
                choice["logprobs"] = self._legacy(opening, drawn, vocabulary)
        choice["finish_reason"] = "length" if completion is None else finish_reason(completion)
        if body.prompt_logprobs is not None and opening.tokens is not None:
            tokens = opening.tokens.with_best(body.prompt_logprobs)
            choice["prompt_logprobs"] = prompt_logprobs(tokens, vocabulary)
        if body.return_token_ids:
            choice |= {"token_ids": token_ids, "prompt_token_ids": opening.ids}
        choice["lda"] = lda_words(
            self._alpha,
            self._seeds[j] + i,
            token_ids,
            None if completion is None else completion.logprobs,
            None if completion is None else completion.kl,
        )
        return choice

    def _legacy(
        self, opening: Opening, drawn: Tokens | None, vocabulary: Vocabulary
    ) -> dict[str, Any]:
        both = [drawn] if drawn is not None else []
        if self._echo and opening.tokens is not None:
            both.insert(0, opening.tokens.with_best(self._top or 0))
        first, *rest = both
        return legacy_logprobs(first + rest[0] if rest else first, vocabulary)

    # -- piece by piece ------------------------------------------------------------------

    async def stream(self) -> EventStream:
        """Raises what the first piece raises; a later failure is the stream's last event."""
        vocabulary = await self._service.vocabulary()
        totals = [0, 0]
        streams = [self._heard(j, vocabulary, totals) for j in range(len(self._prompts))]
        choices = await Begun.of(merged(streams))
        return EventStream(self._events(choices, totals), choices.aclose)

    async def _events(
        self, choices: "Begun[list[dict[str, Any]]]", totals: list[int]
    ) -> AsyncGenerator[str, None]:
        with_usage = {"usage": None} if self._body.include_usage else {}
        try:
            async for some in choices:
                yield "".join(
                    event(json.dumps({**self._head, "choices": [choice], **with_usage}))
                    for choice in some
                )
            if self._body.include_usage:
                yield event(json.dumps({**self._head, "choices": [], "usage": usage(*totals)}))
            yield DONE
        except Exception as error:
            yield error_event(error)

    async def _heard(
        self, j: int, vocabulary: Vocabulary, totals: list[int]
    ) -> AsyncGenerator[list[dict[str, Any]], None]:
        """Choices of chunks about prompt j."""
        body = self._body
        heard = [Heard(self._seeds[j] + i) for i in range(body.n)]
        async with self._gate:
            with _Placed(self, self._prompts[j]):
                opening = await self._open(j, vocabulary)
                if opening.request is None:
                    totals[0] += len(opening.ids)
                    yield [
                        self._chunk(j, i, opening, heard[i], None, vocabulary)
                        for i in range(body.n)
                    ]
                    return
                counted = False
                every = body.return_token_ids or opening.request.logprobs
                async with aclosing(self._service.stream(opening.request)) as stream:
                    async for pieces in stream:
                        for piece in pieces:
                            if piece.completion is not None:
                                _need_good(piece.completion)
                                totals[0] += 0 if counted else piece.completion.prompt_tokens
                                counted = True
                            totals[1] += len(piece.token_ids)
                        yield [
                            self._chunk(j, p.index, opening, heard[p.index], p, vocabulary)
                            for p in pieces
                            if every or p.text or p.completion or not heard[p.index].begun
                        ]

    def _chunk(
        self,
        j: int,
        i: int,
        opening: Opening,
        heard: Heard,
        piece: Piece | None,
        vocabulary: Vocabulary,
    ) -> dict[str, Any]:
        body = self._body
        first, heard.begun = not heard.begun, True
        before = self._echoed(opening) if first else ""
        heard.chars += len(before)
        text, token_ids = ("", []) if piece is None else (piece.text, piece.token_ids)
        done = None if piece is None else piece.completion
        choice: dict[str, Any] = {"index": j * body.n + i, "logprobs": None}
        if self._chat:
            role = {"role": "assistant"} if first else {}
            choice["delta"] = {**role, "content": text}
            if self._top is not None and piece is not None and piece.logprobs:
                choice["logprobs"] = chat_logprobs(
                    token_ids, piece.logprobs.amplified, piece.top_logprobs, vocabulary
                )
        else:
            choice["text"] = before + text
            if self._top is not None:
                drawn = None if piece is None else heard.tokens(piece)
                of = opening if first else Opening(None, None, None)
                choice["logprobs"] = self._legacy(of, drawn, vocabulary)
        heard.chars += len(text)
        choice["finish_reason"] = "length" if piece is None else None
        if done is not None:
            choice["finish_reason"] = finish_reason(done)
        if body.return_token_ids:
            choice["token_ids"] = token_ids
            choice |= {"prompt_token_ids": opening.ids} if first else {}
        logprobs, kl = (None, None) if piece is None else (piece.logprobs, piece.kl)
        choice["lda"] = lda_words(self._alpha, heard.seed, token_ids, logprobs, kl)
        return choice

    def place(self, error: InvalidRequest, prompt: OnePrompt) -> InvalidRequest:
        """The error in the words of the body."""
        body, param = self._body, error.param
        tokens = "max_tokens"
        if isinstance(body, ChatRequest) and body.max_completion_tokens is not None:
            tokens = "max_completion_tokens"
        root = re.split(r"[.\[]", param)[0]
        if root in ("prompt", "prompt_ids", "prompt_format", "continuations", "continuation"):
            param = prompt.param
        elif root == "max_new_tokens":
            param = tokens
        elif root in ("alpha", "grid"):
            param = "model" if body.alpha is None else "alpha"
        elif root == "":
            param = prompt.param
        return InvalidRequest(param, error.message.replace("max_new_tokens", tokens), error.code)

    # -- one prompt ----------------------------------------------------------------------

    def _request(self, j: int, fields: Mapping[str, Any], new_tokens: int) -> GenerateRequest:
        body = self._body
        wanted = self._top is not None or body.lda_logprobs
        return body.generation(
            fields,
            self._alpha,
            self._seeds[j],
            new_tokens,
            logprobs=wanted,
            top_logprobs=self._top or 0,
        )

    async def _open(self, j: int, vocabulary: Vocabulary) -> Opening:
        body, fields = self._body, self._prompts[j].fields
        read, tokens, new_tokens = None, None, body.new_tokens
        scored = body.prompt_logprobs is not None or (self._echo and self._top is not None)
        special = not isinstance(body, CompletionRequest) or body.add_special_tokens
        if scored or self._echo or body.return_token_ids or not special or new_tokens is None:
            read = await self._service.read(
                parse(ReadRequest, {**fields, "add_special_tokens": special})
            )
            fields = {"prompt_ids": read.token_ids}
        if scored and read is not None:
            tokens = await self._scored(read, vocabulary)
        if new_tokens is None and read is not None:
            room = read.context_length - len(read.token_ids)
            new_tokens = max(1, min(self._limits.max_new_tokens, room))
        request = self._request(j, fields, new_tokens) if new_tokens else None
        return Opening(request, read, tokens)

    async def _scored(self, read: ReadPrompt, vocabulary: Vocabulary) -> Tokens:
        ids, scored = read.token_ids, None
        if len(ids) > 1:
            request = {
                "prompt_ids": ids[:1],
                "continuations": [{"token_ids": ids[1:]}],
                "grid": [self._alpha],
                "top": max(self._top or 0, self._body.prompt_logprobs or 0),
            }
            (scored,) = await self._service.score(parse(ScoreRequest, request))
        return Tokens.of_prompt(ids, read.text, scored, vocabulary)

    def _echoed(self, opening: Opening) -> str:
        if not self._echo:
            return ""
        assert opening.read is not None
        return opening.read.text


def _need_good(completion: Completion) -> None:
    if completion.error is not None:
        raise InvalidRequest("prompt", completion.error, "row_failed")


class _Placed:
    """What is refused inside is named by the field of this body that is to blame."""

    def __init__(self, work: Work, prompt: OnePrompt) -> None:
        self._work, self._prompt = work, prompt

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if isinstance(error, InvalidRequest):
            raise self._work.place(error, self._prompt) from None
