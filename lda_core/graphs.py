"""Decode steps recorded once as CUDA graphs and replayed: one launch instead of thousands.

A graph has fixed shapes and addresses, so a step is padded to the next bucket of rows and columns
and copied into the tensors its graph was recorded with. Padding rows decode token 0 at column 0
of a free slot and are cut off. On a CPU nothing is recorded, but all else is the same.

Shapes: B rows, G prefixes, n rows of the largest prefix; b, g, m their buckets.
"""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lda_core.model_runner import StepInput
from lda_core.request import Role
from lda_core.slots import Layout, Run

Logits = dict[Role, Tensor]
# Columns come in steps of this many, rows and prefixes in powers of 2.
_COLUMNS = 64
# A graph keeps its activations; beyond so many all are recorded anew.
_MOST = 64


class StepGraphs:
    """Recorded decode steps, by shape, layout and models."""

    def __init__(self, device: torch.device) -> None:
        # All graphs in one memory pool: they run one after the other.
        self._record = (
            partial(_record, pool=torch.cuda.graph_pool_handle())
            if device.type == "cuda"
            else _call_again
        )
        self._graphs: dict[Hashable, tuple[StepInput, Callable[[], None], Logits]] = {}

    def clear(self) -> None:
        """Gives their memory back."""
        self._graphs.clear()

    def __call__(
        self,
        step: StepInput,
        layout: Layout,
        lanes: int,
        kind: Hashable,
        run: Callable[[StepInput], Logits],
    ) -> Logits:
        """What `run(step)` returns. `kind`: what else `run` depends on."""
        rows = len(step.tokens)
        step = padded(step, layout, lanes)
        sizes = tuple(len(x) for x in _tensors(step))
        key = (sizes, step.width, step.prefix_count, step.prefix_width, layout, kind)
        if key not in self._graphs:
            if len(self._graphs) >= _MOST:
                self._graphs.clear()
            static = _copy(step)
            self._graphs[key] = (static, *self._record(lambda: run(static)))
        static, replay, logits = self._graphs[key]
        for target, source in zip(_tensors(static), _tensors(step), strict=True):
            target.copy_(source)
        replay()
        return {role: x[:rows] for role, x in logits.items()}


def padded(step: StepInput, layout: Layout, lanes: int) -> StepInput:
    """The step, of one run, with b rows, g prefixes of m rows, and columns of the next bucket."""
    rows = len(step.tokens)
    b = min(layout.slots, _power(rows))
    step = step._replace(
        tokens=_pad(step.tokens, b),
        positions=_pad(step.positions, b),
        prefixes=_pad(step.prefixes, b),
        width=min(layout.columns, _up(step.width)),
    )
    if not step.prefix_count:
        return step
    lanes_rows = torch.arange(rows * lanes, device=step.tokens.device)
    runs, place = step.runs, step.place
    if place is None:
        runs, place = (Run(0, rows * lanes, lanes_rows),), lanes_rows
    ((_, count, gather),) = runs
    n = len(gather) // count
    g, m = min(layout.prefixes, _power(step.prefix_count)), min(b, _power(n))
    wide = gather.new_zeros(g * lanes, m)
    wide[:count, :n] = gather.view(-1, n)
    return step._replace(
        prefix_count=g,
        prefix_width=min(layout.prefix_columns, _up(step.prefix_width)),
        runs=(Run(0, g * lanes, wide.flatten()),),
        place=_pad(place // n * m + place % n, b * lanes),
    )


def _copy(step: StepInput) -> StepInput:
    return step._replace(
        tokens=step.tokens.clone(),
        positions=step.positions.clone(),
        prefixes=step.prefixes.clone(),
        runs=tuple(run._replace(gather=run.gather.clone()) for run in step.runs),
        place=None if step.place is None else step.place.clone(),
    )


def _tensors(step: StepInput) -> list[Tensor]:
    gathers = [run.gather for run in step.runs]
    return [*(x for x in step if isinstance(x, Tensor)), *gathers]


def _pad(x: Tensor, length: int) -> Tensor:
    return torch.cat([x, x.new_zeros(length - len(x))])


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _up(n: int) -> int:
    return -(-n // _COLUMNS) * _COLUMNS


def _record(run: Callable[[], Logits], pool: Any) -> tuple[Callable[[], None], Logits]:
    """Records `run` on the current device. It must do the same when it is done again."""
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # the warm-up that recording asks for: lazy set-ups happen here
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        logits = run()
    return graph.replay, logits


def _call_again(run: Callable[[], Logits]) -> tuple[Callable[[], None], Logits]:
    """On a CPU: the step itself is what is replayed, into the same tensors."""
    logits = run()

    def replay() -> None:
        for role, x in run().items():
            logits[role].copy_(x)

    return replay, logits
