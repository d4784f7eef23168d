"""Model files: found, checked and hashed before anything is loaded from them.

Everything becomes a local folder first; a hub id is downloaded in two steps, so that its config
is checked before gigabytes move. Refused: a missing folder, code in the repository, pickled
weights (unless allowed, and then only with weights_only), missing or mismatched tensors.
"""

import difflib
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from lda_core.architectures import require_exact
from lda_core.errors import CheckpointError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_SMALL_FILES = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]


def local_folder(source: str) -> Path | None:
    """The folder that `source` names, or None for a hub id. Raises CheckpointError.

    What looks like a path is never looked up on the hub: anything that starts with . / or ~,
    has more than one slash, or whose first part is a folder here.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        check_config(folder)
        return folder
    if source[:1] in "./~" or not _HUB_ID.fullmatch(source) or Path(source).parts[0:1] == ():
        raise CheckpointError(f"{source}: no such folder")
    if "/" in source and Path(Path(source).parts[0]).is_dir():
        raise CheckpointError(
            f"{source}: no such folder (taken for a path, because {Path(source).parts[0]} is one)"
        )
    return None


def download(source: str, revision: str | None, *, allow_pickle: bool) -> Path:
    """The folder of a hub id, config first. Raises CheckpointError."""
    try:
        small = Path(snapshot_download(source, revision=revision, allow_patterns=_SMALL_FILES))
        check_config(small)
        weights = ["*.safetensors", *(["*.bin"] if allow_pickle else [])]
        return Path(
            snapshot_download(
                source,
                revision=revision,
                allow_patterns=[*_SMALL_FILES, *weights],
                ignore_patterns=["consolidated*", "*/*"],  # the same weights in other formats
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise CheckpointError(
            f"{source}: neither a folder here nor reachable on the hub ({type(error).__name__})"
        ) from error


def check_config(folder: Path) -> None:
    """Raises CheckpointError for code in the repository, UnsupportedArchitecture by name."""
    for name in ("config.json", "tokenizer_config.json"):
        if "auto_map" in _read_json(folder / name):
            raise CheckpointError(f"{folder}: {name} asks to run code of the repository (auto_map)")
    if (folder / "config.json").exists():
        try:
            config = AutoConfig.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # whatever its values do to the arithmetic of a config class
            raise CheckpointError(f"{folder}: config.json cannot be used: {error}") from error
        require_exact(config)


def weight_files(folder: Path, *, allow_pickle: bool) -> list[Path]:
    """The safetensors files, else with allow_pickle the .bin files. Raises CheckpointError."""
    safe = sorted(p for p in folder.glob("*.safetensors") if "consolidated" not in p.name)
    if safe:
        return safe
    pickled = sorted(folder.glob("*.bin"))
    if pickled and allow_pickle:
        return pickled
    if pickled:
        raise CheckpointError(
            f"{folder}: {pickled[0].name} is a pickle, which can run code when it is loaded; "
            "convert it to safetensors, or set allow_pickle (it is then read with weights_only)"
        )
    raise CheckpointError(f"{folder}: has no *.safetensors")


def load_model(
    folder: Path,
    *,
    dtype: str,
    device: torch.device,
    allow_pickle: bool,
    device_map: str | None = None,
) -> tuple[PreTrainedModel, list[str]]:
    """The model in eval mode on `device`, and notices. Raises CheckpointError.

    `device_map`: spread over the devices in sight instead (accelerate's words).
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(f"{folder}: has no config.json")
    files = weight_files(folder, allow_pickle=allow_pickle)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device_map or (None if device.type == "cpu" else {"": device}),
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=files[0].suffix == ".safetensors",
            weights_only=True,
            ignore_mismatched_sizes=True,  # so that the names come back and are reported below
            output_loading_info=True,
        )
    except Exception as error:  # weights, their index and the config may each hold anything
        raise CheckpointError(f"{folder}: {type(error).__name__}: {error}") from error
    if info["mismatched_keys"]:
        name, found, wanted = sorted(info["mismatched_keys"])[0]
        raise CheckpointError(
            f"{folder}: tensor {name} has shape {tuple(found)}, the config asks for {tuple(wanted)}"
        )
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise CheckpointError(f"{folder}: {len(missing)} tensors are missing, first {missing[0]}")
    notices = []
    if info["unexpected_keys"]:
        extra = sorted(info["unexpected_keys"])
        notices.append(f"{folder}: {len(extra)} tensors are not used, first {extra[0]}")
    return model.eval(), notices


def load_tokenizer(
    folder: Path, tokenizer_class: str | None = None, add_bos_token: bool | None = None
) -> Any:
    """The tokenizer of a folder. Raises CheckpointError.

    A checkpoint may name a class that does not exist (the "LLaMATokenizer" of early 2023).
    Instead of guessing what it meant, that is refused with the nearest name, to be given as
    `tokenizer_class`.
    """
    named = tokenizer_class or _read_json(folder / "tokenizer_config.json").get("tokenizer_class")
    cls: Any = AutoTokenizer
    if named is not None and not hasattr(transformers, named):
        known = [n for n in dir(transformers) if "Tokenizer" in n]
        by_lower = {name.lower(): name for name in known}
        close = difflib.get_close_matches(named.lower(), by_lower, n=1)
        hint = f"; set tokenizer_class, perhaps to {by_lower[close[0]]}" if close else ""
        raise CheckpointError(f"{folder}: there is no tokenizer class {named}{hint}")
    if tokenizer_class is not None:
        cls = getattr(transformers, tokenizer_class)
    options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
    try:
        return cls.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False, **options
        )
    except Exception as error:  # the tokenizers library raises that very class
        raise CheckpointError(f"{folder}: its tokenizer cannot be read: {error}") from error


def sha256(path: Path) -> str:
    """Hash of a file. A hub download is a link to a file named by its hash: no reading then."""
    name = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", name):
        return name
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        data = json.loads(path.read_text())
    except (ValueError, RecursionError, OSError) as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path}: is not a JSON object")
    return data
