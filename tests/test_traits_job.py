"""traits.py over a fake service: what it asks, keeps, makes and says."""

import errno
import json
import random
import threading

import numpy as np
import pytest
import torch
from fakes import PAIR
from safetensors import safe_open
from safetensors.numpy import save
from trait_fakes import AXIS, LAYERS, WIDTH, FakeCaptures, capture, state_of

from deployments.schemas import InvalidRequest
from jobs.errors import Stopped
from jobs.probes import fit
from jobs.trait_files import read_traits, write_trait
from jobs.trait_means import Answer, Item, MeanFile
from jobs.traits import main

METHODS = ("mean_difference", "probe")
RECORD_BYTES = 32 + 4 * LAYERS * WIDTH + 4  # of means.bin: key, state, CRC


@pytest.fixture
def sets(tmp_path):
    """`says_yes` can be told apart at layers 1 and 2; in `luck` labels are drawn by lot."""
    rng = random.Random(0)
    both = {"says_yes": [], "luck": []}
    for i in range(60):
        for answer in ("yes", "no"):
            one = {"prompt": f"<b>question</b> {i}", "response": f"{answer}, \u202e{i}"}
            label = "positive" if answer == "yes" else "negative"
            both["says_yes"].append({**one, "label": label})
            label = rng.choice(("positive", "negative"))
            both["luck"].append({**one, "label": label})
    paths = []
    for name, lines in both.items():
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return paths


@pytest.fixture
def job(tmp_path, sets):
    def job(*options, out="out", count=1, **service):
        fake = FakeCaptures(**service)
        few = () if "--shuffles" in options else ("--shuffles", "3")
        files = map(str, sets[:count])
        command = ["--contrast", *files, "--out", str(tmp_path / out), *options, *few]
        return main(command, fake), fake

    return job


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


def tensors_of(path):
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata())


def test_traits_are_made_and_told_apart(job, tmp_path, capsys):
    status, fake = job("--shuffles", "39", count=2)
    out = tmp_path / "out"
    assert status == 0
    # Two sets of the same texts: each is asked for once, in the form of the run.
    assert len(fake.seen) == len({(r.prompt, r.completions[0].text) for r in fake.seen}) == 120
    assert {(r.prompt_format, r.models, r.mean, r.raw) for r in fake.seen} == {
        ("alpaca", "after", True, False)
    }
    summary = summary_of(out)
    assert summary["texts"] == 120 and summary["failed"] == 0
    assert summary["traits"] == summary["traits_made"] == 2
    assert summary["says_yes/held_out"] == 30 and summary["says_yes/held_out_prompts"] == 15
    for method in METHODS:
        assert summary[f"says_yes/{method}/separates"] == 1
        assert summary[f"says_yes/{method}/accuracy"] > 0.8
        assert summary[f"says_yes/{method}/best_layer"] in (1, 2)
        assert summary[f"says_yes/{method}/layer_0/ci_low"] < 0.5
        assert 0.3 < summary[f"says_yes/{method}/layer_1/control_accuracy"] < 0.7
        assert summary[f"luck/{method}/separates"] == 0
    assert all(isinstance(value, int | float) for value in summary.values())
    tensors, metadata = tensors_of(out / "says_yes.safetensors")
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        method: (LAYERS, WIDTH) for method in METHODS
    }
    axis = torch.from_numpy(AXIS)
    for method in METHODS:
        for layer in (1, 2):
            cosine = torch.cosine_similarity(tensors[method][layer], axis, dim=0)
            assert cosine > 0.75
    assert metadata["trait"] == "says_yes" and metadata["model"] == "after"
    assert (metadata["layers"], metadata["hidden_size"]) == (str(LAYERS), str(WIDTH))
    assert json.loads(metadata["pair"])["after_sha256"] == PAIR.after_sha256
    report = json.loads(metadata["report"])
    best = report["probe"]["layers"][summary["says_yes/probe/best_layer"]]
    assert best["accuracy"] == summary["says_yes/probe/accuracy"]
    shown = capsys.readouterr().out
    assert "120 of 120 texts captured" in shown and "says_yes" in shown
    # The captures' job reads what is here.
    assert list(read_traits(out, LAYERS, WIDTH)) == ["luck", "says_yes"]


