"""Stopping what was started, also when it does not want to, and saying why it did not start."""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from deployments import local_service as module
from deployments.local_service import ServiceError, require_free, stop

# Does not end by Ctrl-C, nor does its child; says when it is up, and when a Ctrl-C has come.
STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, lambda *_: print("no", flush=True))
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(100)"
subprocess.Popen([sys.executable, "-c", child])
print("up", flush=True)
time.sleep(100)
"""


def stubborn() -> "subprocess.Popen[bytes]":
    process = subprocess.Popen(
        [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE, start_new_session=True
    )
    assert line_of(process) == b"up\n"
    return process


def line_of(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    return process.stdout.readline()


def ended(process: "subprocess.Popen[bytes]") -> bool:
    assert process.stdout is not None
    process.stdout.close()
    return gone(process.pid)


def gone(group: int) -> bool:
    """Killed processes are gone once init has collected them; left ones would live for 100 s."""
    deadline = time.monotonic() + 20
    while module._group_alive(group) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not module._group_alive(group)


@pytest.mark.usefixtures("ctrl_c")
def test_what_ignores_ctrl_c_is_killed_with_its_children(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_STOP_TIMEOUT_S", 0.2)
    monkeypatch.setattr(module, "_GROUP_TIMEOUT_S", 0.2)
    process = stubborn()
    stop(process)
    assert process.returncode == -signal.SIGKILL
    assert ended(process)


@pytest.mark.usefixtures("ctrl_c")
def test_in_the_background_of_a_shell_it_does_not_wait_for_a_ctrl_c_that_nobody_hears() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as such a shell does
    process = subprocess.Popen(["sleep", "100"], start_new_session=True)
    stop(process)
    assert process.returncode == -signal.SIGTERM  # and not killed after the timeout


@pytest.mark.usefixtures("ctrl_c")
def test_a_second_ctrl_c_does_not_leave_anything_running() -> None:
    process = stubborn()

    def again() -> None:
        if line_of(process) == b"no\n":  # stop() has sent the first one, and waits
            signal.raise_signal(signal.SIGINT)

    impatient = threading.Thread(target=again)
    impatient.start()
    with pytest.raises(KeyboardInterrupt):
        stop(process)
    impatient.join()
    assert ended(process)


def test_a_free_port_is_free() -> None:
    require_free(module.free_port())


@pytest.mark.ray
def test_a_pair_that_cannot_be_loaded_is_named_at_once(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "http_options: {host: 127.0.0.1}\n"
        "applications:\n"
        "  - name: lda\n"
        "    import_path: deployments.app:build_app\n"
        "    args: {pair: {before: /no/such/folder, after: /no/such/folder}}\n"
    )
    with pytest.raises(ServiceError, match="CheckpointError: /no/such/folder: no such folder"):
        with module.local_service(config, port=module.free_port(), log=tmp_path / "log"):
            raise AssertionError("started")
