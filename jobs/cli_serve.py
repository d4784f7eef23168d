"""`lda serve`: the service in the foreground, as a Ray cluster of its own, until Ctrl-C."""

import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from deployments.edge_options import EdgeOptions
from deployments.local_service import (
    LocalService,
    ServiceError,
    edge_options,
    local_service,
    require_free,
)
from jobs.cli_files import shipped
from jobs.errors import Refused

CONFIG = "serve_config.yaml"
PORT = 8000
LOOK_EVERY_S = 0.5


def settings_of(config: Path | None) -> dict[str, Any]:
    """Of a file, or of the tiny pair that is shipped. On this machine only, unless the file says
    otherwise; its relative paths are those of the current folder. Raises Refused."""
    path = config or shipped(CONFIG)
    try:
        settings = yaml.safe_load(path.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise Refused(f"{path}: {error}") from None
    if not isinstance(settings, dict) or "applications" not in settings:
        raise Refused(f"{path}: not a Serve config file: it has no applications")
    if config is None:
        for application in settings["applications"]:
            args = application["args"]
            args["pair"] = {role: str(shipped(folder)) for role, folder in args["pair"].items()}
            args["traits"] = str(shipped(args["traits"]))
    settings["http_options"] = {"host": "127.0.0.1", **(settings.get("http_options") or {})}
    return settings


def edges_of(settings: Mapping[str, Any]) -> list[EdgeOptions]:
    """Of each application. Raises Refused where the service would refuse to start with them, or
    would listen beyond this machine without keys."""
    try:
        edges = edge_options(settings)
        for edge in edges:
            edge.require_keys_beyond_loopback(settings["http_options"]["host"])
            edge.read_keys()
    except ValueError as error:
        raise Refused(str(error)) from None
    return edges


def serve(config: Path | None, port: int | None) -> int:
    """Exit status: 0 or 130 stopped, 1 it did not start or did not last. Raises Refused."""
    settings = settings_of(config)
    asks_for_key = any(edge.asks_for_key for edge in edges_of(settings))
    port = port or int(settings["http_options"].get("port") or PORT)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the service is stopped
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    with tempfile.TemporaryDirectory(prefix="lda-serve-") as folder:
        own, log = Path(folder, CONFIG), Path(folder, "serve.log")
        own.write_text(yaml.safe_dump(settings), "utf-8")
        print(f"Starting on http://127.0.0.1:{port}; Ctrl-C stops it ...", flush=True)
        try:
            with _shown(log), local_service(own, port=port, log=log) as service:
                pairs = settings["applications"][0].get("args", {}).get("pairs") or {}
                print(_how_to_use(service, next(iter(pairs), None)), flush=True)
                if asks_for_key:
                    print("It asks for a key: export LDA_API_KEY=...\n", flush=True)
                while _listens(port):
                    time.sleep(LOOK_EVERY_S)
            print("error: the service has ended", file=sys.stderr)
            return 1
        except ServiceError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("stopped", file=sys.stderr)
            return 130


def _how_to_use(service: LocalService, pair: str | None) -> str:
    """`pair`: one of them, where the service has several."""
    url, address, generate, sweep = service.url, service.env["RAY_ADDRESS"], "", ""
    if pair is not None:
        generate, sweep = f" --set pair={pair}", f" --app lda:{pair}"
    return f"""
Ready: {url} (a page to look at; the API's: {url}/docs). In another shell:
  lda generate "What is the capital of France?" --format alpaca --alpha 2 -n 4 --url {url}{generate}
  lda sweep --prompts "$(lda files prompts/tiny_demo.txt)" --limit 100 --out results/first{sweep}
For jobs, where several clusters run on this machine: export RAY_ADDRESS={address}
"""


def _listens(port: int) -> bool:
    try:
        require_free(port)
    except ServiceError:
        return True
    return False


@contextmanager
def _shown(log: Path) -> Iterator[None]:
    """What is written to the log meanwhile, on the standard error, too."""
    ended = threading.Event()

    def follow() -> None:
        with log.open("wb+") as file:  # there before the service writes to it
            while True:
                last = ended.wait(LOOK_EVERY_S)
                if said := file.read():
                    os.write(sys.stderr.fileno(), said)
                if last:
                    return

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
