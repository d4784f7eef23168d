"""Steering: a direction added to the residual stream of a row while it decodes.

Added to one layer's output at every position from the prompt's last token on; what comes before
is read unsteered, so that rows share their prompt whatever they are steered by. Source: Turner et
al. 2023, "Activation addition" (arXiv:2308.10248).

Shapes: B rows, D hidden size, m lanes (2 where one model computes both of a stacked pair).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lda_core.request import Request, Role


class Push(NamedTuple):
    """What is added to one layer's output in one model: nothing to rows that are not steered."""

    role: Role
    layer: int
    added: Tensor  # (B, D) float32


def pushes(requests: Sequence[Request], device: torch.device) -> tuple[Push, ...]:
    """Of all rows of a batch; empty where none is steered."""
    places: dict[tuple[Role, int], dict[int, Tensor]] = {}
    made: dict[int, Tensor] = {}  # samples of one request share theirs
    for row, request in enumerate(requests):
        if request.steer is not None:
            steer = request.steer
            if id(steer) not in made:
                vector = torch.tensor(steer.vector, dtype=torch.float64)
                made[id(steer)] = (steer.coefficient * vector / vector.norm()).float()
            for role in steer.roles:
                places.setdefault((role, steer.layer), {})[row] = made[id(steer)]
    found = []
    for (role, layer), rows in sorted(places.items()):
        size = len(next(iter(rows.values())))
        added = torch.zeros(len(requests), size)
        for row, vector in rows.items():
            added[row] = vector
        found.append(Push(role, layer, added.to(device)))
    return tuple(found)


@contextmanager
def pushed(layers: nn.ModuleList, wanted: Sequence[Push], lanes: Sequence[Role]) -> Iterator[None]:
    """Within it these decoder layers add to the rows [B * m, T, D] of the lanes that they name."""

    def hook_of(push: Push) -> Any:
        lane, m = lanes.index(push.role), len(lanes)

        def hook(layer: nn.Module, inputs: Any, output: Any) -> Any:
            states = (output[0] if isinstance(output, tuple) else output).clone()
            states[lane::m] += push.added.to(states).unsqueeze(1)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    with ExitStack() as stack:
        for push in wanted:
            # In front of other hooks: a shared trunk keeps what leaves its last layer.
            handle = layers[push.layer].register_forward_hook(hook_of(push), prepend=True)
            stack.callback(handle.remove)
        yield
