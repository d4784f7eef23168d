import json

import pytest
from models import byte_tokenizer
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from lda_core import IncompatibleTokenizers
from lda_core.vocabulary import compare, require_same


def changed(change):  # type: ignore[no-untyped-def]
    """byte_tokenizer() with its JSON edited by `change`."""
    state = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    change(state)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )


def test_one_vocabulary() -> None:
    result = compare(byte_tokenizer(), byte_tokenizer(), 320)
    assert result.difference is None and result.notices == []


def test_the_first_differing_token_is_named() -> None:
    def swap(state):  # type: ignore[no-untyped-def]
        vocab = state["model"]["vocab"]
        vocab["a"], vocab["b"] = vocab["b"], vocab["a"]

    first = min(byte_tokenizer().get_vocab()[c] for c in "ab")
    with pytest.raises(IncompatibleTokenizers, match=f"token {first}: 'a' in after, 'b' in before"):
        require_same(byte_tokenizer(), changed(swap), 320)


def test_differing_merges_are_named() -> None:
    def swap(state):  # type: ignore[no-untyped-def]
        merges = state["model"]["merges"]
        merges[3], merges[4] = merges[4], merges[3]

    with pytest.raises(IncompatibleTokenizers, match="merge 3: .* in after, .* in before"):
        require_same(byte_tokenizer(), changed(swap), 320)
    with pytest.raises(IncompatibleTokenizers, match=r"merges: \d+ in after, \d+ in before"):
        require_same(byte_tokenizer(), changed(lambda s: s["model"]["merges"].pop()), 320)


def test_differing_special_tokens_are_named() -> None:
    def plain(state):  # type: ignore[no-untyped-def]
        state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] != "<pad>"]

    other = changed(plain)
    other.add_special_tokens({"additional_special_tokens": ["the"]})
    with pytest.raises(IncompatibleTokenizers, match=r"special token \d+: None in after, 'the'"):
        require_same(byte_tokenizer(), other, 320)


def test_a_token_added_beyond_the_common_part_is_a_notice() -> None:
    padded, size = byte_tokenizer(), len(byte_tokenizer())
    padded.add_special_tokens({"additional_special_tokens": ["[PAD]"]})
    result = compare(padded, byte_tokenizer(), size)
    assert result.difference is None
    assert result.notices == [
        f"after names 1 tokens from id {size} on that the other model has no output for; "
        "they are never drawn and refused in prompts"
    ]
    assert (result.size_after, result.size_before) == (size + 1, size)
    # The same token inside the common part is a difference.
    assert compare(padded, byte_tokenizer(), size + 1).difference == (
        f"token {size}: '[PAD]' in after, None in before"
    )


def test_another_eos_is_a_notice() -> None:
    other = byte_tokenizer()
    other.eos_token = "<pad>"
    assert "eos_token: '</s>' in after, '<pad>' in before" in (
        compare(byte_tokenizer(), other, 320).notices
    )
