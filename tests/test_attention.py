"""Attention over shared prefixes against plain softmax attention, row by row, in float64."""

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from lda_core import Request
from lda_core.attention import CannotShare, shared_prefix_attention
from lda_core.batch import Prefix, Row, _runs
from lda_core.slots import Cursor, Kept, Layout, SlotCache

HEADS, SIZE = 4, 8
PREFIXES = [5, 3, 9]  # their lengths
OF_ROW = [1, 0, 2, 0, 1, 0]  # groups of three, two and one
OWN = [4, 1, 6, 2, 3, 7]  # own columns of each row, the present token's included


class Scene(NamedTuple):
    slots: SlotCache
    query: Tensor  # [R, h, 1, D]
    key: Tensor  # [R, H, W, D]
    value: Tensor
    mask: Tensor
    of_row: list[int]
    seen: list[list[bool]]  # by row: columns it may look at, prefix first


def scene(kv_heads: int, of_row: list[int], window: int | None, prefixes: list[int]) -> Scene:
    generator = torch.Generator().manual_seed(0)
    own, width, longest = OWN[: len(of_row)], max(OWN[: len(of_row)]), max(prefixes)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    probe = DynamicCache()
    probe.update(random(1, kv_heads, 1, SIZE), random(1, kv_heads, 1, SIZE), 0)
    slots = SlotCache(probe, 200)
    layout = Layout(("",), len(of_row) + 1, width + 2, len(prefixes) + 1, longest + 3)
    slots.layout(layout, Kept(0, 0, 0, 0))
    layer = slots.layers[0]
    for x in (layer.keys, layer.values, layer.prefix_keys, layer.prefix_values):
        x.copy_(random(*x.shape))  # also behind the end of each: masked columns hold something
    if of_row == list(range(len(prefixes))):
        runs, place = (), None
    else:
        live = [Prefix((g,)) for g in range(len(prefixes))]
        rows = [Row(Request((1,)), prefix=live[g]) for g in of_row]
        runs, place = _runs(rows, live, 1, False, torch.device("cpu"))
    slots.cursor = Cursor(
        rows=torch.arange(len(of_row)),
        columns=torch.tensor(own) - 1,
        width=width,
        prefixes=len(prefixes),
        prefix_width=longest,
        runs=runs,
        place=place,
    )
    new = random(len(of_row), kv_heads, 1, SIZE), random(len(of_row), kv_heads, 1, SIZE)
    key, value = layer.update(*new)
    for i, columns in enumerate(own):  # the row's new token lies in its last column
        assert torch.equal(key[i, :, columns - 1], new[0][i, :, 0])
    seen = []
    for i, g in enumerate(of_row):
        now = prefixes[g] + own[i] - 1
        positions = [c if c < prefixes[g] else None for c in range(longest)]
        positions += [prefixes[g] + c if c < own[i] else None for c in range(width)]
        seen.append([p is not None and (window is None or p > now - window) for p in positions])
    lowest = torch.finfo(torch.float32).min
    mask = torch.where(torch.tensor(seen), 0.0, lowest)[:, None, None]
    query = random(len(of_row), HEADS, 1, SIZE)
    return Scene(slots, query, key, value, mask, of_row, seen)


def plain(at: Scene, scale: float, softcap: float | None, sinks: Tensor | None) -> Tensor:
    layer, longest = at.slots.layers[0], at.slots.cursor.prefix_width
    result = torch.zeros(len(at.of_row), 1, HEADS, SIZE, dtype=torch.float64)
    repeat = HEADS // at.key.shape[1]
    for i, g in enumerate(at.of_row):
        visible = torch.tensor(at.seen[i])
        for h in range(HEADS):
            kv = h // repeat
            keys, values = (
                torch.cat([shared[g, kv, :longest], own[i, kv]])[visible].double()
                for shared, own in (
                    (layer.prefix_keys, at.key),
                    (layer.prefix_values, at.value),
                )
            )
            scores = scale * (keys @ at.query[i, h, 0].double())
            if softcap is not None:
                scores = softcap * (scores / softcap).tanh()
            weights = scores.exp()
            total = weights.sum() + (0 if sinks is None else sinks[h].double().exp())
            result[i, 0, h] = (weights / total) @ values
    return result


