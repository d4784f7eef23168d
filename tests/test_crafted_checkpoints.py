"""Checkpoints made to do harm, or damaged: refused with a name, never run, never half loaded."""

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from models import VOCAB, byte_tokenizer, random_model, random_pair
from safetensors.torch import load_file, save_file

from lda_core import (
    CheckpointError,
    Engine,
    IncompatibleTokenizers,
    LDAError,
    ModelPair,
    PairConfig,
    Request,
    RequestError,
    SelfTestFailed,
    encode,
    self_test,
)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever opens a connection, by whatever library."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError(f"asked the network: {args[1:]}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """after/ and before/ of a random pair, as safetensors."""
    pair = random_pair()
    for name, model in (("after", pair.after), ("before", pair.before)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "after", tmp_path / "before"


def load(folders: tuple[Path, Path], **options: Any) -> ModelPair:
    after, before = map(str, folders)
    return ModelPair.load(PairConfig(after=after, before=before, **options))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def bomb(marker: Path) -> str:
    """Python that leaves a trace."""
    return f"import pathlib\npathlib.Path({str(marker)!r}).touch()\n"


def sharded(folder: Path) -> Path:
    """The folder's weights in two files; its index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    return index


# -- vocabularies ------------------------------------------------------------------------------


def test_padded_vocabularies_are_mixed_on_the_common_part_with_a_notice(tmp_path: Path) -> None:
    """As of Llamas with a padding token of their own: 320 tokens here, 336 there."""
    for name, vocab in (("after", VOCAB + 16), ("before", VOCAB)):
        random_model("llama", 0, vocab_size=vocab).save_pretrained(tmp_path / name)
        tokenizer = byte_tokenizer()
        if name == "after":
            words = [f"[PAD{i}]" for i in range(VOCAB + 1 - len(tokenizer))]
            tokenizer.add_special_tokens({"additional_special_tokens": words})
            assert len(tokenizer) == VOCAB + 1
        tokenizer.save_pretrained(tmp_path / name)
    # What lies below the common width must be one vocabulary.
    with pytest.raises(IncompatibleTokenizers, match=r"token \d+: '\[PAD0\]' in after, None in"):
        load((tmp_path / "after", tmp_path / "before"))
    byte_tokenizer().save_pretrained(tmp_path / "after")
    pair = load((tmp_path / "after", tmp_path / "before"))
    assert pair.vocab_size == VOCAB
    assert any("336 (after) and 320 (before)" in notice for notice in pair.notices)
    self_test(pair)
    rows = Request((5, 6, 7), alpha=1.0, ignore_eos=True, temperature=50.0).samples(8)
    assert all(max(done.token_ids) < VOCAB for done in Engine(pair).generate(rows))
    with pytest.raises(RequestError):
        Engine(pair).accept(Request((VOCAB,)))


def _swap_tokens(state: Any) -> None:
    vocab = state["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]


def _swap_merges(state: Any) -> None:
    merges = state["model"]["merges"]
    merges[3], merges[4] = merges[4], merges[3]


def _one_less_special(state: Any) -> None:
    (pad,) = (token for token in state["added_tokens"] if token["content"] == "<pad>")
    pad["special"] = False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_swap_tokens, r"token \d+: 'a' in after, 'b' in before"),
        (_swap_merges, r"merge 3: .* in after, .* in before"),
        (lambda s: s["model"]["merges"].pop(), r"merges: \d+ in after, \d+ in before"),
    ],
)
def test_another_tokenizer_file_is_refused_with_the_first_difference(
    change: Callable[[Any], Any], message: str, folders: tuple[Path, Path]
) -> None:
    edit_json(folders[1] / "tokenizer.json", change)
    with pytest.raises(IncompatibleTokenizers, match=message):
        load(folders)


# -- nothing is asked of a network, nothing is run ---------------------------------------------


@pytest.mark.parametrize("path", ["/no/such/folder", "./gone", "~/gone-lda", "a/b/c", "tests/x"])
def test_a_missing_path_opens_no_connection(path: str, folders: tuple[Path, Path]) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        ModelPair.load(PairConfig(after=path, before=str(folders[1])))


def test_a_hub_id_is_what_opens_one(folders: tuple[Path, Path]) -> None:
    """So that the fixture above would see it."""
    with pytest.raises((CheckpointError, AssertionError)):
        ModelPair.load(PairConfig(after="no-such-org-lda/nothing", before=str(folders[1])))


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_folder_never_runs(file: str, folders: tuple[Path, Path]) -> None:
    after, marker = folders[0], folders[0] / "ran"
    for name in ("modeling_x", "configuration_x", "tokenization_x", "custom_generate/generate"):
        script = after / f"{name}.py"
        script.parent.mkdir(exist_ok=True)
        script.write_text(bomb(marker) + "class X: pass\n")
    classes = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer")
    load(folders)  # files alone are no request to run them
    edit_json(
        after / file,
        lambda c: c.update(auto_map={name: f"modeling_x.X{name}" for name in classes}),
    )
    with pytest.raises(CheckpointError, match="auto_map"):
        load(folders)
    assert not marker.exists()


def test_a_pickle_beside_good_weights_is_not_read(folders: tuple[Path, Path]) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (folders[0] / "ran",))

    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"model.norm.weight": Bomb()}, folders[0] / name)
    self_test(load(folders, allow_pickle=True))
    assert not (folders[0] / "ran").exists()


ESCAPES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch MARKER') }}",
    "import": "{{ lipsum.__globals__['__builtins__']['__import__']('os').system('touch MARKER') }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "attr": "{{ (messages|attr('__class__'))|attr('__base__') }}",
    "mutation": "{{ messages.append({'role': 'user', 'content': 'x'}) }}",
    "include": "{% include '/etc/passwd' %}",
    "range": "{% for i in range(10 ** 9) %}x{% endfor %}",
    "error": "{{ 1 / 0 }}",
    "type": "{{ 'a' + 1 }}",
    "syntax": "{% for %}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_chat_template_does_not_get_out_of_its_sandbox(
    name: str, folders: tuple[Path, Path]
) -> None:
    """It fails as a request that cannot be formatted, and touches nothing."""
    marker = folders[0] / "ran"
    template = ESCAPES[name].replace("MARKER", str(marker))
    (folders[0] / "chat_template.jinja").write_text(template)
    try:
        pair = load(folders)
    except CheckpointError:
        return
    assert pair.tokenizer.chat_template == template
    try:
        text = encode(pair.tokenizer, "Hi", "chat").text
    except RequestError as error:
        assert error.field in ("messages", "prompt")
        text = ""
    assert not marker.exists()
    assert "<class" not in text and "root:" not in text and "__" not in text, text
    assert encode(pair.tokenizer, "Hi").text == "Hi"  # other forms go on


# -- damaged files -----------------------------------------------------------------------------


def _weights(folder: Path) -> Path:
    return folder / "model.safetensors"


def _header_of_a_terabyte(folder: Path) -> None:
    content = _weights(folder).read_bytes()
    _weights(folder).write_bytes((2**40).to_bytes(8, "little") + content[8:])


def _offsets_beyond_the_end(folder: Path) -> None:
    content = _weights(folder).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = [0, 10**15]
    said = json.dumps(header).encode()
    _weights(folder).write_bytes(len(said).to_bytes(8, "little") + said + content[8 + length :])


def _missing_shard(folder: Path) -> None:
    sharded(folder)
    (folder / "model-00002-of-00002.safetensors").unlink()


def _index_of_another_folder(folder: Path) -> None:
    index = sharded(folder)
    outside = folder.parent / "outside.safetensors"
    (folder / "model-00002-of-00002.safetensors").rename(outside)
    index.write_text(
        index.read_text().replace("model-00002-of-00002.safetensors", "../gone.safetensors")
    )


def _index_without_a_map(folder: Path) -> None:
    sharded(folder).write_text("{}")


def _deep_json(file: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / file).write_text("[" * 200_000)


def _values(file: str, **values: Any) -> Callable[[Path], Any]:
    return lambda folder: edit_json(folder / file, lambda c: c.update(values))


def _folder_for_a_file(file: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).mkdir()

    return change


def _dangling(file: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to("/nowhere/at/all")

    return change


def _loop(file: str) -> Callable[[Path], Any]:
    def change(folder: Path) -> None:
        (folder / file).unlink()
        (folder / file).symlink_to(folder / file)

    return change


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "empty weights": lambda f: _weights(f).write_bytes(b""),
    "weights of eight bytes": lambda f: _weights(f).write_bytes(b"\xff" * 8),
    "weights cut in the header": lambda f: os.truncate(_weights(f), 100),
    "a header of a terabyte": _header_of_a_terabyte,
    "offsets beyond the end": _offsets_beyond_the_end,
    "a shard is missing": _missing_shard,
    "an index that names another folder": _index_of_another_folder,
    "an index without a map": _index_without_a_map,
    "weights are text": lambda f: _weights(f).write_text("version https://git-lfs"),
    "deep config": _deep_json("config.json"),
    "deep tokenizer config": _deep_json("tokenizer_config.json"),
    "deep tokenizer": _deep_json("tokenizer.json"),
    "deep generation config": _deep_json("generation_config.json"),
    "binary config": lambda f: (f / "config.json").write_bytes(b"\xff\xfe\0\0"),
    "binary tokenizer": lambda f: (f / "tokenizer.json").write_bytes(os.urandom(1000)),
    "tokenizer cut": lambda f: os.truncate(f / "tokenizer.json", 2000),
    "a vocabulary of one id": lambda f: edit_json(
        f / "tokenizer.json", lambda s: s["model"].update(vocab=dict.fromkeys("ab", 10**12))
    ),
    "negative width": _values("config.json", hidden_size=-32),
    "width of text": _values("config.json", hidden_size="SECRET"),
    "no heads": _values("config.json", num_attention_heads=0),
    "half a context": _values("config.json", max_position_embeddings="many"),
    "config is a folder": _folder_for_a_file("config.json"),
    "weights are a folder": _folder_for_a_file("model.safetensors"),
    "tokenizer is a folder": _folder_for_a_file("tokenizer.json"),
    "a link to nowhere for weights": _dangling("model.safetensors"),
    "a link to nowhere for config": _dangling("config.json"),
    "a link to itself": _loop("model.safetensors"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused_with_the_folder_named(
    name: str, folders: tuple[Path, Path]
) -> None:
    """As one of the errors of the tree, which a config's author can read; nothing else comes."""
    DAMAGE[name](folders[0])
    with pytest.raises(LDAError, match=str(folders[0])):
        self_test(load(folders))


def test_a_large_tokenizer_config_is_read_and_not_echoed(folders: tuple[Path, Path]) -> None:
    edit_json(folders[0] / "tokenizer_config.json", lambda c: c.update(note="SECRET" * 2_000_000))
    load(folders)
    path = folders[0] / "tokenizer_config.json"
    path.write_text(path.read_text()[:-10])
    with pytest.raises(CheckpointError) as caught:
        load(folders)
    assert "SECRET" not in str(caught.value) and len(str(caught.value)) < 500


def test_weights_that_are_not_finite_fail_the_self_test(folders: tuple[Path, Path]) -> None:
    for value in (float("nan"), float("inf")):
        tensors = load_file(folders[0] / "model.safetensors")
        tensors["model.layers.1.self_attn.o_proj.weight"][:] = value
        save_file(tensors, folders[0] / "model.safetensors", metadata={"format": "pt"})
        pair = load(folders)
        with pytest.raises(SelfTestFailed, match="after: logits are not finite"):
            self_test(pair)


def test_links_are_followed_as_a_hub_download_has_them(folders: tuple[Path, Path]) -> None:
    """Every file a link to a blob elsewhere, and the folder a link itself."""
    blobs = folders[0].parent / "blobs"
    blobs.mkdir()
    for i, file in enumerate(sorted(folders[0].iterdir())):
        file.rename(blobs / str(i))
        file.symlink_to(blobs / str(i))
    link = folders[0].parent / "snapshot"
    link.symlink_to(folders[0])
    self_test(load((link, folders[1])))


def test_a_good_sharded_checkpoint_loads(folders: tuple[Path, Path]) -> None:
    sharded(folders[0])
    self_test(load(folders))
