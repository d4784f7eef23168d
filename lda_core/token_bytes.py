"""What each token of a vocabulary stands for in a text: bytes, maybe no whole characters."""

import re
from typing import Any

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")


def token_bytes(tokenizer: Any, size: int) -> list[bytes]:
    """Of the tokens 0 .. size - 1, in the midst of a text; special tokens as they are written.

    What the vocabulary has no token for (padding of the output layer) is empty.
    """
    table = _byte_letters() if _is_byte_level(tokenizer) else None
    written = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    names = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    # Some decoders drop a space at the very beginning, so each token is read behind another one.
    anchor = tokenizer.encode("a", add_special_tokens=False)[-1:]
    head = len(_decode(tokenizer, anchor))

    def of(token: int, name: str | None) -> bytes:
        if name is None:
            return b""
        if token in written:
            return name.encode()
        if table is not None:
            return bytes(table[letter] for letter in name)
        if byte := _BYTE.fullmatch(name):
            return bytes.fromhex(byte[1])
        return _decode(tokenizer, [*anchor, token])[head:].encode()

    return [of(*item) for item in enumerate(names)] + [b""] * (size - len(names))


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text


def _is_byte_level(tokenizer: Any) -> bool:
    """Whether its tokens are written in the alphabet of GPT-2, one letter for each byte."""
    space = tokenizer.convert_tokens_to_ids("Ġ")
    if space is None or space == tokenizer.unk_token_id:
        return False
    return _decode(tokenizer, [space]) == " "


def _byte_letters() -> dict[str, int]:
    """GPT-2's alphabet: bytes that are printable in Latin-1 are themselves, the others come
    behind them from U+0100 on."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in shown]
    letters = {chr(byte): byte for byte in shown}
    return letters | {chr(256 + i): byte for i, byte in enumerate(others)}
