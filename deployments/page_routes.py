"""The page at `/`, its files under `/page/`, and the finished runs under `/runs`.

What a browser is told with each of them: nothing from elsewhere, nothing inline, no framing, and
no string may become markup. Reports are files of their own with script inside; they are shown in
a sandbox, where they are of no origin and can ask for nothing.
"""

import os
from collections.abc import Callable
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path

from fastapi import FastAPI
from fastapi.responses import FileResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

_PAGE = Path(__file__).parent / "page"
_MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
}

_COMMON = {
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}
PAGE_HEADERS = {
    **_COMMON,
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "cross-origin-opener-policy": "same-origin",
}
# The reports name the hash of their script themselves, which narrows this further.
RUN_HEADERS = {
    **_COMMON,
    "content-security-policy": "sandbox allow-scripts; default-src 'none'; "
    "script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
}

SHOWN = ("report*.html", "index.html", "summary*.json", "manifest*.json")
MAX_DEPTH = 4  # a night's steps are two below it
MAX_RUNS = 200


class Run(BaseModel):
    """A folder with a report. `name`: its path below the results folder, `.` for that itself."""

    name: str
    modified: str
    files: list[str]


class Runs(BaseModel):
    """`configured`: whether the service was started with a results folder."""

    configured: bool
    runs: list[Run]


def is_shown(name: str) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in SHOWN)


def finished_runs(results: Path) -> list[Run]:
    """The newest `MAX_RUNS` folders with a page to look at, newest first."""
    found: list[tuple[float, Run]] = []
    for folder, below, names in os.walk(results):
        place = Path(folder).relative_to(results)
        if len(place.parts) >= MAX_DEPTH:
            below.clear()
        below[:] = [name for name in below if not name.startswith(".")]
        files = sorted(name for name in names if shown_file(results, str(place / name)))
        if not any(name.endswith(".html") for name in files):
            continue
        try:
            newest = max(os.stat(os.path.join(folder, name)).st_mtime for name in files)
            str(place).encode()  # a name that is no text cannot be told in JSON
        except (OSError, UnicodeEncodeError):
            continue
        modified = datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds")
        found.append((newest, Run(name=place.as_posix(), modified=modified, files=files)))
    found.sort(key=lambda item: (-item[0], item[1].name))
    return [run for _, run in found[:MAX_RUNS]]


def shown_file(results: Path, path: str) -> Path | None:
    """The file to serve for a path below `results`, or None: another kind of file, hidden, not
    there, or outside once links are followed."""
    parts = path.split("/")
    if "\0" in path or any(part in ("", "..") for part in parts):  # a NUL is no OSError
        return None
    if any(part.startswith(".") and part != "." for part in parts) or not is_shown(parts[-1]):
        return None
    try:
        file = results.joinpath(*parts).resolve(strict=True)
        inside = file.is_relative_to(results.resolve()) and file.is_file()
    except OSError:
        return None
    return file if inside and is_shown(file.name) else None


def add_page_routes(app: FastAPI, results: Callable[[], Path | None]) -> None:
    """`results` is asked with each request; None: no runs are shown."""
    files = {file.name: file for file in _PAGE.iterdir() if file.suffix in (".css", ".js")}

    def send(file: Path, headers: dict[str, str]) -> FileResponse:
        return FileResponse(file, media_type=_MEDIA_TYPES[file.suffix], headers=headers)

    @app.get("/", include_in_schema=False)
    def page() -> FileResponse:
        return send(_PAGE / "index.html", PAGE_HEADERS)

    @app.get("/page/{name}", include_in_schema=False)
    def page_file(name: str) -> FileResponse:
        if name not in files:
            raise HTTPException(404, "no such file")
        return send(files[name], PAGE_HEADERS)

    @app.get("/runs")
    def runs() -> Runs:
        """The finished runs in the results folder, newest first."""
        folder = results()
        if folder is None:
            return Runs(configured=False, runs=[])
        return Runs(configured=True, runs=finished_runs(folder))

    @app.get("/runs/{path:path}", include_in_schema=False)
    def run_file(path: str) -> FileResponse:
        folder = results()
        file = None if folder is None else shown_file(folder, path)
        if file is None:
            raise HTTPException(404, "no such report")
        return send(file, RUN_HEADERS)