def test_the_other_model_and_another_form(job, tmp_path):
    options = ("--model", "before", "--prompt-format", "raw")
    status, fake = job(*options)
    assert status == 0
    assert {(r.prompt_format, r.models) for r in fake.seen} == {("raw", "before")}
    before, metadata = tensors_of(tmp_path / "out" / "says_yes.safetensors")
    assert metadata["model"] == "before"
    assert job(out="after")[0] == 0
    after, _ = tensors_of(tmp_path / "after" / "says_yes.safetensors")
    assert not torch.equal(before["probe"], after["probe"])


def test_the_page_is_whole_and_escaped(job, tmp_path):
    options = ("--shuffles", "39")
    job(*options, count=2)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") and page.rstrip().endswith("</html>")
    assert "<b>question</b>" not in page and "&lt;b&gt;question" in page
    assert "\u202e" not in page and "‹U+202E›" in page
    assert "<script" not in page and "http://" not in page.replace("http://www.w3.org", "")
    assert page.count("<svg") == 4 and page.count('<li class="no">') == 2
    assert "1 of 2 traits tell held-out texts apart better than chance: says_yes." in page
    # Made of the same states, it is the same page.
    (tmp_path / "out" / "report.html").unlink()
    _, fake = job(*options, count=2)
    assert fake.seen == [] and fake.described == 0
    assert (tmp_path / "out" / "report.html").read_text() == page


class Killed(BaseException):
    pass


def test_a_run_that_broke_off_resumes_to_the_same(job, tmp_path):
    lock, left = threading.Lock(), [37]

    def dies(request):
        with lock:
            left[0] -= 1
        if left[0] < 0:
            raise Killed
        return capture(request)

    def state(out):
        names = ("says_yes",)
        files = {name: tensors_of(tmp_path / out / f"{name}.safetensors") for name in names}
        tensors = {n: {k: t.tolist() for k, t in both[0].items()} for n, both in files.items()}
        others = ("summary.json", "manifest.json", "report.html")
        text = [(tmp_path / out / name).read_text() for name in others]
        return tensors, {name: both[1] for name, both in files.items()}, text

    assert job(out="whole")[0] == 0
    with pytest.raises(Killed):
        job(answer=dies)
    means = tmp_path / "out" / "means.bin"
    kept = means.stat().st_size // RECORD_BYTES
    assert 0 < kept < 120 and not (tmp_path / "out" / "summary.json").exists()
    with means.open("ab") as file:
        file.write(b"half a record")
    status, fake = job()
    assert status == 0 and len(fake.seen) == 120 - kept
    assert state("out") == state("whole")


@pytest.mark.parametrize("at", [0, 31, 32, RECORD_BYTES - 5, RECORD_BYTES - 4, RECORD_BYTES - 1])
def test_a_bit_that_flips_in_a_state_is_seen_and_can_be_cured(job, tmp_path, capsys, at):
    assert job()[0] == 0
    means = tmp_path / "out" / "means.bin"
    data = bytearray(means.read_bytes())
    data[3 * RECORD_BYTES + at] ^= 4
    means.write_bytes(data)
    status, fake = job()
    assert status == 2 and fake.seen == []
    said = capsys.readouterr().err
    assert f"{means}: record 4 is damaged" in said and "delete the file to have it made" in said
    means.unlink()
    status, fake = job()
    assert status == 0 and len(fake.seen) == 120


def test_a_file_of_states_without_checksums_is_said_to_be_an_earlier_versions(
    job, tmp_path, capsys
):
    assert job()[0] == 0
    means = tmp_path / "out" / "means.bin"
    data = means.read_bytes()
    starts = range(0, len(data), RECORD_BYTES)
    earlier = b"".join(data[at : at + RECORD_BYTES - 4] for at in starts)
    means.write_bytes(earlier)
    status, fake = job()
    assert status == 2 and fake.seen == []
    said = capsys.readouterr().err
    assert f"{means} was made by an earlier version; delete it to have it made again" in said
    assert means.read_bytes() == earlier


