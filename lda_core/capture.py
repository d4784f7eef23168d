"""Captures: the residual stream of both models along directions, at every token of given texts.

One pass over prompt and completion together (teacher forcing), padded on the right. Row k of a
capture is the state at the position where token k is read: row `prompt_tokens + k` belongs to
completion token k, the last one included.

Shapes: T tokens, L layers, 3 points of each (layer input; after attention, before the second
norm; layer output), K directions (traits), D hidden size, F the MLP's width.
"""

from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from lda_core.capture_points import inside_of, layers_of
from lda_core.errors import ContextLengthExceeded, DoesNotFit, RequestError
from lda_core.lockstep import Computed, Lockstep
from lda_core.pair import ModelPair
from lda_core.pieces import Pace, PieceQueue
from lda_core.recorder import Recorder, Recording
from lda_core.request import Role, Roles

MAX_TRAITS = 256


@dataclass(frozen=True, eq=False)
class Directions:
    """Traits: a unit vector for each layer of each.

    Attributes:
      vectors: (K, L, D), float32, each of length 1.
    """

    names: tuple[str, ...]
    vectors: Tensor

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        tensors: Sequence[Tensor],
        layers: int,
        hidden_size: int,
        device: torch.device | str = "cpu",
    ) -> Self:
        """Of tensors [L, D], or [D] for all layers alike, of any length but 0.

        Raises RequestError naming the trait.
        """
        if not 1 <= len(names) == len(tensors) <= MAX_TRAITS:
            raise RequestError("traits", f"must be between 1 and {MAX_TRAITS}, each with a name")
        if len(set(names)) < len(names):
            raise RequestError("traits", "must have names that differ")
        vectors = []
        for name, tensor in zip(names, tensors, strict=True):
            if tensor.shape not in ((hidden_size,), (layers, hidden_size)):
                raise RequestError(
                    f"traits.{name}",
                    f"must have shape [{layers}, {hidden_size}] or [{hidden_size}], "
                    f"has {list(tensor.shape)}",
                )
            if not tensor.is_floating_point():
                raise RequestError(f"traits.{name}", f"must be floating-point, is {tensor.dtype}")
            vector = tensor.detach().to("cpu", torch.float64).expand(layers, hidden_size)
            length = torch.linalg.vector_norm(vector, dim=-1, keepdim=True)
            if not (length.isfinite().all() and (length > 0).all()):
                raise RequestError(
                    f"traits.{name}", "must be finite, and not 0 in all places of any layer"
                )
            vectors.append((vector / length).float())
        return cls(tuple(names), torch.stack(vectors).to(device))


