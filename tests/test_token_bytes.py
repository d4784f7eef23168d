"""Tokens as bytes: of GPT-2's alphabet, of bytes with names, of words with a mark for the space."""

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from deployments.tokenizer_words import Vocabulary
from lda_core import ModelPair
from lda_core.token_bytes import token_bytes

TEXT = "Hi there, é 🙂\n\n  end"


def like_llama() -> Any:
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "a", "▁Hi", "▁there", ",", "end", "é", "Ġ"]
    core = Tokenizer(
        models.BPE(
            vocab={word: i for i, word in enumerate(words)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
            ignore_merges=True,
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", unk_token="<unk>")


def test_byte_level(tiny_pair: ModelPair) -> None:
    tokenizer = tiny_pair.tokenizer
    found = token_bytes(tokenizer, 770)
    assert len(found) == 770 and found[768:] == [b"", b""]
    assert found[:3] == [b"<pad>", b"<s>", b"</s>"]
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert b"".join(found[token] for token in ids).decode() == TEXT


def test_bytes_with_names_and_words_with_a_mark() -> None:
    tokenizer = like_llama()
    found = token_bytes(tokenizer, len(tokenizer))
    at = tokenizer.convert_tokens_to_ids
    assert found[at("▁Hi")] == b" Hi" and found[at("<0xE2>")] == b"\xe2"
    assert found[at("end")] == b"end" and found[at("Ġ")] == "Ġ".encode()
    assert found[at("<s>")] == b"<s>"


@pytest.mark.parametrize("text", [TEXT, "🙂🙂", "a"])
def test_offsets_are_where_tokens_begin(tiny_pair: ModelPair, text: str) -> None:
    tokenizer = tiny_pair.tokenizer
    vocabulary = Vocabulary(
        tokens=token_bytes(tokenizer, 768), bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        unk_token=None, bos_token_id=1, eos_token_ids=[2], chat_template=None, tokenizer_class="x",
    )  # fmt: skip
    ids = tokenizer.encode(text)
    offsets = vocabulary.offsets(ids, text)
    assert len(offsets) == len(ids) and offsets[:2] == [0, 0] and offsets == sorted(offsets)
    for token, offset in zip(ids[1:], offsets[1:], strict=True):
        shown = vocabulary.text(token)
        assert shown.startswith("bytes:") or text[offset:].startswith(shown)
