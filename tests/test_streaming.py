"""Text while it comes: the parts are the completion's text, and none is ever taken back."""

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models import byte_tokenizer, random_pair
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from lda_core import Completion, Engine, EngineConfig, ModelPair, Request
from lda_core.batch import Row
from lda_core.draw import Draw
from lda_core.streaming import Feed, News, Settled

EOS = 2


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama's: a run of byte tokens is decoded together, a space in front is dropped."""
    words = ["▁", "▁the", "▁cat", "a", "b", "the", "cat", "é", "🙂", "\ufffd", ".", "STOP", "▁ST"]
    vocab = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words]
    tokenizer = Tokenizer(
        models.BPE({word: i for i, word in enumerate(vocab)}, [], byte_fallback=True)
    )
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    """Of both kinds of tokenizers."""
    pair = random_pair()
    return [Engine(pair), Engine(ModelPair.of(pair.after, pair.before, byte_fallback_tokenizer()))]


def drawn(token: int) -> Draw:
    return Draw([token], [], [False], [], [], [], [], [])


def finished(engine: Engine, request: Request, ids: list[int]) -> Completion:
    """What the engine makes of a row that draws these tokens."""
    row = Row(request)
    for token in ids:
        if engine._take(row, drawn(token), 0):
            break
    assert row.completion is not None
    return row.completion


TEXTS = ["the cat 🙂 sat", "naïve 東京 the mat", "👩\u200d👩\u200d👧 and the hat", "\ufffd the"]
BYTES = "🙂東é\u200d".encode()


def random_ids(engine: Engine, rng: random.Random, n: int) -> list[int]:
    """Half characters, broken ones, special tokens, words, texts."""
    tokenizer = engine.pair.tokenizer
    fallback = "<0x00>" in tokenizer.get_vocab()
    kinds = rng.choices(range(4), k=2)  # of this row
    ids: list[int] = []
    while len(ids) < n:
        kind = rng.choice(kinds)
        if kind == 0:
            ids.append(rng.randrange(len(tokenizer)))
        elif kind == 1 and fallback:
            start = rng.randrange(len(BYTES))
            ids += [3 + b for b in BYTES[start : start + rng.randrange(1, 6)]]
        elif kind == 1 or (kind == 2 and not fallback):
            part = tokenizer.encode(rng.choice(TEXTS), add_special_tokens=False)
            ids += part[rng.randrange(len(part)) :]
        elif kind == 2:
            ids.append(rng.randrange(259, len(tokenizer)))
        else:
            ids += [rng.choice((0, 1, EOS))] * rng.randrange(1, 3)
    return ids[:n]


def random_request(engine: Engine, rng: random.Random, ids: list[int], n: int) -> Request:
    """Stops out of the text that comes, and its neighbours."""
    text = engine.pair.tokenizer.decode(ids, skip_special_tokens=True)
    stops = []
    for _ in range(rng.choice((0, 1, 3))):
        at = rng.randrange(len(text) + 1)
        stops.append(text[at : at + rng.randrange(1, 6)] + rng.choice(("", "", "q")) or "the")
    return Request(
        tuple(random_ids(engine, rng, rng.randrange(1, 6))),
        max_new_tokens=n,
        stop=tuple(stops),
        ignore_eos=rng.random() < 0.6,
        min_tokens=rng.choice((0, 0, rng.randrange(n))),
    )


@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("block", range(5))
def test_the_parts_are_the_text_wherever_a_row_ends(
    engines: list[Engine], kind: int, block: int
) -> None:
    engine = engines[kind]
    tokenizer, eos_ids = engine.pair.tokenizer, engine.pair.eos_ids
    early = reasons = 0
    for case in range(300):
        rng = random.Random(10_000 * block + case)
        n = rng.randrange(1, 20)
        ids = random_ids(engine, rng, n)
        request = random_request(engine, rng, ids, n)
        if request.min_tokens:  # no EOS is drawn among these
            ids = [5 if i < request.min_tokens and t == EOS else t for i, t in enumerate(ids)]
        last = finished(engine, request, ids)
        ids = last.token_ids
        settled = Settled(tokenizer, request, eos_ids)
        sent = [""]
        for token in ids:
            sent.append(sent[-1] + settled.add([token]))
        words = (case, request, ids)
        for cut in range(1, len(ids) + 1):
            fewest = min(request.min_tokens, cut)
            shorter = replace(request, max_new_tokens=cut, min_tokens=fewest)
            done = finished(engine, shorter, ids)
            for text in sent[: cut + 1]:
                assert done.text.startswith(text), (cut, text, done.text, *words)
            # However many tokens come at once.
            again, parts, at = Settled(tokenizer, shorter, eos_ids), "", 0
            while at < cut:
                step = rng.randrange(1, 5)
                parts += again.add(ids[at : min(cut, at + step)])
                at += step
            assert parts == sent[cut], words
            assert parts + again.end(done) == done.text, words
        early += len(sent[-1]) > 0
        reasons += last.finish_reason == "stop"
    assert early > 100 and reasons > 20