@dataclass(frozen=True, eq=False)
class CaptureRequest:
    """A prompt and a completion of it (or the prompt alone), to be read and not drawn.

    Attributes:
      directions: along which the residual stream is projected, of the pair's L and D.
      layer: of which attention and MLP are wanted, too.
      raw: the residual stream itself.
      mean: its mean over the completion's tokens (the prompt's last one, if there are none).

    Raises RequestError naming the field if a value is out of range.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    roles: tuple[Role, ...] = ("after", "before")
    directions: Directions | None = None
    layer: int | None = None
    raw: bool = False
    mean: bool = False

    def __post_init__(self) -> None:
        if not self.prompt_ids:
            raise RequestError("prompt", "must have at least one token")
        for name, ids in (("prompt", self.prompt_ids), ("completion", self.completion_ids)):
            if not all(type(i) is int for i in ids):
                raise RequestError(name, "token ids must be integers")
        if self.roles not in (("after", "before"), ("before", "after"), ("after",), ("before",)):
            raise RequestError("roles", "must be after, before or both")

    @property
    def token_ids(self) -> tuple[int, ...]:
        return (*self.prompt_ids, *self.completion_ids)


@dataclass(frozen=True)
class Captured:
    """Tensors on the CPU, by name; R is `after` or `before`.

    `R.norms` (T, L, 3) and, with directions, `R.scores` (T, L, 3, K), h.v / ||v||, in float32;
    where asked for `R.mean` (L, 3, D) in float32, and in the model's dtype `R.residual`
    (T, L, 3, D) and of one layer `R.q` (T, heads, d), `R.k` and `R.v` (T, kv_heads, d), the
    projections' output before any norm or rotary embedding, `R.attention` (heads, T, T) after the
    softmax, `R.mlp_up` (T, F), `R.mlp_activation` (T, F) what the down-projection reads, and
    `R.mlp_down` (T, D).

    Attributes:
      error: why there is nothing of this.
    """

    tensors: dict[str, Tensor]
    error: str | None = None


@dataclass(eq=False)
class CaptureRow:
    """One text on its way through the engine, from `Engine.accept_capture`.

    Setting `left` (any thread may) takes it out at the next piece, not captured.
    """

    request: CaptureRequest
    left: bool = False
    refused: DoesNotFit | None = None  # memory ran out with this row alone
    captured: Captured | None = None

    @property
    def tokens(self) -> int:
        return len(self.request.prompt_ids) + len(self.request.completion_ids)

    @property
    def kind(self) -> tuple[object, ...]:
        """Rows that want the same things of the same models share a pass."""
        want = self.request
        return frozenset(want.roles), want.directions, want.layer, want.raw, want.mean


def accept(request: CaptureRequest, pair: ModelPair, context_length: int) -> CaptureRow:
    """Raises RequestError (naming the field and its range) if it can never be served,
    UnsupportedArchitecture by name."""
    for role in request.roles:
        model = pair.after if role == "after" else pair.before
        layers, size = layers_of(model), model.config.hidden_size
        directions = request.directions
        if directions is not None and directions.vectors.shape[1:] != (len(layers), size):
            _, had, wide = directions.vectors.shape
            raise RequestError(
                "traits", f"are of {had} layers of {wide}; {role} has {len(layers)} of {size}"
            )
        if request.layer is not None:
            if not 0 <= request.layer < len(layers):
                raise RequestError("layer", f"must be between 0 and {len(layers) - 1}")
            inside_of(model, layers[request.layer])
    row = CaptureRow(request)
    if row.tokens > context_length:
        prompt, tokens = len(request.prompt_ids), len(request.completion_ids)
        raise ContextLengthExceeded(
            "prompt" if prompt > context_length else "completion",
            f"{prompt} prompt tokens and {tokens} of the completion do not fit in the context of "
            f"{context_length}",
        )
    return row


class Capturing:
    """The rows that wait to be captured, in `queue`. Not thread-safe.

    Attributes:
      tokens: captured, ever; once for both models.
    """

    def __init__(self, pair: Lockstep, prefill_tokens: int, pace: Pace) -> None:
        self._pair = pair
        self.queue = PieceQueue(
            pair,
            prefill_tokens,
            pace,
            self._work,
            _refusal,
            lambda row: pair.rows_of(frozenset(row.request.roles)),
        )
        self.tokens = 0

    def _work(self, piece: list[CaptureRow], limit: int) -> None:
        want = piece[0].request  # of one kind are all
        found = self._read([row.request for row in piece], frozenset(want.roles), limit)
        for i, row in enumerate(piece):
            tensors = {
                f"{role}.{name}": _own(name, x[i], row.tokens)
                for role in want.roles
                for name, x in found[role].items()
            }
            finite = all(tensors[f"{role}.norms"].isfinite().all() for role in want.roles)
            row.captured = (
                Captured(tensors) if finite else Captured({}, "activations are not finite")
            )
            self.tokens += row.tokens

    def _read(
        self, requests: list[CaptureRequest], roles: Roles, limit: int
    ) -> dict[Role, dict[str, Tensor]]:
        """What is wanted of each role, [P, ...] of all rows padded, on the CPU."""
        models = self._pair.computed(roles)
        trunk = max(model.first_layer for model in models)  # layers that *after* computes for both
        recorders = [Recorder(m.model, _recording(m, requests, roles, trunk)) for m in models]
        passes: list[list[dict[str, Tensor]]] = [[] for _ in models]
        with ExitStack() as stack:
            for recorder in recorders:
                stack.enter_context(recorder.watching())
            for _ in self._pair.read([r.token_ids for r in requests], roles, limit):
                for recorder, taken in zip(recorders, passes, strict=True):
                    taken.append(recorder.take())
        found: dict[Role, dict[str, Tensor]] = {}
        for model, taken in zip(models, passes, strict=True):
            joined = _joined(taken)
            for lane, role in enumerate(model.roles):
                found[role] = {name: x[lane :: len(model.roles)] for name, x in joined.items()}
        if trunk:
            found["before"] = _behind(found["after"], found["before"], trunk)
        for role in roles:  # a model paired with itself has run once
            found.setdefault(role, next(iter(found.values())))
        return found


def _recording(
    model: Computed, requests: list[CaptureRequest], roles: Roles, trunk: int
) -> Recording:
    want = requests[0]
    wanted = not roles.isdisjoint(model.roles)  # else it runs for the other's first layers alone
    layers = range(model.first_layer, len(layers_of(model.model)) if wanted else trunk)
    directions = want.directions
    return Recording(
        layers,
        vectors=None if directions is None else directions.vectors,
        weights=_weights(requests, len(model.roles)) if want.mean else None,
        raw=want.raw,
        inside=want.layer if want.layer is not None and want.layer in layers else None,
    )


def _weights(requests: list[CaptureRequest], lanes: int) -> Tensor:
    """(P * lanes, T) of the tokens whose mean is wanted."""
    weights = torch.zeros(len(requests), max(len(r.token_ids) for r in requests))
    for row, request in zip(weights, requests, strict=True):
        count = max(1, len(request.completion_ids))
        end = len(request.token_ids)
        row[end - count : end] = 1 / count
    return weights.repeat_interleave(lanes, dim=0)


def _joined(passes: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The columns of all passes."""
    by_name: defaultdict[str, list[Tensor]] = defaultdict(list)
    for taken in passes:
        for name, x in taken.items():
            by_name[name].append(x)
    joined = {}
    for name, parts in by_name.items():
        if name == "mean":
            joined[name] = torch.stack(parts).sum(dim=0)
        elif name == "attention":  # (R, heads, t, columns so far)
            width = parts[-1].shape[-1]
            wide = [torch.nn.functional.pad(x, (0, width - x.shape[-1])) for x in parts]
            joined[name] = torch.cat(wide, dim=2)
        else:
            joined[name] = torch.cat(parts, dim=1)
    return joined


def _behind(after: dict[str, Tensor], before: dict[str, Tensor], trunk: int) -> dict[str, Tensor]:
    """*before*, whose first layers are *after*'s."""
    whole = dict(before)
    for name, first in after.items():
        if name == "mean":
            whole[name] = torch.cat([first[:, :trunk], before[name]], dim=1)
        elif name in ("norms", "scores", "residual"):
            whole[name] = torch.cat([first[:, :, :trunk], before[name]], dim=2)
        else:  # of one layer, which only one of the two has computed, or both
            whole.setdefault(name, first)
    return whole


def _own(name: str, x: Tensor, tokens: int) -> Tensor:
    """A row's, without the padding and without what it came in."""
    if name == "attention":
        x = x[:, :tokens, :tokens]
    elif name != "mean":
        x = x[:tokens]
    with torch.inference_mode(False):
        return x.clone(memory_format=torch.contiguous_format)


def _refusal(row: CaptureRow) -> DoesNotFit:
    prompt, tokens = len(row.request.prompt_ids), len(row.request.completion_ids)
    return DoesNotFit(
        "completion" if tokens else "prompt",
        f"out of memory: {prompt} prompt tokens and {tokens} of the completion, alone, do not fit",
    )
