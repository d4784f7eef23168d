"""Hooks on one model's layers, and what they keep of each pass.

Projections and norms are made on the device, inside the hooks: the residual stream itself leaves
it only where it is asked for.

Shapes: R rows the model sees, t tokens of a pass, L layers watched, K directions, D hidden size.
"""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lda_core.capture_points import Part, attention_of, inside_of, layers_of, mid_of

INPUT, MID, OUTPUT = range(3)  # the points of a layer, in this order
POINTS = 3


@dataclass(frozen=True, eq=False)
class Recording:
    """What is wanted of a pass.

    Attributes:
      layers: whose residual stream is watched.
      vectors: unit vectors (K, all layers, D) in float32.
      weights: (R, all tokens) of the tokens whose mean is wanted.
      raw: the residual stream itself.
      inside: the layer of which attention and MLP are wanted, too.
    """

    layers: range
    vectors: Tensor | None = None
    weights: Tensor | None = None
    raw: bool = False
    inside: int | None = None


class Recorder:
    """Of one model. `watching` has the hooks on it; then `take` after each pass."""

    def __init__(self, model: PreTrainedModel, wanted: Recording) -> None:
        self._model = model
        self._wanted = wanted
        self._start = 0  # first column of the pass
        self._shape: tuple[int, int] = (0, 0)  # (R, t) of the pass
        self._input: Tensor | None = None  # of the layer that is at work
        self._found: defaultdict[str, list[Tensor]] = defaultdict(list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Within it the hooks are there, and attention gives its weights if they are wanted."""
        wanted, layers = self._wanted, layers_of(self._model)
        with ExitStack() as stack:
            for i in wanted.layers:
                layer: nn.Module = layers[i]
                mid = mid_of(self._model, layer)
                hook = partial(self._enter, i)
                stack.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
                if mid.how == "input":
                    middle = mid.module.register_forward_pre_hook(partial(self._middle, i))
                else:
                    middle = mid.module.register_forward_hook(partial(self._add, i))
                stack.callback(middle.remove)
                stack.callback(layer.register_forward_hook(partial(self._leave, i)).remove)
            if wanted.inside is not None:
                self._watch_inside(layers[wanted.inside], stack)
            yield

    def _watch_inside(self, layer: nn.Module, stack: ExitStack) -> None:
        # Only eager attention gives its weights; they are one layer's at a time.
        config: Any = self._model.config
        stack.callback(setattr, config, "_attn_implementation", config._attn_implementation)
        config._attn_implementation = "eager"
        inside = inside_of(self._model, layer)
        for module, name, part in inside.projections:
            hook = module.register_forward_hook(partial(self._projected, name, part))
            stack.callback(hook.remove)
        stack.callback(inside.down.register_forward_hook(self._down).remove)
        attention = attention_of(self._model, layer)
        stack.callback(attention.register_forward_hook(self._attended).remove)

    def take(self) -> dict[str, Tensor]:
        """Of the pass just done, on the CPU: `norms` (R, t, L, 3), `scores` (R, t, L, 3, K),
        `residual` (R, t, L, 3, D), of one layer `q`, `k`, `v`, `mlp_up`, `mlp_activation`,
        `mlp_down` (R, t, ...) and `attention` (R, heads, t, columns so far); `mean` is this pass's
        share of it (R, L, 3, D)."""
        found, self._found = self._found, defaultdict(list)
        self._start += self._shape[1]
        self._input = None
        taken: dict[str, Tensor] = {}
        for name, values in found.items():
            if name in ("norms", "scores", "residual", "mean"):
                at = 1 if name == "mean" else 2
                device = values[0].device  # layers may be on several
                joined = torch.stack([x.to(device) for x in values], dim=at)
                shape = (*joined.shape[:at], -1, POINTS, *joined.shape[at + 1 :])
                taken[name] = joined.view(shape).cpu()
            else:
                (taken[name],) = values
        return taken

    # -- hooks -------------------------------------------------------------------------

    def _enter(self, i: int, layer: nn.Module, args: Any, options: dict[str, Any]) -> None:
        hidden: Tensor = args[0] if args else options["hidden_states"]
        self._input = hidden
        self._shape = (hidden.shape[0], hidden.shape[1])
        self._record(i, hidden)

    def _middle(self, i: int, module: nn.Module, args: Any) -> None:
        self._record(i, args[0])

    def _add(self, i: int, module: nn.Module, args: Any, output: Any) -> None:
        assert self._input is not None
        self._record(i, self._input + output[0])

    def _leave(self, i: int, layer: nn.Module, args: Any, output: Any) -> None:
        self._record(i, output[0] if isinstance(output, tuple) else output)

    def _record(self, i: int, hidden: Tensor) -> None:
        """The points of a layer come in their order, and so do the layers."""
        wanted, found = self._wanted, self._found
        hidden = self._by_rows(hidden)
        exact = hidden.float()
        found["norms"].append(torch.linalg.vector_norm(exact, dim=-1))
        if wanted.vectors is not None:
            found["scores"].append(exact @ wanted.vectors[:, i].to(hidden.device).T)
        if wanted.weights is not None:
            weights = wanted.weights[:, None, self._start : self._start + self._shape[1]]
            found["mean"].append((weights.to(hidden.device) @ exact).squeeze(1))
        if wanted.raw:
            found["residual"].append(_copied(hidden))

    def _projected(self, name: str, part: Part, module: nn.Module, args: Any, out: Tensor) -> None:
        self._found[name].append(_copied(part(self._by_rows(out))))

    def _down(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._found["mlp_activation"].append(_copied(self._by_rows(args[0])))
        self._found["mlp_down"].append(_copied(self._by_rows(output)))

    def _attended(self, module: nn.Module, args: Any, output: Any) -> None:
        self._found["attention"].append(_copied(output[1]))

    def _by_rows(self, x: Tensor) -> Tensor:
        """OPT's MLP reads all rows as one."""
        return x.reshape(*self._shape, x.shape[-1])


def _copied(x: Tensor) -> Tensor:
    """On the CPU, and no view: models change some tensors in place, later on."""
    return x.to("cpu", copy=True)
