import pytest
from models import byte_tokenizer

from lda_core import Prompt, RequestError, encode
from lda_core.prompts import decoded

TEMPLATE = (
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def with_template():  # type: ignore[no-untyped-def]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def test_the_three_forms() -> None:
    tokenizer = with_template()
    assert encode(tokenizer, "Hi").text == "Hi"
    assert encode(tokenizer, "Hi", "alpaca").text == "### Instruction:\nHi\n\n### Response:\n"
    assert encode(tokenizer, "Hi", "alpaca", "Be kind.").text == (
        "### Instruction:\nBe kind.\n\n### Input:\nHi\n\n### Response:\n"
    )
    assert encode(tokenizer, "Hi", "chat", "Be kind.").text == (
        "<s>system: Be kind.\n<s>user: Hi\nassistant: "
    )
    messages = [{"role": "user", "content": "Hi"}]
    assert encode(tokenizer, messages, "chat").text == "<s>user: Hi\nassistant: "


@pytest.mark.parametrize("prompt", ["", "Hi", "Two\nlines "])
def test_an_open_prompt_ends_where_the_model_goes_on(prompt: str) -> None:
    tokenizer = with_template()
    if prompt:
        assert encode(tokenizer, prompt, open_end=True) == encode(tokenizer, prompt)
    text = encode(tokenizer, prompt, "alpaca", open_end=True).text
    assert text == f"### Instruction:\n{prompt}"
    text = encode(tokenizer, prompt, "alpaca", "Be kind.", open_end=True).text
    assert text == f"### Instruction:\nBe kind.\n\n### Input:\n{prompt}"
    opened = encode(tokenizer, prompt, "chat", open_end=True)
    assert opened.text == f"<s>user: {prompt}"
    assert opened.ids[0] == 1 and opened.ids.count(1) == 1


def test_messages_cannot_be_open() -> None:
    with pytest.raises(RequestError, match="open_prompt"):
        encode(with_template(), [{"role": "user", "content": "Hi"}], "chat", open_end=True)


def test_the_template_writes_its_own_special_tokens() -> None:
    ids = encode(with_template(), "Hi", "chat").ids
    assert ids[0] == 1 and ids.count(1) == 1


@pytest.mark.parametrize("text", ["a</s>b", "<s>", "x<pad>"])
def test_special_token_text_is_plain_text_unless_asked_for(text: str) -> None:
    tokenizer = with_template()
    assert not {0, 1, 2} & set(encode(tokenizer, text).ids)
    assert {0, 1, 2} & set(encode(tokenizer, text, allow_special_tokens=True).ids)
    assert not {0, 1, 2} & set(encode(tokenizer, text).ids)  # it does not stick
    with pytest.raises(RequestError, match="prompt: .* special token"):
        encode(tokenizer, text, "chat")
    with pytest.raises(RequestError, match=r"messages\[0\].content: .* special token"):
        encode(tokenizer, [{"role": "user", "content": text}], "chat")
    assert encode(tokenizer, text, "chat", allow_special_tokens=True).ids


@pytest.mark.parametrize(
    "text", ["\x00", "שלום", "e\u0301 🙂 🏳️‍🌈", "\u202eabc", " leading", "tab\tand\nline", "日本"]
)
def test_any_text_survives(text: str) -> None:
    tokenizer = with_template()
    ids = encode(tokenizer, text).ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


def test_what_is_refused() -> None:
    plain, chat = byte_tokenizer(), with_template()
    with pytest.raises(RequestError, match="prompt_format: .*no chat template"):
        encode(plain, "Hi", "chat")
    with pytest.raises(RequestError, match="messages: need prompt_format chat"):
        encode(chat, [{"role": "user", "content": "Hi"}])
    with pytest.raises(RequestError, match="system_prompt"):
        encode(chat, "Hi", "raw", "Be kind.")
    with pytest.raises(RequestError, match="prompt: has no token"):
        encode(chat, "")
    chat.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match="messages: .*roles must alternate"):
        encode(chat, "Hi", "chat")


def test_a_prompt_in_tokens_is_shown_without_its_bos() -> None:
    tokenizer = byte_tokenizer()
    ids = [1, *tokenizer.encode("Hi ", add_special_tokens=False), 2, 1]
    assert decoded(tokenizer, ids) == Prompt("Hi </s><s>", tuple(ids))
    assert decoded(tokenizer, ids[1:]).text == "Hi </s><s>"
    assert decoded(tokenizer, [1]).text == ""