def attend(at: Scene, **options: Any) -> Tensor:
    output, _ = shared_prefix_attention(
        SimpleNamespace(layer_idx=0),  # type: ignore[arg-type]
        at.query,
        at.key,
        at.value,
        at.mask,
        slots=at.slots,
        **options,
    )
    return output


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("of_row", [OF_ROW, [2, 1, 0], [0, 1, 2]])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("more", ["", "softcap", "sinks", "softcap sinks"])
def test_it_is_softmax_attention(
    kv_heads: int, of_row: list[int], window: int | None, more: str
) -> None:
    at = scene(kv_heads, of_row, window, PREFIXES)
    # A cap low enough to bend, sinks of a size that counts, another for each head.
    softcap = 0.8 if "softcap" in more else None
    sinks = torch.linspace(-1.0, 2.0, HEADS) if "sinks" in more else None
    for scale in (None, 0.7):
        output = attend(at, scaling=scale, softcap=softcap, s_aux=sinks)
        expected = plain(at, SIZE**-0.5 if scale is None else scale, softcap, sinks)
        assert output.shape == expected.shape
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


def test_prompts_of_one_token_have_no_prefix() -> None:
    at = scene(2, [0, 0, 0], None, [0])
    torch.testing.assert_close(
        attend(at).double(), plain(at, SIZE**-0.5, None, None), rtol=1e-5, atol=1e-5
    )


def test_a_prefix_of_no_tokens_beside_longer_ones() -> None:
    at = scene(2, OF_ROW, None, [5, 0, 9])
    torch.testing.assert_close(
        attend(at).double(), plain(at, SIZE**-0.5, None, None), rtol=1e-5, atol=1e-5
    )


def test_the_sums_are_in_float32_also_where_the_model_is_in_bfloat16() -> None:
    at = scene(2, OF_ROW, None, PREFIXES)
    layer = at.slots.layers[0]
    for name in ("prefix_keys", "prefix_values"):
        setattr(layer, name, getattr(layer, name).bfloat16())
    lowest = torch.finfo(torch.bfloat16).min
    half = at._replace(
        query=at.query.bfloat16(),
        key=at.key.bfloat16(),
        value=at.value.bfloat16(),
        mask=at.mask.clamp(min=lowest).bfloat16(),
    )
    output = attend(half)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(
        output.double(), plain(half, SIZE**-0.5, None, None), rtol=0.03, atol=0.03
    )


def test_what_cannot_be_shared_says_so_and_a_shared_read_is_counted() -> None:
    at = scene(2, OF_ROW, None, PREFIXES)
    with pytest.raises(CannotShare):
        attend(at._replace(mask=at.mask[..., 1:]))
    for missing in ({"mask": None}, {"slots": None}):
        with pytest.raises(CannotShare):
            attend(at._replace(**missing))  # type: ignore[arg-type]
    assert at.slots.shared_reads == 0
    attend(at)
    assert at.slots.shared_reads == 1


@pytest.mark.parametrize("lanes", [1, 2])
@pytest.mark.parametrize("one_run", [False, True])
@pytest.mark.parametrize("sizes", [[1], [5, 1], [33, 1, 1, 1, 1], [1, 1, 9, 8, 1], [3, 4, 2]])
def test_runs_hold_every_row_once_with_little_padding(
    sizes: list[int], one_run: bool, lanes: int
) -> None:
    live = [Prefix((g,)) for g in range(len(sizes))]
    rows = [Row(Request((1,)), prefix=live[g]) for g, n in enumerate(sizes) for _ in range(n)]
    rows.reverse()
    runs, place = _runs(rows, live, lanes, one_run, torch.device("cpu"))
    if place is None:
        assert sizes == [1]
        return
    gathered = torch.cat([run.gather for run in runs])
    assert gathered[place].tolist() == list(range(len(rows) * lanes))
    # Each row is among those of its own prefix's lane.
    prefix_of = [
        run.start + i // (len(run.gather) // (run.stop - run.start))
        for run in runs
        for i in range(len(run.gather))
    ]
    for row, at in enumerate(place.tolist()):
        prefix = rows[row // lanes].prefix
        assert prefix is not None and prefix_of[at] == live.index(prefix) * lanes + row % lanes
    assert [run.start for run in runs[1:]] == [run.stop for run in runs[:-1]]
    assert len(runs) == 1 if one_run else len(gathered) <= 2 * len(rows) * lanes
