"""Captures as they travel: traits in a safetensors file's bytes, tensors back in another's."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

import lda_core
from deployments.schemas import Captured, InvalidRequest

# Sets of traits that are kept: of 16 traits, 32 layers of 4096, 8 MiB each.
_KEPT_BYTES = 64 * 2**20


class TraitSets:
    """The traits of a pair's requests, read once: the same bytes are the same object, so that
    requests with the same traits share a pass. On the CPU: the engine's thread alone has to do
    with the device. Any thread may call this."""

    def __init__(self, pair: lda_core.ModelPair, resident: Mapping[str, Tensor]) -> None:
        """`resident`: [layers, width] by name, for requests that bring none."""
        config = pair.after.config
        self._layers, self._size = config.num_hidden_layers, config.hidden_size
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, lda_core.Directions] = OrderedDict()
        self._resident = self._directions(resident) if resident else None

    def _directions(self, vectors: Mapping[str, Tensor]) -> lda_core.Directions:
        names = sorted(vectors)
        return lda_core.Directions.of(
            names, [vectors[name] for name in names], self._layers, self._size
        )

    def of(self, file: bytes | None) -> lda_core.Directions | None:
        """Raises InvalidRequest naming `traits`, or the trait that is not as it should be."""
        if file is None:
            return self._resident
        key = hashlib.sha256(file).hexdigest()
        with self._lock:
            if key not in self._kept:
                self._kept[key] = self._read(file)
            self._kept.move_to_end(key)
            directions = self._kept[key]
            while sum(kept.vectors.nbytes for kept in self._kept.values()) > _KEPT_BYTES:
                self._kept.popitem(last=False)
            return directions

    def _read(self, file: bytes) -> lda_core.Directions:
        try:
            tensors = safetensors.torch.load(file)
        except (SafetensorError, ValueError, KeyError):
            raise InvalidRequest("traits", "must be a safetensors file's bytes") from None
        try:
            return self._directions(tensors)
        except lda_core.RequestError as error:
            # The name is the client's: nothing of what was sent is repeated.
            names = sorted(tensors)
            place = names.index(error.field.removeprefix("traits.")) if "." in error.field else None
            field = "traits" if place is None else f"traits[{place}]"
            raise InvalidRequest(field, error.message, error.code) from None


def to_wire(
    request: lda_core.CaptureRequest,
    captured: lda_core.Captured,
    text: Callable[[list[int]], str],
) -> Captured:
    """`text`: of token ids."""
    texts = {token: text([token]) for token in set(request.token_ids)}
    directions = request.directions
    return Captured(
        prompt_tokens=len(request.prompt_ids),
        token_ids=list(request.token_ids),
        tokens=[texts[token] for token in request.token_ids],
        traits=[] if directions is None else list(directions.names),
        tensors=safetensors.torch.save(captured.tensors),
    )
