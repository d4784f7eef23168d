"""A run's folder: one driver, one experiment, whole files."""

import json
import os
import subprocess
import sys
import time

import pytest
from fakes import PAIR

from jobs.errors import Refused
from jobs.run_folder import MANIFEST, RunFolder, manifest

EXPERIMENT = {"config": {"alphas": (0.0, 1.0), "seed": 0}, "prompts": {"sha256": "p"}}


@pytest.fixture
def used(tmp_path):
    """A folder with a row of EXPERIMENT."""
    with RunFolder(tmp_path / "out") as folder:
        folder.write(MANIFEST, manifest(EXPERIMENT, PAIR))
        folder.rows.write_text("{}\n")
    return folder


def test_a_new_folder_is_made(tmp_path):
    with RunFolder(tmp_path / "a" / "b") as folder:
        assert not folder.check_experiment(EXPERIMENT)


def test_the_same_experiment_goes_on(used):
    assert used.check_experiment(EXPERIMENT)
    used.check_pair(PAIR)


def test_other_vectors_of_a_trait_are_refused_where_it_steers(used):
    held = PAIR.model_copy(update={"traits": {"calm": "v1", "sure": "w1"}})
    used.write(MANIFEST, manifest(EXPERIMENT, held))
    assert used.read(MANIFEST)["pair"]["traits"] == {"calm": "v1", "sure": "w1"}
    for now in ({"calm": "v1", "sure": "w2"}, {"calm": "v1"}):  # the other one steers nothing
        used.check_pair(PAIR.model_copy(update={"traits": now}), traits={"calm"})
    for now, said in (({"calm": "v2"}, "'v1' there, 'v2' now"), ({}, "'v1' there, None now")):
        with pytest.raises(Refused, match=f"traits.calm: {said}"):
            used.check_pair(PAIR.model_copy(update={"traits": now}), traits={"calm"})
        used.check_pair(PAIR.model_copy(update={"traits": now}))


def test_a_second_driver_is_refused_until_the_first_leaves(used):
    with used:
        with pytest.raises(Refused, match="another run is writing"):
            with RunFolder(used.path):
                pass
    with RunFolder(used.path):
        pass


def test_the_lock_goes_with_its_process(used):
    code = (
        "import sys, time; from pathlib import Path; from jobs.run_folder import RunFolder\n"
        "with RunFolder(Path(sys.argv[1])): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(used.path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "in\n"
        with pytest.raises(Refused, match="another run"):
            used.__enter__()
        other.kill()
        other.wait()
        time.sleep(0.05)
        with used:
            pass


def test_another_config_or_prompts_are_refused_with_the_difference(used):
    other = {"config": {"alphas": (0.0, 2.0), "seed": 0}, "prompts": {"sha256": "q"}}
    with pytest.raises(Refused) as refused:
        used.check_experiment(other)
    assert "config.alphas: [0.0, 1.0] there, [0.0, 2.0] now" in str(refused.value)
    assert "prompts.sha256: 'p' there, 'q' now" in str(refused.value)
    assert "seed" not in str(refused.value)


def test_other_weights_are_refused_but_not_another_path(used):
    used.check_pair(PAIR.model_copy(update={"after": "/elsewhere", "notices": ["x"]}))
    other = PAIR.model_copy(update={"after_sha256": {"model.safetensors": "a2"}})
    with pytest.raises(Refused, match=r"after_sha256.model.safetensors: 'a1' there, 'a2' now"):
        used.check_pair(other)


def test_rows_without_a_manifest_are_refused(used):
    used.discard(MANIFEST)
    with pytest.raises(Refused, match="no manifest"):
        used.check_experiment(EXPERIMENT)


def test_a_manifest_without_rows_binds_nobody(used):
    used.rows.write_text("")
    assert not used.check_experiment({"config": {}})


def test_a_file_is_written_whole_or_not_at_all(used, monkeypatch):
    before = (used.path / MANIFEST).read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        used.write(MANIFEST, {"half": 1})
    assert (used.path / MANIFEST).read_bytes() == before


def test_the_manifest_says_what_the_rows_were_made_with(used):
    content = json.loads((used.path / MANIFEST).read_text())
    assert content["pair"]["tokenizer_sha256"] == "t1"
    assert {"python", "ray", "scipy"} <= content["versions"].keys()
    assert "commit" in content