def test_half_a_record_is_taken_back_where_the_disk_is_full(tmp_path, monkeypatch):
    """A copy of it would be longer than the file after the next run has cut it."""
    item = Item("a", "b")
    with MeanFile(tmp_path / "means.bin", LAYERS, WIDTH) as file:
        file.append([Answer(item, state_of(*item))])
        write = file._file.write

        class Full:
            tell, truncate = file._file.tell, file._file.truncate

            def write(self, data):
                write(data[:100])
                raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(file, "_file", Full())
            with pytest.raises(OSError, match="No space left on device: '.*means.bin'"):
                file.append([Answer(Item("c", "d"), state_of("c", "d"))])
        assert file.path.stat().st_size == RECORD_BYTES
        file.append([Answer(Item("c", "d"), state_of("c", "d"))])
    assert file.cut_half_record() == 0 and len(file.places()) == 2


def test_the_folder_is_copied(job, tmp_path):
    assert job("--copy-to", f"file://{tmp_path}/far")[0] == 0
    for name in ("means.bin", "manifest.json", "summary.json", "says_yes.safetensors"):
        assert (tmp_path / "far" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert job("--seed", "1", "--copy-to", f"file://{tmp_path}/other")[0] == 2
    assert not (tmp_path / "other").exists()  # another run's folder


def test_finished_traits_are_not_made_again(job, tmp_path, monkeypatch):
    assert job(count=2)[0] == 0
    (tmp_path / "out" / "luck.safetensors").unlink()
    made = []

    def counted(*args, **options):
        made.append(1)
        return fit(*args, **options)

    monkeypatch.setattr("jobs.traits.fit", counted)
    status, fake = job(count=2)
    assert status == 0 and fake.seen == [] and made == [1]
    assert (tmp_path / "out" / "luck.safetensors").exists()


def test_failed_texts_are_counted_and_asked_again(job, tmp_path, capsys):
    def flaky(request):
        if request.prompt.endswith("3"):
            raise InvalidRequest("prompt", "too long", "context_length_exceeded")
        return capture(request)

    status, _ = job(answer=flaky)
    assert status == 1
    summary = summary_of(tmp_path / "out")
    assert (
        summary["failed"] == summary["says_yes/failed"] == 12 and summary["says_yes/texts"] == 108
    )
    captured = capsys.readouterr()
    assert "12 text(s): invalid request: prompt: too long" in captured.err
    assert "12 text(s) are refused as they are" in captured.err
    assert "run again to retry" not in captured.err
    page = (tmp_path / "out" / "report.html").read_text()
    assert "12 failed" in page and " different ones; contrast sets: 1<" in page
    status, fake = job()
    assert status == 0 and len(fake.seen) == 12
    assert job(out="whole")[0] == 0
    files = [tmp_path / out / "says_yes.safetensors" for out in ("out", "whole")]
    (one, said), (two, of_whole) = map(tensors_of, files)
    assert all(torch.equal(one[m], two[m]) for m in METHODS) and said == of_whole


def test_states_that_are_not_finite_are_failures(job, tmp_path, capsys):
    def overflows(request):
        (answer,) = capture(request)
        if request.prompt.endswith("3"):
            mean = np.full((LAYERS, 3, WIDTH), np.inf, np.float32)
            answer = answer.model_copy(update={"tensors": save({"after.mean": mean})})
        return [answer]

    assert job(answer=overflows)[0] == 1
    assert summary_of(tmp_path / "out")["failed"] == 12
    assert "not finite" in capsys.readouterr().err


def test_a_trait_without_enough_texts_is_not_made(job, tmp_path, capsys):
    def no_yes(request):
        if "yes" in request.completions[0].text:
            raise InvalidRequest("prompt", "too long", "context_length_exceeded")
        return capture(request)

    assert job(answer=no_yes, count=2)[0] == 1
    summary = summary_of(tmp_path / "out")
    assert summary["traits_made"] == 1 and "says_yes/texts" not in summary
    assert not (tmp_path / "out" / "says_yes.safetensors").exists()
    assert "trait says_yes is not made: --holdout" in capsys.readouterr().err
    assert "says_yes: not made" in (tmp_path / "out" / "report.html").read_text()


def test_a_service_of_another_shape_stops_the_run(job, capsys):
    def wide(request):
        (answer,) = capture(request)
        mean = np.zeros((LAYERS, 3, WIDTH + 1), np.float32)
        return [answer.model_copy(update={"tensors": save({"after.mean": mean})})]

    assert job(answer=wide)[0] == 1
    assert "answered [3, 3, 65] as after.mean, not [3, 3, 64]" in capsys.readouterr().err


def test_a_refused_option_ends_the_run(job, capsys):
    def refuses(request):
        raise InvalidRequest("prompt_format", "this tokenizer has no chat template")

    assert job(answer=refuses)[0] == 2
    assert "--prompt-format: this tokenizer has no chat template" in capsys.readouterr().err


def test_another_run_or_pair_is_not_mixed_in(job, tmp_path, sets, capsys):
    assert job()[0] == 0
    for options in (("--seed", "1"), ("--model", "before"), ("--holdout", "0.3")):
        assert job(*options)[0] == 2
        assert "holds another run" in capsys.readouterr().err
    means = tmp_path / "out" / "means.bin"
    means.write_bytes(means.read_bytes()[: -10 * RECORD_BYTES])
    other = PAIR.model_copy(update={"after_sha256": {"model.safetensors": "a2"}})
    assert job(pair=other)[0] == 2
    assert "after_sha256" in capsys.readouterr().err
    sets[0].write_text(sets[0].read_text().replace("yes", "yes!"))
    assert job()[0] == 2
    assert "contrasts.says_yes.sha256" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, why",
    [
        (("--holdout", "0.99"), "must be a number from 0.05 to 0.9"),
        (("--prompt-format", "raw", "--system-prompt", "x"), "--system-prompt: needs"),
        (("--model", "both"), "invalid choice"),
    ],
)
def test_bad_usage_asks_nothing(job, tmp_path, capsys, options, why):
    try:
        status = job(*options)[0]
    except SystemExit as left:
        status = left.code
    assert status == 2 and why in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_split_without_both_labels_is_refused_before_anything(tmp_path, capsys):
    lines = [
        {"prompt": "same" if i < 30 else f"p {i}", "response": f"r {i}", "label": label}
        for i, label in enumerate(["positive"] * 30 + ["negative"] * 30)
    ]
    path = tmp_path / "one.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    fake = FakeCaptures()
    assert main(["--contrast", str(path), "--out", str(tmp_path / "out")], fake) == 2
    assert "one.jsonl: --holdout 0.25: fewer than 2 positive" in capsys.readouterr().err
    assert fake.described == 0


