"""/tokenize, /detokenize and /tokenizer_info, with vLLM's words; a part of the ingress."""

from typing import Any

from fastapi import APIRouter

from deployments import model_names
from deployments.resident_pairs import ResidentPair, ResidentPairs
from deployments.schemas import InvalidRequest, Limits
from deployments.tokenizer_words import (
    DetokenizeAnswer,
    DetokenizeRequest,
    ReadRequest,
    TokenizeAnswer,
    TokenizeRequest,
    TokenizerInfo,
)

router = APIRouter()


class TokenizerRoutes:
    _pairs: ResidentPairs
    _limits: Limits

    def _named(self, model: str) -> ResidentPair:
        """The pair of a model's name; raises InvalidRequest."""
        return self._pairs.of(model_names.resolve(model, None, self._pairs.names).pair)

    @router.post("/tokenize")
    async def tokenize(self, body: TokenizeRequest) -> TokenizeAnswer:
        """A prompt, or messages, in tokens."""
        pair = self._named(body.model)
        texts = [body.prompt or "", *(message.content for message in body.messages or [])]
        if (chars := sum(map(len, texts))) > self._limits.max_prompt_chars:
            raise InvalidRequest(
                "prompt" if body.messages is None else "messages",
                f"has {chars} characters, at most {self._limits.max_prompt_chars} are allowed",
            )
        # An empty prompt has at most a BOS: what stands before any other one.
        wanted: dict[str, Any] = {"prompt": body.prompt or "a", "messages": None}
        if body.messages is not None:
            wanted = {"messages": body.messages}
        read = await pair.read(
            ReadRequest(
                **wanted,
                add_special_tokens=body.add_special_tokens is not False,
                allow_special_tokens=body.allow_special_tokens,
            )
        )
        vocabulary, tokens = await pair.vocabulary(), read.token_ids
        if body.prompt == "":
            first = tokens[:1]
            tokens = first if first and first[0] == vocabulary.bos_token_id else []
        return TokenizeAnswer(
            count=len(tokens),
            max_model_len=read.context_length,
            tokens=tokens,
            token_strs=[vocabulary.text(t) for t in tokens] if body.return_token_strs else None,
        )

    @router.post("/detokenize")
    async def detokenize(self, body: DetokenizeRequest) -> DetokenizeAnswer:
        """Tokens as text, special ones as they are written."""
        pair = self._named(body.model)
        tokens = body.tokens
        if len(tokens) > self._limits.max_prompt_chars:
            most = self._limits.max_prompt_chars
            raise InvalidRequest("tokens", f"has {len(tokens)} tokens, at most {most} are allowed")
        if not tokens:
            return DetokenizeAnswer(prompt="")
        try:
            text = (await pair.read(ReadRequest(prompt_ids=tokens))).text
        except InvalidRequest as error:
            raise InvalidRequest("tokens", error.message, error.code) from None
        vocabulary = await pair.vocabulary()
        if tokens[0] == vocabulary.bos_token_id:
            text = (vocabulary.bos_token or "") + text
        return DetokenizeAnswer(prompt=text)

    @router.get("/tokenizer_info")
    async def tokenizer_info(self, model: str = model_names.DEFAULT) -> TokenizerInfo:
        vocabulary = await self._named(model).vocabulary()
        fields = vocabulary.model_dump(exclude={"tokens"})
        return TokenizerInfo(**fields, vocab_size=len(vocabulary.tokens))
