"""The service on this machine for a while: started, waited for, stopped without a trace.

For the demo, the benchmarks and the tests. It is `serve run` itself, as a process group of its
own with a Ray session of its own, so that no other cluster here is joined or harmed.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from deployments.edge_options import EdgeOptions
from deployments.proxy_guard import CALLBACK

_START_TIMEOUT_S = 180.0
_STOP_TIMEOUT_S = 30.0
_GROUP_TIMEOUT_S = 10.0


class ServiceError(RuntimeError):
    """The service cannot start; the message says why."""


@dataclass(frozen=True)
class LocalService:
    """`env`: the environment in which ray, serve and the jobs find this cluster."""

    url: str
    env: dict[str, str]
    log: Path


@contextmanager
def local_service(config: Path, *, port: int, log: Path) -> Iterator[LocalService]:
    """Runs `config` on 127.0.0.1:`port` until the block ends. Raises ServiceError.

    Its output goes to `log`. Relative model paths are relative to the current folder.
    """
    require_free(port)
    log.parent.mkdir(parents=True, exist_ok=True)
    # Short: Ray puts sockets below it, whose paths have at most 107 characters.
    session = Path(tempfile.mkdtemp(prefix="lda-", dir="/tmp"))
    programs = Path(sys.executable).parent
    env = {
        **os.environ,
        # A submitted job's `python` is looked up on the cluster's PATH.
        "PATH": f"{programs}{os.pathsep}{os.environ.get('PATH', '')}",
        "RAY_TMPDIR": str(session),
        "RAY_AUTH_MODE": "token",
        "RAY_USAGE_STATS_ENABLED": "0",
        **CALLBACK,
    }
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        env.pop(name, None)  # ours is started, none is joined
    settings = yaml.safe_load(config.read_text())
    settings["http_options"] = {**settings.get("http_options", {}), "port": port}
    headers = _key_headers(settings)
    own_config = session / "serve_config.yaml"
    own_config.write_text(yaml.safe_dump(settings))
    process: subprocess.Popen[bytes] | None = None
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(programs / "serve"), "run", str(own_config)],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        url = f"http://127.0.0.1:{port}"
        _wait_until_ready(urllib.request.Request(f"{url}/ready", headers=headers), process, log)
        (gcs_port,) = (session / "ray" / "session_latest").glob("gcs_server_port_*")
        env["RAY_ADDRESS"] = f"127.0.0.1:{gcs_port.read_text().strip()}"
        yield LocalService(url, env, log)
    finally:
        if process is not None:
            stop(process)
        shutil.rmtree(session, ignore_errors=True)


def require_free(port: int) -> None:
    """Raises ServiceError if something listens on 127.0.0.1:`port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ServiceError(
                f"port {port} on 127.0.0.1 is taken ({error.strerror}); choose another one"
            ) from None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def edge_options(settings: Mapping[str, Any]) -> list[EdgeOptions]:
    """Of each application of a Serve config."""
    all_args = [application.get("args") or {} for application in settings["applications"]]
    return [EdgeOptions.model_validate(args.get("edge") or {}) for args in all_args]


def _key_headers(settings: Mapping[str, Any]) -> dict[str, str]:
    """What /ready wants to see, where the service asks for keys."""
    try:
        keys = [key for one in edge_options(settings) for key in one.read_keys().values()]
    except ValueError as error:
        raise ServiceError(str(error)) from None
    return {"authorization": f"Bearer {keys[0]}"} if keys else {}


def _wait_until_ready(
    ready: urllib.request.Request, process: subprocess.Popen[bytes], log: Path
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        # `serve run` stays up after a failed deploy, and Serve tries again what cannot succeed:
        # only the log knows.
        said = log.read_text(errors="replace")
        if refused := re.search(r"(?:lda_core\.errors|edge_options)\.(\w+: .+)", said):
            raise ServiceError(refused[1])
        if process.poll() is not None or "DEPLOY_FAILED" in said:
            break
        try:
            with urllib.request.urlopen(ready, timeout=10):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ServiceError(f"the service did not become ready; the end of {log}:\n{tail}")


def stop(process: "subprocess.Popen[bytes]") -> None:
    """Ends the process and its group: with Ctrl-C first, which lets Serve and Ray end by
    themselves. An impatient second Ctrl-C only shortens the wait."""
    # What a shell runs in the background ignores Ctrl-C, and so does what that starts.
    deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    try:
        process.send_signal(signal.SIGTERM if deaf else signal.SIGINT)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            pass
        deadline = time.monotonic() + _GROUP_TIMEOUT_S
        while _group_alive(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
    finally:
        if _group_alive(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
