from models import byte_tokenizer

from lda_core import Request
from lda_core.detokenize import Text, completion_text, cut_at_stop, hits_stop

TOKENIZER = byte_tokenizer()
EOS = 2


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text, add_special_tokens=False))


def first_hit(drawn: list[int], *stops: str) -> int | None:
    """After how many tokens a row with these stops would end; EOS ignored."""
    request = Request(tuple(ids("prompt")), stop=stops)
    for n in range(1, len(drawn) + 1):
        eos = drawn.index(EOS) if EOS in drawn[:n] else None
        if hits_stop(TOKENIZER, request, drawn[:n], eos):
            return n
    return None


def test_the_text_before_and_after_the_first_eos() -> None:
    drawn = [*ids("ab"), EOS, *ids("cd"), EOS, *ids("e")]
    text = completion_text(TOKENIZER, Request((5,)), drawn, len(ids("ab")))
    assert text == Text("abcde", 2)


def test_a_stop_is_found_with_its_last_token_and_not_before() -> None:
    drawn = ids("the cat sat 🙂 on the mat")
    for stop in ("cat", "t s", "🙂", "mat", "the"):
        n = first_hit(drawn, stop)
        assert n is not None
        assert stop in TOKENIZER.decode(drawn[:n]) and stop not in TOKENIZER.decode(drawn[: n - 1])
    assert first_hit(drawn, "dog", "cats") is None


def test_a_stop_far_behind_the_beginning() -> None:
    drawn = ids("x" * 300 + "STOP" + "y" * 10)
    n = first_hit(drawn, "STOP")
    assert n is not None and TOKENIZER.decode(drawn[:n]).endswith("STOP")


def test_no_stop_reaches_across_an_eos() -> None:
    drawn = [*ids("ab"), EOS, *ids("cd"), *[EOS] * 30, *ids("ef")]
    assert first_hit(drawn, "bc") is None
    n = first_hit(drawn, "cd")
    assert n is not None and n <= len(ids("ab")) + 1 + len(ids("cd"))
    assert first_hit([*drawn, *ids("gh")], "efgh") is not None


def test_the_cut_keeps_the_eos_offset_only_where_it_lies_before() -> None:
    assert cut_at_stop(Text("abcd", 3), ["b"]) == Text("a", None)
    assert cut_at_stop(Text("abcd", 1), ["c", "d"]) == Text("ab", 1)
    assert cut_at_stop(Text("abcd", None), ["x"]) == Text("abcd", None)
    assert cut_at_stop(Text("abbc", 2), ["bb", "c"]) == Text("abb", 2)
