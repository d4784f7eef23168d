"""The pair: two models, one tokenizer, and what they have in common."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from transformers import PreTrainedModel

from lda_core import checkpoint, vocabulary
from lda_core.adapter import Lane, Lanes, NotStackable, merge_adapter, stack_adapter
from lda_core.architectures import require_exact
from lda_core.config import PairConfig
from lda_core.errors import ConfigError
from lda_core.head import float32_head
from lda_core.sharing import SharedTrunk, share_identical
from lda_core.vocabulary import Comparison

MIB = 1024**2


class Stacked(NamedTuple):
    """A model that computes both of a pair in one pass, and the switch between its modes."""

    model: PreTrainedModel
    switch: Lanes


@dataclass(frozen=True, eq=False)
class ModelPair:
    """*after* and *before*, on one device or on one each.

    Attributes:
      vocab_size: V, the part of the two output layers that both have; tokens are mixed, drawn
        and accepted in prompts only there.
      context_length: the smaller of the two, in tokens.
      eos_ids: tokens that end a completion: those of either model.
      comparison: of the two tokenizers.
      notices: harmless oddities, to be shown at start.
      files: weight files by role ("after", "before", "adapter") and the tokenizer's folder;
        empty for a pair made in memory.
      stacked: where *after* is *before* plus an adapter and both run as one pass; `after` and
        `before` are then two views of it.
      trunk: where the first layers of both are the same, and computed once.
    """

    after: PreTrainedModel
    before: PreTrainedModel
    tokenizer: Any
    vocab_size: int
    context_length: int
    eos_ids: frozenset[int]
    comparison: Comparison
    notices: tuple[str, ...] = ()
    files: dict[str, list[Path]] = field(default_factory=dict)
    stacked: Stacked | None = None
    trunk: SharedTrunk | None = None

    @classmethod
    def load(cls, config: PairConfig) -> Self:
        """Loads and checks both models.

        Raises CheckpointError, UnsupportedArchitecture, IncompatibleTokenizers, ConfigError.
        Nothing is asked of a hub before everything that is here has been checked.
        """
        device = _device(config.device)
        dtype = config.dtype
        if dtype == "auto" and device.type == "cpu":
            dtype = "float32"  # 16-bit products are slow on a CPU and gain nothing there
        loading: dict[str, Any] = {
            "dtype": dtype,
            "device": device,
            "allow_pickle": config.allow_pickle,
            "device_map": config.device_map,
        }
        before_device = _device(config.before_device) if config.before_device else device
        sources = {
            "before": (config.before, config.before_revision),
            "adapter" if config.after is None else "after": (
                config.after or config.adapter or "",  # PairConfig has checked that it is one
                config.after_revision,
            ),
        }
        if config.tokenizer is not None:
            sources["tokenizer"] = (config.tokenizer, None)

        # What is here is checked and read before anything is asked of a hub.
        local = {role: checkpoint.local_folder(source) for role, (source, _) in sources.items()}
        folders: dict[str, Path] = {}
        files: dict[str, list[Path]] = {}
        models: dict[str, PreTrainedModel] = {}
        notices: list[str] = []
        for role in sorted(sources, key=lambda role: local[role] is None):
            folder = local[role] or checkpoint.download(
                *sources[role], allow_pickle=config.allow_pickle
            )
            folders[role] = folder
            if role == "tokenizer":
                continue
            files[role] = checkpoint.weight_files(folder, allow_pickle=config.allow_pickle)
            if role != "adapter":
                where = {"device": before_device if role == "before" else device}
                models[role], more = checkpoint.load_model(folder, **loading | where)
                notices += more
        stacked: Stacked | None = None
        # One pass needs one device.
        if "adapter" in folders and config.adapter_mode == "stacked" and before_device == device:
            try:
                switch = stack_adapter(models["before"], folders["adapter"])
                stacked = Stacked(models["before"], switch)
            except NotStackable as reason:
                notices.append(f"the pair runs as two models: {reason}")
        if "adapter" in folders and stacked is None:
            again, _ = checkpoint.load_model(folders["before"], **loading)
            models["after"] = merge_adapter(again, folders["adapter"])

        own_tokenizer = folders.get("after", folders["before"])
        tokenizer_folder = folders.get("tokenizer", own_tokenizer)
        files["tokenizer"] = [tokenizer_folder]
        options = (config.tokenizer_class, config.add_bos_token)
        tokenizer = checkpoint.load_tokenizer(tokenizer_folder, *options)
        before_tokenizer = None
        if config.tokenizer is not None:
            notices.append(f"tokenizer {config.tokenizer}: the models' own were not compared")
        elif own_tokenizer != folders["before"]:
            before_tokenizer = checkpoint.load_tokenizer(folders["before"], *options)
        bos = tokenizer.bos_token_id
        if bos is not None and config.add_bos_token is None and bos not in tokenizer.encode("a"):
            notices.append(f"prompts do not begin with {tokenizer.bos_token} (see add_bos_token)")
        after, before = models.get("after"), models["before"]
        return cls.of(
            after or before,
            before,
            tokenizer,
            before_tokenizer,
            notices=tuple(notices),
            files=files,
            stacked=stacked,
        )

    @classmethod
    def of(
        cls,
        after: PreTrainedModel,
        before: PreTrainedModel,
        tokenizer: Any,
        before_tokenizer: Any = None,
        *,
        notices: tuple[str, ...] = (),
        files: dict[str, list[Path]] | None = None,
        stacked: Stacked | None = None,
    ) -> Self:
        """A pair of models in memory. `before_tokenizer` None: both have the same.

        Tensors that are the same in both are kept once, and leading layers that are, computed
        once. `stacked`: both models are in there.

        Raises UnsupportedArchitecture, IncompatibleTokenizers.
        """
        for model in (after, before):
            require_exact(model.config)
        widths = [_width(after), _width(before)]
        comparison = vocabulary.require_same(tokenizer, before_tokenizer or tokenizer, min(widths))
        if widths[0] != widths[1]:
            notices = (
                *notices,
                f"output layers of {widths[0]} (after) and {widths[1]} (before) tokens are mixed "
                f"on the common {min(widths)}",
            )
        if not all([float32_head(model) for model in (after, before)]):
            notices = (*notices, "logits are rounded to 16 bits: the device has no float32 head")
        trunk = None
        if stacked is not None:
            after, before = (Lane(*stacked, mode) for mode in ("after", "before"))
        elif after is not before:
            saved = share_identical(after, before)
            if saved >= MIB:  # not worth a word for the tables of a rotation
                notices = (*notices, f"{saved // MIB} MiB are the same in both and kept once")
            trunk = SharedTrunk(after, before)
            if trunk.layers:
                notices = (*notices, f"the first {trunk.layers} layers are computed once for both")
            else:
                trunk = None
        return cls(
            after=after.eval(),
            before=before.eval(),
            tokenizer=tokenizer,
            vocab_size=min(widths),
            context_length=min(m.config.max_position_embeddings for m in (after, before)),
            eos_ids=_eos_ids(after, before, tokenizer),
            comparison=comparison,
            notices=(*notices, *comparison.notices),
            files=files or {},
            stacked=stacked,
            trunk=trunk,
        )

    @property
    def device(self) -> torch.device:
        device: torch.device = self.after.device
        return device


def _width(model: PreTrainedModel) -> int:
    """Tokens that the model both reads and writes."""
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return min(int(head.weight.shape[0]), int(embedding.weight.shape[0]))


def _eos_ids(after: PreTrainedModel, before: PreTrainedModel, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    generation = [getattr(m.generation_config, "eos_token_id", None) for m in (after, before)]
    for ids in (*generation, tokenizer.eos_token_id):
        found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
    return frozenset(found)


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {error}") from None
