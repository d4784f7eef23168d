"""Files of traits: ours, and other people's.

Ours is `NAME.safetensors`: `mean_difference` and `probe`, each [L, D], and as metadata (all text)
`trait`, `method`, `layers`, `hidden_size`, `model`, `pair` (the hashes of what it was made from),
`report` (held-out accuracy and effect size per layer) and `made_from` (a hash of all its inputs).

Other people's, `.safetensors`, `.pt` or `.pth`: one tensor [D] (the same for all layers), [L, D],
or [L + 1, D] (the embeddings' first, which is dropped); or a tensor [D] for each layer, under its
number. A `.pt` file is read without running anything that is in it.

L layers, D the hidden size; a vector is one layer's [D].
"""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from jobs import capture_files as files
from jobs.contrast import NAME
from jobs.errors import Refused

Which = Literal["mean_difference", "probe"]
WHICH: tuple[Which, ...] = get_args(Which)
PICKLED = (".pt", ".pth")
ENDINGS = (".safetensors", *PICKLED)
OURS = "trait"  # the metadata that only our files have
LAYER = re.compile(r"\d+")


@dataclass(frozen=True, eq=False)
class Trait:
    """`vectors` [L, D] float32, finite, none of them zero. `layout` says what the file held, and
    `notes` what was done about it. `metadata` is that of our own files, else empty."""

    name: str
    path: Path
    vectors: Tensor
    layout: str
    notes: tuple[str, ...]
    metadata: Mapping[str, str]


def read_traits(
    paths: Path | Iterable[Path],
    layers: int,
    hidden_size: int,
    which: Which = "mean_difference",
) -> dict[str, Tensor]:
    """Trait names and their vectors [L, D]; a folder stands for the files in it.

    `which` tensor of our own files. What was dropped is said on stderr. Raises Refused, naming
    file, tensor and shape, for anything that is not such a file.
    """
    traits = load_traits(paths, layers, hidden_size, which)
    for trait in traits:
        for note in trait.notes:
            print(f"{trait.path}: {note}", file=sys.stderr)
    return {trait.name: trait.vectors for trait in traits}


def load_traits(
    paths: Path | Iterable[Path],
    layers: int,
    hidden_size: int,
    which: Which = "mean_difference",
) -> list[Trait]:
    """In the order of their files. Raises Refused, for two traits of one name, too."""
    found: dict[str, Trait] = {}
    for path in trait_paths([paths] if isinstance(paths, Path) else paths):
        trait = load_trait(path, layers, hidden_size, which)
        if trait.name in found:
            raise Refused(f"{path} and {found[trait.name].path} are both trait {trait.name!r}")
        found[trait.name] = trait
    return list(found.values())


def trait_paths(paths: Iterable[Path]) -> list[Path]:
    """Files as they are, folders as the files in them that may hold traits, by name."""
    made: list[Path] = []
    for path in paths:
        if not path.is_dir():
            made.append(path)
            continue
        inside = sorted(p for p in path.iterdir() if p.suffix in ENDINGS and p.is_file())
        if not inside:
            raise Refused(f"{path}: no file in it ends in {', '.join(ENDINGS)}")
        made += inside
    return made


def load_trait(
    path: Path, layers: int, hidden_size: int, which: Which = "mean_difference"
) -> Trait:
    """Raises Refused."""
    if not NAME.fullmatch(path.stem):
        raise Refused(
            f"{path}: the trait is called after its file: up to 100 letters, digits, _, . and -"
        )
    metadata: dict[str, str] = {}
    if path.suffix == ".safetensors":
        tensors, metadata = _read_safetensors(path)
    elif path.suffix in PICKLED:
        tensors = _read_pickle(path)
    else:
        raise Refused(f"{path}: a file of traits ends in {', '.join(ENDINGS)}")
    if OURS in metadata:
        vectors, layout, notes = _ours(path, tensors, layers, hidden_size, which)
    else:
        metadata = {}
        vectors, layout, notes = _foreign(path, tensors, layers, hidden_size)
    return Trait(path.stem, path, vectors, layout, notes, metadata)


def as_bytes(traits: Mapping[str, Tensor]) -> bytes:
    """The `traits` of a CaptureRequest: a safetensors file's bytes."""
    return save({name: vectors.float().contiguous() for name, vectors in traits.items()})


def write_trait(path: Path, tensors: Mapping[Which, Tensor], metadata: Mapping[str, str]) -> None:
    """A file of ours, whole or not at all. The same tensors and metadata give the same bytes, which
    safetensors' own writer does not."""
    made: dict[str, files.Tensor] = {
        name: files.Tensor.of(vectors.float().numpy()) for name, vectors in tensors.items()
    }
    files.write(path, files.to_bytes(files.Content(made, dict(metadata))))


def read_metadata(path: Path) -> dict[str, str]:
    """Of one of our files; empty if there is none, or another's. Raises Refused if it is broken."""
    if not path.exists():
        return {}
    _, metadata = _read_safetensors(path)
    return metadata if OURS in metadata else {}


def tensor_names(path: Path) -> list[Which]:
    """Those of WHICH that one of our files holds. Raises Refused if it is broken or has none."""
    tensors, _ = _read_safetensors(path)
    names = [which for which in WHICH if which in tensors]
    if not names:
        raise Refused(f"{path}: no tensor {WHICH[0]!r} or {WHICH[1]!r}, but {_listed(tensors)}")
    return names


def report_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our own file says of itself; empty for another's."""
    report: dict[str, Any] = json.loads(metadata.get("report", "{}"))
    return report