def test_out_is_needed(sets, capsys):
    with pytest.raises(SystemExit) as left:
        main(["--contrast", str(sets[0])], FakeCaptures())
    assert left.value.code == 2 and "--contrast needs --out" in capsys.readouterr().err


def test_check_says_what_files_are(job, tmp_path, capsys):
    assert job()[0] == 0
    capsys.readouterr()
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    torch.save(torch.randn(LAYERS + 1, WIDTH), foreign / "refusal.pt")
    other = {"trait": "calm", "pair": json.dumps({"after_sha256": {"model.safetensors": "z"}})}
    write_trait(foreign / "calm.safetensors", {"probe": torch.randn(LAYERS, WIDTH)}, other)
    fake = FakeCaptures()
    ours = str(tmp_path / "out" / "says_yes.safetensors")
    assert main(["--check", ours, str(foreign / "refusal.pt")], fake) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"pair: {LAYERS} layers, hidden size {WIDTH}" in shown
    assert "mean_difference [3, 64]" in shown and "probe [3, 64]" in shown
    assert "embeddings" in shown and "of this very pair" in shown
    assert fake.seen == []
    torch.save(torch.randn(LAYERS, WIDTH + 1), foreign / "wide.pt")
    assert main(["--check", str(foreign), ours], FakeCaptures()) == 2
    captured = capsys.readouterr()
    assert "wide.pt: tensor 'tensor' has shape [3, 65]" in captured.err
    assert "calm" in captured.out and "OF ANOTHER PAIR" in captured.out


def test_a_service_that_dies_can_be_resumed(job, capsys):
    def gone(request):
        raise Stopped("stopped")

    assert job(answer=gone)[0] == 1
    assert "run again to resume" in capsys.readouterr().err
    assert job()[0] == 0


def test_the_fake_is_what_the_tests_say():
    yes = np.mean([state_of(f"p{i}", "yes")[1] @ AXIS for i in range(50)])
    no = np.mean([state_of(f"p{i}", "no")[1] @ AXIS for i in range(50)])
    assert yes > no + 10
