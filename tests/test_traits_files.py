"""Files of trait vectors: ours, other people's, and every one that is refused."""

import os
import pickle

import pytest
import torch
from safetensors.torch import load, save_file

from jobs.errors import Refused
from jobs.trait_files import as_bytes, load_traits, read_metadata, read_traits, write_trait

L, D = 3, 4


def vectors(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def put(tmp_path):
    """Writes an object as .pt, or tensors as .safetensors."""

    def put(content, name="v.pt", **metadata):
        path = tmp_path / name
        if name.endswith(".safetensors"):
            save_file(content, path, metadata=metadata or None)
        else:
            torch.save(content, path)
        return path

    return put


def read(path, which="mean_difference"):
    ((name, tensor),) = read_traits(path, L, D, which).items()
    assert name == path.stem and tensor.dtype == torch.float32 and tensor.shape == (L, D)
    return tensor


def test_ours_comes_back_as_it_was(tmp_path):
    path = tmp_path / "calm.safetensors"
    mean, probe = vectors(L, D), vectors(L, D, seed=1).double()
    write_trait(path, {"mean_difference": mean, "probe": probe}, {"trait": "calm", "report": "{}"})
    assert torch.equal(read(path), mean)
    assert torch.equal(read(path, "probe"), probe.float())
    assert read_metadata(path) == {"trait": "calm", "report": "{}"}
    assert os.listdir(tmp_path) == ["calm.safetensors"]
    write_trait(path, {"probe": probe}, {"trait": "calm"})
    with pytest.raises(Refused, match=r"no tensor 'mean_difference' in it, but 'probe' \[3, 4\]"):
        read(path)


def test_the_same_trait_gives_the_same_bytes(tmp_path):
    """A resumed run is compared with an uninterrupted one byte for byte."""
    path, found = tmp_path / "calm.safetensors", set()
    for order in (1, -1) * 8:
        names = ["mean_difference", "probe"][::order]
        metadata = {"trait": "calm", "report": "{}", "model": "after", "layers": "3"}
        tensors = {name: vectors(L, D, seed=len(name)) for name in names}
        write_trait(path, tensors, dict(list(metadata.items())[::order]))
        found.add(path.read_bytes())
    assert len(found) == 1


def test_ours_of_another_shape_is_refused(tmp_path):
    path = tmp_path / "calm.safetensors"
    write_trait(path, {"probe": vectors(L + 1, D)}, {"trait": "calm"})
    with pytest.raises(Refused, match=r"'probe' has shape \[4, 4\]: must be \[3, 4\]"):
        read(path, "probe")


@pytest.mark.parametrize("name", ["v.pt", "v.pth", "v.safetensors"])
def test_other_peoples_layouts(put, name, capsys):
    one, each, more = vectors(D), vectors(L, D), vectors(L + 1, D)

    def lone(tensor):
        return {"refusal": tensor} if name.endswith("s") else tensor

    assert torch.equal(read(put(lone(one), name)), one.repeat(L, 1))
    assert "one vector, taken for every layer" in capsys.readouterr().err
    assert torch.equal(read(put(lone(each), name)), each)
    assert capsys.readouterr().err == ""
    assert torch.equal(read(put(lone(more), name)), more[1:])
    assert "embeddings" in capsys.readouterr().err
    by_layer = {f"layers.{i}.direction": each[i].clone() for i in (2, 0, 1)}
    assert torch.equal(read(put(by_layer, name)), each)
    by_layer = {f"layer_{i}": more[i].clone() for i in range(L + 1)}
    assert torch.equal(read(put(by_layer, name)), more[1:])
    assert "embeddings" in capsys.readouterr().err


def test_numbers_as_names_and_other_dtypes(put):
    each = vectors(L, D)
    assert torch.equal(read(put({2: each[2], 0: each[0], 1: each[1]})), each)
    assert torch.equal(read(put({"v": torch.nn.Parameter(each)})), each)
    assert torch.equal(read(put(each.bfloat16())), each.bfloat16().float())
    assert torch.equal(read(put(each.double().T.contiguous().T)), each)
    assert torch.equal(read(put({"v": each.half()}, "v.safetensors")), each.half().float())
    # With metadata of somebody else's, it is still somebody else's.
    assert torch.equal(read(put({"v": each}, "v.safetensors", format="pt")), each)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("protocol", [2, 4])
def test_nothing_in_a_pickle_is_run(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "v.pt"
    for write in (
        lambda what: path.write_bytes(pickle.dumps(what, protocol)),
        lambda what: torch.save(what, path),
    ):
        write({"v": Evil()})
        with pytest.raises(Refused, match="not a file of tensors alone"):
            read(path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "content, why",
    [
        (vectors(D + 1), r"'tensor' has shape \[5\]: must be \[4\], \[3, 4\] or \[4, 4\]"),
        (vectors(L, D + 1), r"'tensor' has shape \[3, 5\]"),
        (vectors(L + 2, D), r"'tensor' has shape \[5, 4\]"),
        (vectors(1, L, D), r"'tensor' has shape \[1, 3, 4\]"),
        (torch.tensor(1.0), r"'tensor' has shape \[\]"),
        (torch.ones(L, D, dtype=torch.int64), "is torch.int64, torch.strided: must be dense"),
        (torch.ones(L, D, dtype=torch.complex64), "is torch.complex64"),
        (torch.eye(L, D).to_sparse(), "torch.sparse_coo: must be dense"),
        (torch.full((L, D), float("nan")), r"'tensor' \[3, 4\] holds a number that is not finite"),
        (torch.full((L, D), float("inf")), "not finite"),
        (torch.full((L, D), 1e300, dtype=torch.float64), "not finite in float32"),
        (torch.eye(L, D)[[0, 1, 1]] * torch.tensor([[1], [1], [0]]), r"is zero \(row 2\)"),
        (torch.zeros(D), "holds a vector that is zero: it"),
        ({}, "there is no tensor in it"),
        ([vectors(D)] * L, "holds a list: must be a tensor, or some by name"),
        ("words", "holds a str"),
        ({"v": 3.0}, "'v' is a float: must be a tensor"),
        ({True: vectors(D)}, "has True as a tensor's name"),
        ({0: vectors(D), "0": vectors(D)}, "as text and as a number"),
        ({"a": vectors(L, D), "b": vectors(L, D)}, r"'a' \[3, 4\], 'b' \[3, 4\]: must be one"),
        ({"h0.q1": vectors(D), "h1.q1": vectors(D)}, "must be one tensor, or one for each layer"),
        ({0: vectors(D), 2: vectors(D)}, "layers 0, 2: must be of all from 0 to 2"),
        ({5: vectors(D)}, "layers 5: must be of all"),
        ({i: vectors(D) for i in (1, 2, 3)}, "layers 1, 2, 3: must be"),
        ({0: vectors(D), 1: vectors(D), 2: vectors(D + 1)}, r"'2' has shape \[5\]: must be \[4\]"),
        ({0: vectors(D), 1: vectors(D), 2: torch.zeros(D)}, r"'2' \[4\] holds a vector .* zero"),
    ],
)
def test_what_is_no_trait_is_refused_by_name(put, content, why):
    path = put(content)
    with pytest.raises(Refused, match=rf"v\.pt: .*{why}"):
        read(path)


def test_broken_files_are_refused(tmp_path):
    for name, content, why in (
        ("v.pt", b"not a pickle", "not a file of tensors alone"),
        ("v.pt", b"", "not a file of tensors alone"),
        ("v.safetensors", b"\xff" * 40, "not a safetensors file"),
        ("v.safetensors", b"", "not a safetensors file"),
        ("v.npy", b"", "ends in .safetensors, .pt, .pth"),
        ("a b.pt", b"", "called after its file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(Refused, match=why):
            read_traits([tmp_path / name], L, D)
    for name in ("none.pt", "none.safetensors"):
        with pytest.raises(Refused, match=rf"{name}: No such file"):
            read_traits([tmp_path / name], L, D)


def test_a_folder_is_the_files_in_it(put, tmp_path):
    put(vectors(L, D), "b.pt")
    put({"v": vectors(D)}, "a.safetensors")
    (tmp_path / "manifest.json").write_text("{}")
    assert [trait.name for trait in load_traits(tmp_path, L, D)] == ["a", "b"]
    (tmp_path / "other").mkdir()
    with pytest.raises(Refused, match="no file in it"):
        read_traits(tmp_path / "other", L, D)
    again = put(vectors(L, D), "other/a.pt")
    with pytest.raises(Refused, match="are both trait 'a'"):
        read_traits([tmp_path, again], L, D)


def test_bytes_for_the_wire():
    traits = {"a": vectors(L, D), "b": vectors(D, L).T}
    found = load(as_bytes(traits))
    assert sorted(found) == ["a", "b"]
    assert all(torch.equal(found[name], traits[name]) for name in traits)
