"""Prompt forms: raw text, the Alpaca form, the tokenizer's own chat template. None is guessed."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from jinja2 import TemplateError

from lda_core.errors import RequestError

PromptFormat = Literal["raw", "alpaca", "chat"]


class Prompt(NamedTuple):
    text: str  # as the model reads it, without the BOS that the tokenizer puts in front
    ids: tuple[int, ...]


# Stands for the end of an open prompt while a template is filled in; no template changes it.
_END = "\u2063end-of-open-prompt\u2063"

_HOLDS_SPECIAL = "holds the text of a special token; set allow_special_tokens to send it"


def alpaca(prompt: str, system_prompt: str | None = None) -> str:
    if system_prompt is None:
        return f"### Instruction:\n{prompt}\n\n### Response:\n"
    return f"### Instruction:\n{system_prompt}\n\n### Input:\n{prompt}\n\n### Response:\n"


def encode(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, str]],
    prompt_format: PromptFormat = "raw",
    system_prompt: str | None = None,
    allow_special_tokens: bool = False,
    *,
    open_end: bool = False,
    prefill: str = "",
) -> Prompt:
    """`prompt` is a text, or for "chat" also a list of {"role", "content"}.

    `prefill`: what the answer begins with, put behind the form; the model goes on from there.

    `open_end`: the model goes on writing the prompt itself, which may be empty: what the form
    puts behind it is left out.

    Special-token text inside a prompt ("</s>") is plain text unless allow_special_tokens; in a
    chat, where template and contents are read together, it is refused instead.

    Raises RequestError: chat without a template, one that refuses the messages or fails, special
    tokens in a chat, a system prompt in a raw prompt, a prompt without any token.
    """
    if open_end:
        if not isinstance(prompt, str):
            raise RequestError("open_prompt", "must be text")
        if prefill:
            raise RequestError("prefill", "cannot follow a prompt that is open")
        prompt += _END
    if prompt_format == "chat":
        text = _chat(tokenizer, prompt, system_prompt, allow_special_tokens)
        if not allow_special_tokens and any(s in prefill for s in tokenizer.all_special_tokens):
            raise RequestError("prefill", _HOLDS_SPECIAL)
        text = text.partition(_END)[0] if open_end else text + prefill
        # The template writes its special tokens itself.
        ids = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=False)
    else:
        if not isinstance(prompt, str):
            raise RequestError("messages", "need prompt_format chat")
        if prompt_format == "raw" and system_prompt is not None:
            raise RequestError("system_prompt", "needs prompt_format alpaca or chat")
        text = alpaca(prompt, system_prompt) if prompt_format == "alpaca" else prompt
        text = text.partition(_END)[0] if open_end else text + prefill
        ids = tokenizer.encode(text, split_special_tokens=not allow_special_tokens)
    if not ids:
        raise RequestError("prompt", "has no token")
    return Prompt(text, tuple(ids))


def decoded(tokenizer: Any, ids: Sequence[int]) -> Prompt:
    """A prompt that came in tokens, which must be of the vocabulary; its text shows all special
    ones but the BOS in front."""
    bos = ids[0] == tokenizer.bos_token_id
    text = tokenizer.decode(
        list(ids[bos:]), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return Prompt(text, tuple(ids))


def _chat(
    tokenizer: Any,
    prompt: str | Sequence[Mapping[str, str]],
    system_prompt: str | None,
    allow_special_tokens: bool,
) -> str:
    if not tokenizer.chat_template:
        raise RequestError("prompt_format", "chat: this tokenizer has no chat template")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [*prompt]
    if system_prompt is not None:
        messages = [{"role": "system", "content": system_prompt}, *messages]
    if not allow_special_tokens:
        for i, message in enumerate(messages):
            if any(special in message["content"] for special in tokenizer.all_special_tokens):
                raise RequestError(
                    "prompt" if isinstance(prompt, str) else f"messages[{i}].content",
                    _HOLDS_SPECIAL,
                )
    try:
        text: str = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
    except TemplateError as error:
        raise RequestError("messages", f"the chat template refuses them: {error}") from None
    except Exception as error:  # its arithmetic, or a range that the sandbox forbids
        reason = type(error).__name__
        raise RequestError("messages", f"the chat template fails ({reason})") from None
    return text
