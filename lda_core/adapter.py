"""*After* as *before* plus a LoRA adapter: one pass over one copy of the weights.

The rows of both models go through the model together, interleaved: row 2i is *before*'s and row
2i + 1 *after*'s. A hook on every layer that the adapter changes adds its part to the odd rows.
Interleaved rather than halved, so that rows that join or leave at the end do it in pairs.

Shapes: N rows (an even number in mode "both"), T tokens, I inputs and O outputs of a layer,
R the adapter's rank.
"""

import dataclasses
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Self

import peft
import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lda_core.errors import CheckpointError

Mode = Literal["both", "after", "before"]

# What a LoraConfig may say while the adapter still is y + scaling * B(A(x)). Everything else must
# be at its default, so that what a later peft invents is refused and not ignored.
_HARMLESS = frozenset(
    """alpha_pattern auto_mapping base_model_name_or_path exclude_modules fan_in_fan_out
    inference_mode layers_pattern layers_to_transform lora_alpha lora_dropout
    peft_type peft_version qalora_group_size r rank_pattern revision target_modules task_type
    use_rslora""".split()
)
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal")  # the others change the base weights
# What peft raises for files that are missing, broken or of another model.
_FAULTS = (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError, UserWarning)


class NotStackable(Exception):
    """A good adapter that cannot run stacked; str() says why. Merge it into a second model."""


class Lanes:
    """Which rows of one model get the adapter: "both" the odd ones, "after" all, "before" none.

    One per stacked model and read by all its hooks; not safe across threads.
    """

    mode: Mode = "both"

    @contextmanager
    def use(self, mode: Mode) -> Iterator[None]:
        previous, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = previous


class LowRank:
    """Forward hook of one linear layer: adds x A^T B^T to the rows that the lanes name."""

    def __init__(self, lanes: Lanes, a: Tensor, b: Tensor) -> None:
        """`a` [R, I]; `b` [O, R], scaling included."""
        self._lanes, self._a, self._b = lanes, a.T, b.T

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """x [N, T, I], output [N, T, O], which is changed in place."""
        mode, x = self._lanes.mode, inputs[0]
        if mode == "before":
            return
        if mode == "both":
            assert x.dim() == 3 and x.shape[0] % 2 == 0, "rows are not before/after pairs"
            x, output = x[1::2], output[1::2]
        if output.dtype != x.dtype:  # the output layer in float32
            output.add_(x @ self._a @ self._b)
        elif x.shape[1] == 1:  # a decode step: two small products, no temporary for the sum
            output[:, 0].addmm_(torch.mm(x[:, 0], self._a), self._b)
        else:
            output.add_(x @ self._a @ self._b)


class Lane:
    """A stacked model seen as one of its two plain models: calling it runs every row as `mode`.

    Everything but calling it (also as base_model, forward or generate) is the stacked model's.
    """

    def __init__(self, model: PreTrainedModel, lanes: Lanes, mode: Literal["after", "before"]):
        self._model: Any = model
        self._lanes = lanes
        self._mode = mode

    def __call__(self, *args: Any, **options: Any) -> Any:
        with self._lanes.use(self._mode):
            return self._model(*args, **options)

    forward = __call__

    def generate(self, *args: Any, **options: Any) -> Any:
        with self._lanes.use(self._mode):
            return self._model.generate(*args, **options)

    @property
    def base_model(self) -> "Lane":
        return Lane(self._model.base_model, self._lanes, self._mode)

    def eval(self) -> Self:
        self._model.eval()
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "_model" not in self.__dict__:  # while being copied
            raise AttributeError(name)
        return getattr(self._model, name)