def test_text_comes_as_soon_as_it_is_settled(engines: list[Engine]) -> None:
    """Held back is no more than needed."""

    def parts(kind: int, ids: list[int], *stop: str) -> list[str]:
        pair = engines[kind].pair
        settled = Settled(pair.tokenizer, Request((5,), stop=stop), pair.eos_ids)
        return [settled.add([token]) for token in ids]

    tokenizer = engines[0].pair.tokenizer
    ids = tokenizer.encode("a🙂b", add_special_tokens=False)
    assert parts(0, ids) == ["a", "", "", "", "🙂", "b"]
    ids = tokenizer.encode("xSTx", add_special_tokens=False)
    assert parts(0, ids, "STOP") == ["x", "", "", "STx"]
    assert parts(0, ids, "STOP", "Tx") == ["x", "", "", "S"]
    # A row of bytes: what spoils it may come with the next one.
    names = engines[1].pair.tokenizer.convert_tokens_to_ids
    assert parts(1, names(["▁the", "<0x41>", "<0xE2>", "a", "b"])) == [
        " the",
        "",
        "",
        "\ufffd\ufffda",
        "b",
    ]
    assert parts(1, names(["<0xC3>", "<0xA9>", "</s>"])) == ["", "", "é"]


def test_a_tokenizer_that_changes_its_mind_is_never_contradicted() -> None:
    settled = Settled(byte_tokenizer(), Request((5,)), {EOS})
    ids = byte_tokenizer().encode("the cat", add_special_tokens=False)
    text = settled.add(ids)
    fields: dict[str, Any] = dict.fromkeys(("eos_index", "eos_text_offset"))
    other = Completion("THE CAT AND", ids, "length", **fields, seed=0, alpha=1.0, prompt_tokens=1)
    assert text == "the cat" and settled.end(other) == ""


def test_every_step_says_so_and_rows_that_start_again_are_not_told_twice() -> None:
    """Memory for three rows at a time, whatever is tried; the news are fetched now and then."""
    pair = random_pair()
    engine = Engine(pair, EngineConfig(max_slots=6))
    decode, calls = engine._pair.decode, itertools.count()

    def small(step: Any, *args: Any) -> Any:
        if len(step.tokens) > 3 and next(calls) > 4:
            raise torch.OutOfMemoryError("injected")
        return decode(step, *args)

    wanted = [
        Request(
            (5, 6 + i), 1.0, seed=i, max_new_tokens=14, ignore_eos=True, top_logprobs=2, kl=True
        )
        for i in range(8)
    ]
    engine._pair.decode = small  # type: ignore[method-assign]
    rows = [engine.accept(request) for request in wanted]
    woken = [0, 0]

    def waker(which: int) -> Callable[[], None]:
        def wake() -> None:
            woken[which] += 1

        return wake

    feeds = [Feed(rows[:3], waker(0)), Feed(rows[3:], waker(1))]
    for row in rows:
        engine.enqueue(row)
    found = [News() for _ in rows]
    settled = [Settled(pair.tokenizer, row.request, pair.eos_ids) for row in rows]
    texts = [""] * 8
    rng = random.Random(1)
    steps = 0
    while not engine.idle:
        engine.step()
        steps += 1
        for first, feed in zip((0, 3), feeds, strict=True):
            if rng.random() < 0.4 or engine.idle:
                for i, news in feed.fetch().items():
                    found[first + i].add(news)
                    texts[first + i] += settled[first + i].add(news.token_ids)
    assert engine.stats.out_of_memory > 1
    for i, row in enumerate(rows):
        done = row.completion
        assert done is not None and found[i].completion is done
        assert found[i].token_ids == done.token_ids and len(done.token_ids) == 14
        assert len(found[i].kl) == len(found[i].top) == len(found[i].logprobs) == 14
        assert texts[i] + settled[i].end(done) == done.text
    assert 14 <= woken[0] <= steps and 14 <= woken[1] <= steps


def test_a_row_that_leaves_or_never_came_in_has_no_news() -> None:
    engine = Engine(random_pair(), EngineConfig(max_slots=1))
    rows = [engine.accept(Request((5,), max_new_tokens=9, ignore_eos=True)) for _ in range(2)]
    feed = Feed(rows, lambda: None)
    for row in rows:
        engine.enqueue(row)
    engine.step()
    rows[0].left = rows[1].left = True
    engine.step()
    ((which, news),) = feed.fetch().items()
    assert which == 0 and len(news.token_ids) == 1 and news.completion is None
    assert not feed.fetch()