def _ours(
    path: Path, tensors: Mapping[str, Tensor], layers: int, hidden_size: int, which: Which
) -> tuple[Tensor, str, tuple[str, ...]]:
    if which not in tensors:
        raise Refused(f"{path}: no tensor {which!r} in it, but {_listed(tensors)}")
    tensor = tensors[which]
    if tuple(tensor.shape) != (layers, hidden_size):
        raise Refused(_wrong(path, which, tensor, f"[{layers}, {hidden_size}]"))
    return _usable(path, which, tensor), f"{which} {_shape(tensor)}", ()


def _foreign(
    path: Path, tensors: Mapping[str, Tensor], layers: int, hidden_size: int
) -> tuple[Tensor, str, tuple[str, ...]]:
    """A tensor [L, D], what it was, and what was done about it."""
    wanted = f"[{hidden_size}], [{layers}, {hidden_size}] or [{layers + 1}, {hidden_size}]"
    dropped = "its first vector is that of the embeddings and is left out"
    if not tensors:
        raise Refused(f"{path}: there is no tensor in it")
    numbers = _layer_numbers(tensors)
    if len(tensors) == 1 and not (numbers and layers > 1):
        ((name, tensor),) = tensors.items()
        usable = _usable(path, name, tensor)
        if usable.shape == (hidden_size,):
            note = "one vector, taken for every layer"
            return usable.repeat(layers, 1), f"one tensor {_shape(tensor)}", (note,)
        if usable.shape == (layers, hidden_size):
            return usable, f"one tensor {_shape(tensor)}", ()
        if usable.shape == (layers + 1, hidden_size):
            return usable[1:].clone(), f"one tensor {_shape(tensor)}", (dropped,)
        raise Refused(_wrong(path, name, tensor, wanted))
    if numbers is None:
        raise Refused(
            f"{path}: {_listed(tensors)}: must be one tensor, or one for each layer under its "
            f"number (0 to {layers - 1})"
        )
    if sorted(numbers) not in (list(range(layers)), list(range(layers + 1))):
        raise Refused(
            f"{path}: vectors of the layers {', '.join(map(str, sorted(numbers)))}: must be of "
            f"all from 0 to {layers - 1}, or to {layers} with the embeddings as 0"
        )
    rows = []
    for number in sorted(numbers):
        name = numbers[number]
        if tensors[name].shape != (hidden_size,):
            raise Refused(_wrong(path, name, tensors[name], f"[{hidden_size}]"))
        rows.append(_usable(path, name, tensors[name]))
    layout, stacked = f"{len(rows)} tensors [{hidden_size}]", torch.stack(rows)
    if len(rows) == layers + 1:
        return stacked[1:].clone(), layout, (dropped,)
    return stacked, layout, ()


def _layer_numbers(tensors: Mapping[str, Tensor]) -> dict[int, str] | None:
    """Layer and tensor name, where every name holds exactly one number and none comes twice."""
    numbers: dict[int, str] = {}
    for name in tensors:
        inside = LAYER.findall(name)
        if len(inside) != 1 or len(inside[0]) > 4:
            return None
        numbers[int(inside[0])] = name
    return numbers if len(numbers) == len(tensors) else None


def _usable(path: Path, name: str, tensor: Tensor) -> Tensor:
    """In float32. Raises Refused for another kind of tensor, or for a vector without direction."""
    at = f"{path}: tensor {name!r} {_shape(tensor)}"
    if tensor.layout != torch.strided or tensor.is_quantized or not tensor.is_floating_point():
        raise Refused(f"{at} is {tensor.dtype}, {tensor.layout}: must be dense and of real numbers")
    made = tensor.detach().float()
    if not torch.isfinite(made).all():
        raise Refused(f"{at} holds a number that is not finite in float32")
    if made.ndim and not (made.norm(dim=-1) > 0).all():
        where = (made.norm(dim=-1) == 0).nonzero().flatten().tolist()
        of = f" (row {where[0]})" if where else ""
        raise Refused(f"{at} holds a vector that is zero{of}: it has no direction")
    return made


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            return {name: file.get_tensor(name) for name in file.keys()}, metadata
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None
    except (SafetensorError, ValueError, TypeError, AttributeError) as error:
        raise Refused(f"{path}: not a safetensors file that can be read: {error}") from None


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors by name; a lone one is called `tensor`."""
    try:
        with path.open("rb") as file:
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise Refused(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # of many kinds; none of them is ours, and all mean the same
        raise Refused(
            f"{path}: not a file of tensors alone that can be read without running what is in it "
            f"({type(error).__name__})"
        ) from None
    if isinstance(loaded, Tensor):
        return {"tensor": loaded}
    if not isinstance(loaded, Mapping):
        raise Refused(f"{path}: holds a {type(loaded).__name__}: must be a tensor, or some by name")
    for name, value in loaded.items():
        if isinstance(name, bool) or not isinstance(name, str | int):
            raise Refused(f"{path}: has {name!r} as a tensor's name: must be text or a number")
        if not isinstance(value, Tensor):
            raise Refused(f"{path}: {name!r} is a {type(value).__name__}: must be a tensor")
    made = {str(name): value for name, value in loaded.items()}
    if len(made) < len(loaded):
        raise Refused(f"{path}: the same tensor name as text and as a number")
    return made


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def _wrong(path: Path, name: str, tensor: Tensor, wanted: str) -> str:
    return (
        f"{path}: tensor {name!r} has shape {_shape(tensor)}: must be {wanted}, by the layers and "
        "the hidden size of the service's pair"
    )


def _listed(tensors: Mapping[str, Tensor]) -> str:
    shown = [f"{name!r} {_shape(tensor)}" for name, tensor in list(tensors.items())[:6]]
    return ", ".join(shown) + (f" and {len(tensors) - 6} more" if len(tensors) > 6 else "")
