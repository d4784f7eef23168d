"""Words about the tokenizer. Needs pydantic only.

The door has no tokenizer: it asks a replica to read a prompt, and once for the whole vocabulary.
The bodies of /tokenize, /detokenize and /tokenizer_info are vLLM's.
"""

from functools import cached_property
from typing import Annotated, Self

from pydantic import BaseModel, Field, model_validator

from deployments.schemas import Message, Text, TokenId, TokenIds, Wire


class ReadRequest(Wire):
    """A prompt in one of three forms, to be seen as the model reads it."""

    prompt: Annotated[Text, Field(min_length=1)] | None = None
    messages: list[Message] | None = None
    prompt_ids: TokenIds | None = None
    add_special_tokens: bool = True
    allow_special_tokens: bool = False


class ReadPrompt(Wire):
    """`text` has no BOS in front; `context_length` is what prompt and answer must fit in."""

    text: str
    token_ids: list[int]
    context_length: int


class Vocabulary(Wire):
    """`tokens`: the bytes of each token that both models have, by its id."""

    tokens: list[bytes]
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    bos_token_id: int | None
    eos_token_ids: list[int]
    chat_template: str | None
    tokenizer_class: str

    @cached_property
    def special(self) -> frozenset[int]:
        """Tokens that are no text."""
        found = {self.bos_token_id, *self.eos_token_ids}
        return frozenset(token for token in found if token is not None)

    def text(self, token: int) -> str:
        """One token; one that is no whole character as `bytes:\\xe2\\x80`, as OpenAI does it."""
        try:
            return self.tokens[token].decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.tokens[token])

    def offsets(self, token_ids: list[int], text: str) -> list[int]:
        """Where in `text`, the text of all these tokens, each of them begins, in characters."""
        so_far, offsets, longest = b"", [], len(text)
        for token in token_ids:
            offsets.append(min(len(so_far.decode(errors="ignore")), longest))
            if token not in self.special:
                so_far += self.tokens[token]
                if so_far[:1] == b" " and text[:1] != " ":  # the space that some put in front
                    so_far = so_far[1:]
        return offsets


class TokenizeRequest(Wire):
    """One of prompt and messages. Text of special tokens is read as special tokens here, as
    vLLM does it; in a prompt to be answered only with allow_special_tokens."""

    model: Text = "lda"
    prompt: Text | None = None
    messages: Annotated[list[Message], Field(fail_fast=True, min_length=1)] | None = None
    add_special_tokens: bool | None = Field(
        None, description="default: true for a prompt; messages have those of the template"
    )
    allow_special_tokens: bool = True
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give exactly one of prompt and messages")
        if self.messages is not None and self.add_special_tokens:
            raise ValueError("add_special_tokens must be false with messages")
        return self


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class DetokenizeRequest(Wire):
    model: Text = "lda"
    tokens: Annotated[list[TokenId], Field(fail_fast=True)]


class DetokenizeAnswer(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    tokenizer_class: str
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    bos_token_id: int | None
    eos_token_ids: list[int]
    vocab_size: int
    chat_template: str | None
