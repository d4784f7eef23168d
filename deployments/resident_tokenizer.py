"""What a replica's tokenizer makes of a prompt, and its vocabulary, in the words of the wire."""

from typing import Any

import lda_core
from deployments.schemas import InvalidRequest
from deployments.tokenizer_words import ReadPrompt, ReadRequest, Vocabulary
from lda_core.prompts import decoded
from lda_core.token_bytes import token_bytes


def read(pair: lda_core.ModelPair, request: ReadRequest, context_length: int) -> ReadPrompt:
    """Raises InvalidRequest."""
    ids = request.prompt_ids
    if ids is not None:
        if not all(0 <= token < pair.vocab_size for token in ids):
            message = f"token ids must be between 0 and {pair.vocab_size - 1}"
            raise InvalidRequest("prompt_ids", message)
        text = decoded(pair.tokenizer, ids).text
        return ReadPrompt(text=text, token_ids=ids, context_length=context_length)
    messages = [message.model_dump() for message in request.messages or []]
    try:
        prompt = lda_core.encode(
            pair.tokenizer,
            request.prompt if request.prompt is not None else messages,
            "raw" if request.prompt is not None else "chat",
            allow_special_tokens=request.allow_special_tokens,
        )
    except lda_core.RequestError as error:
        raise InvalidRequest(error.field, error.message, error.code) from None
    text, token_ids = prompt.text, list(prompt.ids)
    if request.prompt is not None and not request.add_special_tokens:
        token_ids = pair.tokenizer.encode(
            text,
            add_special_tokens=False,
            split_special_tokens=not request.allow_special_tokens,
        )
        if not token_ids:
            raise InvalidRequest("prompt", "has no token")
    return ReadPrompt(text=text, token_ids=token_ids, context_length=context_length)


def vocabulary(pair: lda_core.ModelPair) -> Vocabulary:
    tokenizer: Any = pair.tokenizer
    return Vocabulary(
        tokens=token_bytes(tokenizer, pair.vocab_size),
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_ids=sorted(pair.eos_ids),
        chat_template=tokenizer.chat_template,
        tokenizer_class=type(tokenizer).__name__,
    )
