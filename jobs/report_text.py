"""How the report says numbers and shows texts: pure functions, the same in tables and charts."""

import math
import unicodedata
from decimal import Decimal

NOTHING = "–"  # where there is no number


def visible(text: str) -> str:
    """`text` with every character that would not be seen, or would move others, made visible.

    Controls, invisible and bidirectional marks, lone surrogates and line separators become
    pictures or code points, because a model's output must neither hide nor reorder anything
    on the page. Line feeds and tabs stay.
    """
    return "".join(map(_visible, text)) if not text.isascii() or not text.isprintable() else text


def _visible(character: str) -> str:
    if character in "\n\t" or unicodedata.category(character)[0] in "LMNPS":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return character if unicodedata.category(character) == "Zs" else f"‹U+{code:04X}›"


def number(value: float | None, digits: int = 3) -> str:
    """`digits` significant ones, never as a power of ten unless very small or very large."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    text = f"{value:.{digits}g}"
    if value == 0 or 1e-4 <= abs(value) < 1e6:
        text = f"{Decimal(text):f}"
    return text.replace("-", "−")


def percent(share: float | None) -> str:
    """Two significant digits below 10 %, one decimal above; nothing after an exact 0 or 100."""
    if share is None or not math.isfinite(share):
        return NOTHING
    value = 100 * share
    if value in (0, 100):
        return f"{value:.0f} %"
    return f"{value:.1f} %" if value >= 9.95 else f"{Decimal(f'{value:#.2g}'):f} %"


def nats(value: float) -> str:
    return f"{value:.3f}".replace("-", "−") if math.isfinite(value) else number(value)


def interval(low: float | None, high: float | None) -> str:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return NOTHING
    return f"{percent(low)} to {percent(high)}"


def p_value(p: float | None) -> str:
    if p is None or math.isnan(p):
        return NOTHING
    return "< 0.0001" if p < 1e-4 else number(p, 2)


def alpha_name(alpha: float) -> str:
    meaning = {-1.0: " (before)", 0.0: " (after)"}.get(alpha, "")
    return number(alpha, 6) + meaning