def stack_adapter(model: PreTrainedModel, folder: Path) -> Lanes:
    """Makes `model` run both of the pair, in place, and returns the switch (now at "both").

    Its modules, parameters and their names stay as they are. Raises NotStackable with `model` as
    it was, CheckpointError for an adapter that is broken or does not fit.
    """
    with _checkpoint_errors(folder):
        config = peft.PeftConfig.from_pretrained(str(folder), local_files_only=True)
    _require_plain(config)
    with _checkpoint_errors(folder):
        adapted = _adapted(model, folder)
        try:
            layers = _lora_layers(model)
            factors = {name: _factors(name, layer) for name, layer in layers.items()}
        finally:
            adapted.unload()  # the model as it was, every layer the very same object
    _require_rows(model, list(factors))
    lanes = Lanes()
    for name, (a, b) in factors.items():
        model.get_submodule(name).register_forward_hook(LowRank(lanes, a, b))
    return lanes


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """`model` with any adapter of peft's merged into its weights. Raises CheckpointError."""
    with _checkpoint_errors(folder):
        merged: PreTrainedModel = _adapted(model, folder).merge_and_unload(safe_merge=True)
    return merged.eval()


def _adapted(model: PreTrainedModel, folder: Path) -> peft.PeftModel:
    """`model` wrapped by peft, in place. Missing tensors are an error (UserWarning)."""
    with warnings.catch_warnings():
        # peft only warns of missing tensors, and an adapter that was not read is *before*.
        warnings.filterwarnings("error", message=".*missing adapter keys", category=UserWarning)
        return peft.PeftModel.from_pretrained(model, str(folder), local_files_only=True)


@contextmanager
def _checkpoint_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except _FAULTS as error:
        raise CheckpointError(f"{folder}: the adapter does not fit: {error}") from error


def _require_plain(config: peft.PeftConfig) -> None:
    if config.peft_type != peft.PeftType.LORA:
        raise NotStackable(f"the adapter is {getattr(config.peft_type, 'value', 'no')}, not LoRA")
    plain = peft.LoraConfig()
    for name in (field.name for field in dataclasses.fields(config)):
        value = getattr(config, name)
        # "no modules", said as None, [] or {}, is the default too
        same = value == getattr(plain, name) or not (value or getattr(plain, name))
        if name == "init_lora_weights":
            same = value in _HARMLESS_INITS
        if not same and name not in _HARMLESS:
            raise NotStackable(f"the adapter is not plain LoRA: {name} is {value!r}")


def _lora_layers(model: PreTrainedModel) -> dict[str, lora.Linear]:
    """peft's layers by the name of what they wrap. Raises NotStackable."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    embedding: Any = model.get_input_embeddings()
    for name, layer in layers.items():
        base: Any = layer.get_base_layer()
        if type(layer) is not lora.Linear or not isinstance(base, nn.Linear | Conv1D):
            raise NotStackable(f"the adapter changes {name}, a {type(base).__name__}")
        if base.weight is embedding.weight:
            raise NotStackable(f"the adapter changes {name}, which is tied to the embedding")
        if getattr(layer, "lora_variant", None):
            raise NotStackable(f"the adapter is not plain LoRA: {layer.lora_variant}")
    return layers


def _factors(name: str, layer: lora.Linear) -> tuple[Tensor, Tensor]:
    """A [R, I] and B [O, R] times the scaling, in the dtype of the weights. Raises ValueError."""
    weight = layer.get_base_layer().weight
    a = layer.lora_A["default"].weight.detach()
    b = layer.lora_B["default"].weight.detach() * layer.scaling["default"]
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ValueError(f"{name} has values that are not finite")
    return a.to(weight), b.to(weight)


@torch.inference_mode()
def _require_rows(model: PreTrainedModel, names: list[str]) -> None:
    """Raises NotStackable unless each layer reads [N, T, I]: flattened rows do not alternate."""
    rows, tokens = 2, 3
    seen: dict[nn.Module, tuple[int, ...]] = {}
    layers = {name: model.get_submodule(name) for name in names}
    hooks = [
        layer.register_forward_pre_hook(lambda layer, x: seen.update({layer: x[0].shape[:-1]}))
        for layer in layers.values()
    ]
    model(input_ids=torch.zeros(rows, tokens, dtype=torch.long, device=model.device))
    for hook in hooks:
        hook.remove()
    for name, layer in layers.items():
        if seen.get(layer) != (rows, tokens):
            raise NotStackable(f"{name} does not read its rows one by one (experts, flattening)")
