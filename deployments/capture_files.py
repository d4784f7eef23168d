"""Captures as they travel: traits in a safetensors file's bytes, tensors back in another's."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

import lda_core
from deployments.schemas import Captured, InvalidRequest

# Sets of traits kept on the device: of 16 traits, 32 layers of 4096, 8 MiB each.
_KEPT = 8


class TraitSets:
    """The traits of a pair's requests, read once: the same bytes are the same object, so that
    requests with the same traits share a pass."""

    def __init__(self, pair: lda_core.ModelPair, resident: Mapping[str, Tensor]) -> None:
        """`resident`: [layers, width] by name, for requests that bring none."""
        config = pair.after.config
        self._layers, self._size = config.num_hidden_layers, config.hidden_size
        self._device = pair.device
        self._kept: OrderedDict[str, lda_core.Directions] = OrderedDict()
        self._resident = self._directions(resident) if resident else None

    def _directions(self, vectors: Mapping[str, Tensor]) -> lda_core.Directions:
        names = sorted(vectors)
        return lda_core.Directions.of(
            names, [vectors[name] for name in names], self._layers, self._size, self._device
        )

    def of(self, file: bytes | None) -> lda_core.Directions | None:
        """Raises InvalidRequest naming `traits`, or the trait that is not as it should be."""
        if file is None:
            return self._resident
        key = hashlib.sha256(file).hexdigest()
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        try:
            tensors = safetensors.torch.load(file)
        except (SafetensorError, ValueError, KeyError):
            raise InvalidRequest("traits", "must be a safetensors file's bytes") from None
        try:
            directions = self._directions(tensors)
        except lda_core.RequestError as error:
            # The name is the client's: nothing of what was sent is repeated.
            names = sorted(tensors)
            place = names.index(error.field.removeprefix("traits.")) if "." in error.field else None
            field = "traits" if place is None else f"traits[{place}]"
            raise InvalidRequest(field, error.message, error.code) from None
        self._kept[key] = directions
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return directions


def to_wire(
    request: lda_core.CaptureRequest, captured: lda_core.Captured, tokens: list[str]
) -> Captured:
    directions = request.directions
    return Captured(
        prompt_tokens=len(request.prompt_ids),
        token_ids=list(request.token_ids),
        tokens=tokens,
        traits=[] if directions is None else list(directions.names),
        tensors=safetensors.torch.save(captured.tensors),
    )
