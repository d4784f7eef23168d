"""What two checkpoints have in common is kept once and, where it comes first, computed once.

A fine-tune often leaves the embeddings and the first layers as they were, to the bit.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_CHUNK_BYTES = 1 << 26  # compared at a time: a GPU needs as much again for the comparison

# What a body does after its layers, by the names that the architectures give it.
_LAST = frozenset("norm ln_f final_layernorm final_layer_norm project_out".split())
# Settings that no hidden state depends on.
_IRRELEVANT = frozenset(
    """_name_or_path architectures transformers_version bos_token_id eos_token_id pad_token_id
    tie_word_embeddings use_cache""".split()
)


def share_identical(after: PreTrainedModel, before: PreTrainedModel) -> int:
    """Points `before`'s tensors at those of `after` that have the same name, place and bits.

    Returns the bytes saved. What is tied stays tied: each parameter stays the object it was.
    """
    theirs = dict(_tensors(after))
    shared: set[Tensor] = set()  # a set: a tied tensor comes once for each of its names
    for name, tensor in _tensors(before):
        same = theirs.get(name)
        if same is None or same.data_ptr() == tensor.data_ptr():
            continue
        if _identical(same, tensor):
            tensor.data = same.data
            shared.add(tensor)
    return sum(tensor.nbytes for tensor in shared)


def common_layers(after: PreTrainedModel, before: PreTrainedModel) -> int:
    """Leading decoder layers whose outputs are the same in both, given the same input ids.

    They and all that comes before them are alike to the bit. 0 also where the layers are not in
    one of the usual places.
    """
    ours, theirs = decoder_layers(after), decoder_layers(before)
    if ours is None or theirs is None or _settings(after) != _settings(before):
        return 0
    if not _alike(_beside_layers(after, ours), _beside_layers(before, theirs)):
        return 0
    for k, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        if not _alike(dict(_tensors(a)), dict(_tensors(b))):
            return k
    return len(ours)


class SharedTrunk:
    """Lets `before` take the hidden states of the common layers from `after`.

    Only within use(); outside of it both are the plain models they were. Within, every pass of
    `before` must follow a pass of `after` over the same tokens, and a cache of `before` has
    nothing in its first `layers` layers: whoever makes it must tell them their length, because
    the model sizes its masks by layer 0.
    """

    def __init__(self, after: PreTrainedModel, before: PreTrainedModel) -> None:
        """Installs itself in both models, if `layers`, the number they share, is not 0."""
        ours, theirs = decoder_layers(after), decoder_layers(before)
        # All but one, where a model meets itself: a cache without any layer has no length.
        most = len(ours) - 1 if ours is not None else 0
        self.layers = min(most, common_layers(after, before))
        self._on = False
        self._output: Any = None  # of the last common layer: [B, T, hidden], or a tuple of it
        if not self.layers or ours is None or theirs is None:
            return
        ours[self.layers - 1].register_forward_hook(self._keep)
        for i, layer in enumerate(theirs[: self.layers]):
            # The layer itself stays: models look at their layers' attributes.
            layer.forward = self._skip(layer.forward, last=i == self.layers - 1)

    @contextmanager
    def use(self) -> Iterator[None]:
        previous, self._on = self._on, True
        try:
            yield
        finally:
            self._on, self._output = previous, None

    def _keep(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        if self._on:
            self._output = output

    def _skip(self, own: Callable[..., Any], *, last: bool) -> Callable[..., Any]:
        """The forward of one of before's common layers."""

        def forward(*args: Any, **options: Any) -> Any:
            if not self._on:
                return own(*args, **options)
            output = self._output
            states = output[0] if isinstance(output, tuple) else output
            hidden = args[0] if args else options["hidden_states"]
            assert states is not None, "before runs, but after has not"
            assert states.shape == hidden.shape, "after has run on something else"
            if last:
                self._output = None
            return output

        return forward


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList | None:
    """None where they are not in one of the usual places."""
    body: Any = model.base_model
    for stack in (body, getattr(body, "decoder", None)):
        for name in ("layers", "h"):
            layers = getattr(stack, name, None)
            if isinstance(layers, nn.ModuleList):
                return layers
    return None


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    settings = {k: v for k, v in config.to_dict().items() if k not in _IRRELEVANT}
    return settings | {"attention": config._attn_implementation}


def _beside_layers(model: PreTrainedModel, layers: nn.ModuleList) -> dict[str, Tensor]:
    """The body's tensors but for its layers and what comes after them."""
    within = {tensor for _, tensor in _tensors(layers)}
    return {
        name: tensor
        for name, tensor in _tensors(model.base_model)
        if tensor not in within and name.removeprefix("decoder.").split(".")[0] not in _LAST
    }


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers, tied ones under each of their names."""
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(_identical(a[name], b[name]) for name in a)


def _identical(a: Tensor, b: Tensor) -> bool:
    """Bit by bit, so that NaN equals itself and 0 is not -0."""
    kinds = [(x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
    if kinds[0] != kinds[1]:
        return False
    bits = (x.detach().contiguous().view(-1).view(torch.uint8) for x in (a, b))
    chunks = (torch.split(x, _CHUNK_BYTES) for x in bits)
    return all(torch.equal(x, y) for x, y in zip(*chunks, strict=True))
